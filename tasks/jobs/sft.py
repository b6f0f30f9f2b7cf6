"""Supervised fine-tuning: `python -m tasks.jobs.sft FOLDER/job.json`, alone, under torchrun or under deepspeed.

The loop is Hugging Face's Trainer. What is ours: which rows share a batch (`dataset`), what is said before the first
step (`preflight`), what each strategy asks of the Trainer (`distributed`), and that what was saved is what was trained
(`reload`).

Training keeps fp32 weights. The student is saved in the precision in which its base was stored. The same job gives the
same weights, bit for bit on one machine, also when it was killed and went on, but for DeepSpeed's optimizer on the CPU
(offload): after a kill it takes its powers of beta anew, which is another rounding.

In the folder: the model; `adapter/` with LoRA; `history.jsonl`, a line a step; `tensorboard/`; `trainer/`, the encoded
rows and the checkpoints to go on from, removed at the end; `result.json`, last.
"""

import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging as transformers_logging

from tasks.jobs.dataset import COLLATE, DataError, Examples, encode_rows
from tasks.jobs.distributed import (
    SettingsError,
    choose_device,
    choose_precision,
    gather_weights,
    training_arguments,
)
from tasks.jobs.launch import REFUSED, finish
from tasks.jobs.network import DTYPES
from tasks.jobs.preflight import advice, estimate
from tasks.jobs.process import die_with_parent
from tasks.jobs.quantization import NotInstalled, keep_layout, quantized
from tasks.jobs.reload import loss_in_fresh_process, loss_of_saved, merge_adapter, save_model, stored_dtype
from tasks.jobs.settings import SftSettings
from tasks.jobs.template import end_with_turns, ensure_chat_template
from tasks.jobs.trainer import (
    FirstCheck,
    SftTrainer,
    TrainingError,
    Watch,
    complete_checkpoints,
    peak_memory_gb,
    read_history,
)

FIXED_ROWS = 2  # rows whose loss is compared before and after saving
# How far the loss of what was saved may be above the trainer's own, in parts of it, or of a nat where it is less. Weights
# that are rounded by chance (`tasks.jobs.reload.rounded`) cost 0.03 at times, and a weight in the wrong place several nats.
# It may be far below: in 16 bit the trainer does not see what it learned until a weight moved by half of what two
# numbers are apart.
EXACT, COMPUTED_IN_16_BIT, STORED_IN_16_BIT = 1e-3, 3e-2, 0.25
BEGAN = time.time()  # after the imports


def load_model(job: dict[str, Any], settings: SftSettings, precision: str, device: torch.device) -> Any:
    """The model to train: fp32 weights, or with LoRA a frozen base in the computed precision and fp32 adapters."""
    if settings.peft == "none":
        return AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    dtype, bits = DTYPES[precision], "4bit" if settings.peft == "qlora" else "none"
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, **quantized(bits, dtype, device))
    if settings.peft == "qlora":
        keep_layout(model)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.lora_target,
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        if "not found in the base model" in str(error):
            raise SettingsError(
                f"lora_target: {settings.lora_target} names none of this model's layers; take all-linear, or a regular "
                r"expression for whole names, such as .*\.(q|v)_proj"
            ) from None
        if "lora_dropout" not in str(error):
            raise
        raise SettingsError("this model's experts take no dropout in their adapters: set lora_dropout: 0") from None


