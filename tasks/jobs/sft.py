"""Supervised fine-tuning: `python -m tasks.jobs.sft FOLDER/job.json`, alone or under torchrun.

The loop is Hugging Face's Trainer. What is ours: the examples (loss on the answer and its end of turn alone),
batches of like length, logits at labelled positions only, and the checks before the first step and after the
last. Training keeps fp32 weights; the student is saved in the precision in which its base was stored.

The same job gives the same weights, bit for bit on one machine, also when it was killed and went on.
"""

import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler

from tasks.jobs.engine import DTYPES, best_precision
from tasks.jobs.launch import finish, report_progress
from tasks.jobs.settings import SftSettings
from tasks.jobs.template import Example, encode_example, encode_prompt, end_of_turn, ensure_chat_template

IGNORE = -100  # the label that a loss passes over


class Examples(Dataset[dict[str, Any]]):
    """Training rows straight from Parquet: the file stays on disk, mapped; only token counts are held."""

    def __init__(self, data: str, tokenizer: Any, max_length: int):
        self._rows = pq.read_table(data, memory_map=True)
        self._tokenizer, self._max_length = tokenizer, max_length
        self.kept: list[int] = []
        self.lengths: list[int] = []
        self.no_label: list[str] = []  # ids of rows whose prompt alone fills max_length
        self.cut: list[str] = []
        for index in range(self._rows.num_rows):
            example = self.example(index)
            if len(example.input_ids) > max_length or len(example.input_ids) == example.prompt_length:
                self.no_label.append(self.id(index))
                continue
            if example.cut:
                self.cut.append(self.id(index))
            self.kept.append(index)
            self.lengths.append(len(example.input_ids))

    def row(self, index: int) -> dict[str, Any]:
        return self._rows.slice(index, 1).to_pylist()[0]

    def id(self, index: int) -> str:
        return self._rows["instruction_id"][index].as_py()

    def example(self, index: int) -> Example:
        row = self.row(index)
        return encode_example(
            self._tokenizer, row["messages"], row["response"], whole=row["whole"], max_length=self._max_length
        )

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, place: int) -> dict[str, Any]:
        example = self.example(self.kept[place])
        labels = [IGNORE] * example.prompt_length + example.input_ids[example.prompt_length :]
        return {"input_ids": example.input_ids, "labels": labels}


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows as tensors (batch, longest), padded on the right by their lengths: no token is taken for padding."""
    width = max(len(row["input_ids"]) for row in rows)
    return {
        "input_ids": torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows]),
        "labels": torch.tensor([row["labels"] + [IGNORE] * (width - len(row["labels"])) for row in rows]),
        "attention_mask": torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
        ),
    }


class SftTrainer(Trainer):
    """Hugging Face's Trainer with batches of like length, and a loss whose vocabulary is computed at labels alone."""

    grouped = False
    real_tokens = computed_tokens = 0

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.grouped:
            return super()._get_train_sampler(train_dataset)
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps
        generator = torch.Generator().manual_seed(self.args.data_seed)
        return LengthGroupedSampler(rows, lengths=self.train_dataset.lengths, generator=generator)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        self.real_tokens += int(inputs["attention_mask"].sum())
        self.computed_tokens += inputs["attention_mask"].numel()
        targets = labels[:, 1:]
        first = int((targets != IGNORE).int().argmax(1).min())  # no row has a label before this position
        keep = labels.shape[1] - first
        logits = model(**inputs, logits_to_keep=keep).logits[:, :-1]
        targets = targets[:, first:]
        wanted = targets != IGNORE
        loss = torch.nn.functional.cross_entropy(logits[wanted].float(), targets[wanted], reduction="sum")
        loss = loss / (num_items_in_batch if num_items_in_batch is not None else wanted.sum())
        if not torch.isfinite(loss):
            raise SystemExit(f"error: the loss is {loss.item()}; lower the learning rate or look at the data")
        return (loss, None) if return_outputs else loss


class Watch(TrainerCallback):
    """Reports each step to the parent process, and marks a checkpoint as complete once all of it is written."""

    def __init__(self, directory: Path, tokens_per_step: float):
        self._history, self._tokens, self._started = directory / "history.jsonl", tokens_per_step, time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._first, self._started = state.global_step, time.perf_counter()
        if state.is_world_process_zero:
            report_progress(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if not state.is_world_process_zero or "loss" not in logs:
            return
        seconds = time.perf_counter() - self._started
        rate = self._tokens * (state.global_step - self._first) / seconds
        figures = {key: logs[key] for key in ("loss", "grad_norm", "learning_rate") if key in logs}
        with self._history.open("a") as file:
            file.write(json.dumps({"step": state.global_step, "seconds": round(seconds, 2), **figures}) + "\n")
        report_progress(state.global_step, state.max_steps, loss=round(logs["loss"], 3), **{"tokens/s": round(rate)})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / "complete").touch()


