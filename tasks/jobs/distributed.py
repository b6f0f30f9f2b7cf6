"""One trainer, five strategies: what Hugging Face's Trainer has to be told for each, and nothing else.

FSDP's and DeepSpeed's own settings are made here from `SftSettings`, with "auto" wherever the Trainer knows the value,
so that no second file can disagree.
"""

import os
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.cpp_extension import get_default_build_root
from transformers import TrainingArguments

from tasks.jobs.network import DTYPES, best_precision
from tasks.jobs.settings import SftSettings


class SettingsError(Exception):
    """The settings ask for something that this machine or this model cannot do."""


def choose_device(settings: SftSettings) -> torch.device:
    """The device of this process; on several GPUs a single process takes the first one alone.

    Raises:
        SettingsError: there are more processes than GPUs.
    """
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed, which accelerate imports, warns that it looked for more
        return torch.device("cpu")
    if settings.strategy == "single" and torch.cuda.device_count() > 1:  # else the Trainer would take all of them
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    rank, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if rank >= there:
        raise SettingsError(f"{settings.processes_per_node} processes need as many GPUs, and here are {there}: set "
                            f"processes_per_node to {there} (global_batch_size stays as it is)")  # fmt: skip
    return torch.device("cuda", rank)


def choose_precision(settings: SftSettings, device: torch.device) -> str:
    """bf16, fp16 or fp32.

    Raises:
        SettingsError: the device does not compute in it, or cannot do what else is asked of it.
    """
    if settings.precision == "fp16" and device.type == "cpu":
        raise SettingsError("precision: fp16 needs a GPU; on this CPU take auto, bf16 or fp32")
    if settings.strategy == "fsdp" and settings.offload == "parameters" and device.type == "cpu":
        raise SettingsError("fsdp with offload: parameters needs a GPU to offload from; on this CPU take offload: none")
    return best_precision(device) if settings.precision == "auto" else settings.precision


def training_arguments(
    settings: SftSettings, directory: Path, device: torch.device, precision: str, seed: int, in_terminal: bool
) -> TrainingArguments:
    """The Trainer's arguments. Making them starts the process group; before the model is loaded, for ZeRO-3's sake."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(directory / "tensorboard")
    fsdp = settings.strategy == "fsdp"
    if fsdp and settings.offload == "parameters":  # accelerate's group is of GPUs alone, and gradients are on the CPU
        torch.cuda.set_device(device)
        # Others wait for the first one, which encodes the rows and saves: as long as they do in a group of accelerate's.
        torch.distributed.init_process_group(
            "cuda:nccl,cpu:gloo", timeout=timedelta(seconds=TrainingArguments.ddp_timeout)
        )
    arguments = TrainingArguments(
        output_dir=str(directory / "trainer"),
        per_device_train_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.accumulation,
        num_train_epochs=settings.num_train_epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=settings.warmup_ratio,  # below 1 it is a share of all steps
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        activation_checkpointing=settings.gradient_checkpointing and not fsdp,  # FSDP has its own
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=device.type == "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is NaN ends the job
        disable_tqdm=not in_terminal,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 1,
        report_to=["tensorboard", *settings.report_to],
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
        seed=seed,
        data_seed=seed,
        fsdp=fsdp,
        fsdp_config=_fsdp_config(settings) if fsdp else None,
        deepspeed=_deepspeed_config(settings) if settings.zero_stage else None,
    )
    if fsdp and precision != "fp32":  # accelerate would sum gradients over processes in 16 bit, and round the loss
        policy = MixedPrecisionPolicy(param_dtype=DTYPES[precision], reduce_dtype=torch.float32)
        arguments.fsdp_plugin_args["mixed_precision_policy"] = policy
    if settings.zero_stage:  # on a CPU nobody else tells DeepSpeed of the process group
        drop_dead_build_locks(psutil.Process(os.getppid()).create_time())
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl")
    return arguments


def drop_dead_build_locks(began: float) -> None:
    """Remove the lock files of compilations that were killed: whoever compiles the same next would wait for ever.

    Torch marks a compilation under way by a file, which outlives a kill (`torch.utils.file_baton`); its compiler works in
    the folder of that file.

    Args:
        began: seconds since 1970 when this training did: a later file is of another of its processes.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    at_work = {process.info["cwd"] for process in psutil.process_iter(["cwd"])}
    for lock in root.glob("**/lock"):
        with suppress(FileNotFoundError):  # another of our processes was first
            if str(lock.parent) not in at_work and lock.stat().st_mtime < began:
                lock.unlink()


def _fsdp_config(settings: SftSettings) -> dict[str, Any]:
    return {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "state_dict_type": "SHARDED_STATE_DICT",
        "cpu_offload": settings.offload == "parameters",
        "activation_checkpointing": settings.gradient_checkpointing,
    }


def _deepspeed_config(settings: SftSettings) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": settings.zero_stage,
        "reduce_bucket_size": "auto",
        "overlap_comm": True,
        "contiguous_gradients": True,
    }
    if settings.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if settings.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        }
        if settings.offload == "parameters":
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "data_types": {"grad_accum_dtype": "fp32"},  # many batches that are added up in bf16 lose the small ones
        "zero_optimization": zero,
    }
    if settings.offload != "none":  # DeepSpeed's own AdamW computes on the CPU; without offload torch's is used
        parameters = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
        config["optimizer"] = {"type": "AdamW", "params": parameters}
    return config


def shard_on_cpu(trainer: Any) -> None:
    """Let FSDP shard on a CPU as well, where accelerate would pass it over in silence and train DDP."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = trainer.accelerator.state
    if trainer.args.fsdp and state.distributed_type == DistributedType.MULTI_CPU:
        plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
        if state.mixed_precision != "no":
            plugin.set_mixed_precision(state.mixed_precision)
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP  # the one copies the other
        state.fsdp_plugin = plugin
        trainer.is_fsdp_enabled = True


def raise_unless_sharded(settings: SftSettings, wrapped: torch.nn.Module) -> None:
    """Check that the strategy really took hold: a mistaken FSDP setting has trained plain DDP before.

    Raises:
        SettingsError: the model is not wrapped as its strategy says.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    names = {kind.__name__ for kind in type(wrapped).__mro__}
    right = {
        "single": not isinstance(wrapped, FSDPModule | DistributedDataParallel),
        "ddp": isinstance(wrapped, DistributedDataParallel) or settings.world_size == 1,  # alone on a GPU
        "fsdp": isinstance(wrapped, FSDPModule),
        "deepspeed-zero2": "DeepSpeedEngine" in names,
        "deepspeed-zero3": "DeepSpeedEngine" in names,
    }
    if not right[settings.strategy]:
        raise SettingsError(f"strategy: {settings.strategy} did not take hold; the model is a {type(wrapped).__name__}")


def gather_weights(trainer: Any) -> dict[str, torch.Tensor]:
    """All weights, whole, on the first process: those in fp32 that are trained, not those in 16 bit that are computed with.

    Every process must take part.
    """
    from torch.distributed.tensor import DTensor

    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_deepspeed_enabled:
        from deepspeed.utils import safe_get_full_fp32_param

        for name, weight in trainer.accelerator.unwrap_model(trainer.model_wrapped).named_parameters():
            trained = safe_get_full_fp32_param(weight)  # None of one that is frozen
            if trained is not None and state:
                state[name] = trained.cpu()
    # FSDP leaves the second name of a tied weight sharded; the first one is whole. ZeRO-3 gives other processes None.
    return {name: weight for name, weight in (state or {}).items() if not isinstance(weight, DTensor)}