def train(job: dict[str, Any], directory: Path) -> None:
    """Do the whole job: rows, checks, training, validation, saving, reading back."""
    settings = SftSettings.model_validate(job["config"])
    device = choose_device(settings)
    precision = choose_precision(settings, device)
    if device.type == "cuda":  # on a CPU every operation that we use is deterministic by itself
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        # Only to warn of what is not would leave attention's gradients to chance.
        torch.use_deterministic_algorithms(settings.deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False
    arguments = training_arguments(settings, directory, device, precision, job["seed"], sys.stdout.isatty())
    if arguments.world_size != settings.world_size:
        raise SettingsError(
            f"{arguments.world_size} processes were started, and the settings say {settings.world_size}"
        )
    output, first = Path(arguments.output_dir), arguments.process_index == 0

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    ensure_chat_template(tokenizer)
    with arguments.main_process_first(local=False):
        report = encode_rows(Path(job["data"]), tokenizer, settings.max_length, output / "rows.arrow")
    examples, held_out = Examples(output / "rows.arrow").split(settings.validation_share, job["seed"])
    encoded = time.time()
    set_seed(job["seed"])  # LoRA's matrices begin at random
    model = load_model(job, settings, precision, device)
    loaded = time.time()

    checkpoint = next(reversed(complete_checkpoints(output)), None)
    checks = {
        **report,
        "left_out": {reason: len(ids) for reason, ids in report["left_out"].items()},
        "cut": len(report["cut"]),
        "largest_batch": "is the first one trained",
        "resumed_from": checkpoint and checkpoint.name,
        "startup_seconds": {
            "python": round(BEGAN - psutil.Process().create_time(), 2),
            "rows": round(encoded - BEGAN, 2),
            "model": round(loaded - encoded, 2),
        },
    }
    if first:
        checks |= estimate(settings, precision, device, model, examples)
        print(f"pre-flight: {json.dumps(checks)}", flush=True)
    trainer = SftTrainer(
        settings=settings,
        history=read_history(directory, checkpoint),
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=COLLATE[settings.packing],
    )
    trainer.remove_callback(PrinterCallback)  # Watch prints, at a bounded rate
    trainer.add_callback(FirstCheck(trainer))
    trainer.add_callback(watch := Watch(trainer, directory))
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))

    validation_loss = trainer.mean_loss(held_out) if len(held_out) else None
    fixed = Examples(examples.path, examples.places[:FIXED_ROWS])
    trained_loss = trainer.mean_loss(fixed)
    weights = gather_weights(trainer)
    if first:
        dtype = stored_dtype(job["model"])
        held = DTYPES[precision] if settings.peft == "qlora" else None
        reloaded_loss = save(trainer, weights, tokenizer, dtype, held, fixed, directory)
        raise_unless_saved(reloaded_loss, trained_loss, precision, dtype)
        finish(
            directory,
            {
                **watch.figures(),
                "validation_loss": validation_loss,
                "rows": len(examples),
                "validation_rows": len(held_out),
                "left_out": report["left_out"],
                "cut": report["cut"],
                "precision": precision,
                "device": str(device),
                "strategy": settings.strategy,
                "world_size": arguments.world_size,
                "wrapped_in": type(trainer.model_wrapped).__name__,
                "peak_memory_gb": round(peak_memory_gb(), 3),
                "preflight": checks | {"loss_differs_from_models_own_by": trainer.difference_from_own_loss},
                "reloaded_loss_difference": abs(reloaded_loss - trained_loss),
            },
        )
        shutil.rmtree(output)
    trainer.accelerator.wait_for_everyone()  # a process that left early would end the others
    trainer.accelerator.end_training()


def raise_unless_saved(reloaded: float, trained: float, precision: str, dtype: torch.dtype) -> None:
    """Compare the loss of what was saved with the trainer's own, on the same rows.

    Args:
        dtype: of what was saved.

    Raises:
        TrainingError: something else was saved than was trained.
    """
    computed = EXACT if precision == "fp32" else COMPUTED_IN_16_BIT
    allowed = computed if dtype == torch.float32 else STORED_IN_16_BIT
    if not reloaded - trained <= allowed * max(trained, 1.0):
        raise TrainingError(
            f"the saved model has a higher loss than the trained one: {reloaded:.4f}, not {trained:.4f}"
        )


def save(
    trainer: SftTrainer,
    weights: dict[str, torch.Tensor],
    tokenizer: Any,
    dtype: torch.dtype,
    held: torch.dtype | None,
    fixed: Examples,
    directory: Path,
) -> float:
    """Save the model as anyone can load it, and return the loss it has when it is read back.

    Args:
        dtype: of what is saved.
        held: what the base was widened to in training, where it was held in 4 bit.
    """
    unset_hf_deepspeed_config()  # else ZeRO-3 would shard the model that is made for saving
    trained = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    tokenizer.save_pretrained(directory)
    adapter = trainer.settings.peft != "none"
    if adapter:
        trained.save_pretrained(directory / "adapter", state_dict=weights)
    else:
        save_model(weights, trained, dtype, directory)
    rows = [fixed[place] for place in range(len(fixed))]
    if trainer.settings.strategy not in ("single", "ddp"):
        loss = loss_in_fresh_process(directory, rows, held)
    else:
        if adapter:
            merge_adapter(directory, held)
        loss = loss_of_saved(directory, rows)
    end_with_turns(directory)
    return loss


@contextmanager
def one_clear_last_line(job: dict[str, Any]) -> Iterator[None]:
    """End the process with one line that says what is wrong and what to do, where we know."""
    try:
        yield
    except (DataError, NotInstalled, SettingsError) as error:
        line = f"{REFUSED}{error}"
    except TrainingError as error:
        line = f"error: {error}"
    except (MemoryError, RuntimeError) as error:
        told = str(error).lower()
        if "does not have a deterministic implementation" in told:
            operation = str(error).split(" does not have")[0]
            line = f"{REFUSED}a GPU computes {operation}, which this model has, in any order: set deterministic: false"
        elif isinstance(error, MemoryError) or "out of memory" in told or "allocate memory" in told:
            first = (str(error) or "of the host").split("\n")[0]
            line = f"error: out of memory ({first}); {advice(SftSettings.model_validate(job['config']), [])}"
        else:
            raise
    else:
        return
    sys.exit(f"{line}\n")  # written with its end at once: several processes say it at the same time, into one output


if __name__ == "__main__":
    die_with_parent()
    warnings.simplefilter("ignore", FutureWarning)  # thousands, of torch about DeepSpeed's calls
    transformers_logging.disable_progress_bar()
    job_file = Path(sys.argv[1])
    given = json.loads(job_file.read_bytes())
    with one_clear_last_line(given):
        train(given, job_file.parent)