def preflight(examples: Examples, tokenizer: Any, data_rows: int) -> dict[str, Any]:
    """Checks before the first step. Ends the job where training would be worth nothing.

    Raises:
        SystemExit: no row has a label, an end of turn is missing, or prompt and training text differ.
    """
    if not examples:
        raise SystemExit(f"error: none of {data_rows} rows has a label: every prompt alone fills max_length")
    end, wrong_end, wrong_prompt = end_of_turn(tokenizer), [], []
    for index in examples.kept[:10]:
        row, example = examples.row(index), examples.example(index)
        if row["whole"] and example.input_ids[-1] != end:
            wrong_end.append(row["instruction_id"])
        if example.input_ids[: example.prompt_length] != encode_prompt(tokenizer, row["messages"]):
            wrong_prompt.append(row["instruction_id"])
    if wrong_end or wrong_prompt:
        raise SystemExit(
            f"error: no end of turn in the loss of {wrong_end}, another prompt than at inference in {wrong_prompt}"
        )
    return {
        "rows": len(examples),
        "left_out_no_label": examples.no_label,
        "cut": examples.cut,
        "cut_share": round(len(examples.cut) / len(examples), 4),
        "end_of_turn": end,
        "checked_rows": min(10, len(examples)),
    }


def last_complete(output: Path) -> str | None:
    """The newest intermediate checkpoint that was written to its end."""
    complete = [path.parent for path in output.glob("checkpoint-*/complete")]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def train(job: dict[str, Any], directory: Path) -> None:
    settings = SftSettings.model_validate(job["config"])
    set_seed(job["seed"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    named = best_precision(torch.device(device)) if settings.precision == "auto" else settings.precision
    dtype = DTYPES[named]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    ensure_chat_template(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    stored = model.dtype
    model.float()
    model.config.use_cache = False
    examples = Examples(job["data"], tokenizer, settings.max_length)
    checks = preflight(examples, tokenizer, examples._rows.num_rows)
    main_process = int(os.environ.get("RANK", 0)) == 0
    if main_process:
        print(f"pre-flight: {json.dumps(checks)}", flush=True)
    steps = math.ceil(math.ceil(len(examples) / settings.global_batch_size) * settings.num_train_epochs)
    arguments = TrainingArguments(
        output_dir=str(directory / "trainer"),
        per_device_train_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.accumulation,
        num_train_epochs=settings.num_train_epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=math.ceil(steps * settings.warmup_ratio),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=settings.gradient_checkpointing,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device == "cpu",
        logging_steps=1,
        logging_first_step=True,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=2,
        report_to=[*settings.report_to],
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=job["seed"],
        data_seed=job["seed"],
        fsdp=settings.strategy == "fsdp",
        fsdp_config={"fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
        if settings.strategy == "fsdp"
        else None,
    )
    tokens = sum(examples.lengths)
    watch = Watch(directory, tokens * settings.num_train_epochs / max(steps, 1))
    trainer = SftTrainer(model=model, args=arguments, train_dataset=examples, data_collator=collate, callbacks=[watch])
    trainer.grouped = settings.packing == "grouped"
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=last_complete(Path(arguments.output_dir)))
    seconds = time.perf_counter() - started
    trainer.model.config.use_cache = True
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if main_process:
        unwrapped = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        unwrapped.config.dtype = stored
        unwrapped.save_pretrained(directory, state_dict={name: weight.to(stored) for name, weight in state.items()})
        tokenizer.save_pretrained(directory)
        shutil.rmtree(arguments.output_dir, ignore_errors=True)
        losses = [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry]
        finish(
            directory,
            {
                "loss_by_step": losses,
                "steps": trainer.state.global_step,
                "rows": len(examples),
                "tokens": tokens,
                "padding_share": round(1 - trainer.real_tokens / max(trainer.computed_tokens, 1), 4),
                "seconds": round(seconds, 2),
                "tokens_per_second": round(tokens * settings.num_train_epochs / seconds, 1),
                "dtype": str(dtype).removeprefix("torch."),
                "device": device,
                "strategy": settings.strategy,
                "processes": settings.processes_per_node,
                "preflight": checks,
            },
        )


if __name__ == "__main__":
    job_file = Path(sys.argv[1])
    train(json.loads(job_file.read_text()), job_file.parent)
