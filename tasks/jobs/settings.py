"""The trainer's settings and how it is launched. Imports no torch: the orchestrating process reads this."""

import os
import sys
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from storage.files import OPERATIONAL


class SftSettings(BaseModel):
    """How a student is fine-tuned. Defaults are the paper's."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    strategy: Literal["single", "ddp", "fsdp", "deepspeed-zero2", "deepspeed-zero3"] = Field(
        "single",
        description="single: one process. ddp: each process holds the model. deepspeed-zero2: each holds the weights and "
        "a share of gradients and optimizer. fsdp, deepspeed-zero3: each holds a share of everything.",
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none",
        description="What waits in the host's memory: nothing, the optimizer (DeepSpeed), or parameters and optimizer "
        "(deepspeed-zero3, fsdp). Slower, and fits larger models.",
    )
    peft: Literal["none", "lora", "qlora"] = Field(
        "none",
        description="lora: train small matrices beside the frozen linear layers. qlora: and hold those in 4 bit (bitsandbytes).",
    )
    lora_rank: int = Field(16, ge=1, le=1024, description="Inner dimension of LoRA's matrices.")
    lora_alpha: int = Field(32, ge=1, le=4096, description="LoRA's update is multiplied by alpha / rank.")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="Share of LoRA's inputs dropped while training.")
    lora_target: str = Field("all-linear", description="Which layers LoRA changes, as peft's target_modules says it.")
    gradient_checkpointing: bool = Field(False, description="Compute activations twice instead of keeping them.")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="Of the computation; the weights that are trained are fp32. auto: what is native here."
    )
    deterministic: bool = Field(
        True,
        description="On a GPU: the same training ends with the same bits, also when it was killed and went on. false: for "
        "a model that has an operation which cannot.",
        json_schema_extra=OPERATIONAL,
    )
    nodes: int = Field(1, ge=1, le=1024, description="Machines. More than one need rdzv_endpoint or hostfile.")
    processes_per_node: int = Field(1, ge=1, le=64, description="Processes on each machine; one a GPU.")
    rdzv_endpoint: str | None = Field(
        None,
        description="host:port where torchrun's agents of several machines meet. The log says what to start on the others.",
        json_schema_extra=OPERATIONAL,
    )
    hostfile: str | None = Field(
        None,
        description="DeepSpeed's list of machines (`host slots=8` a line), which its launcher starts over ssh.",
        json_schema_extra=OPERATIONAL,
    )
    num_train_epochs: float = Field(3.0, gt=0, le=100, description="Passes over the train pool.")
    max_length: int = Field(1024, ge=16, le=131072, description="Tokens of prompt and answer; a longer answer is cut.")
    global_batch_size: int = Field(128, ge=1, le=65536, description="Rows an optimizer step sees, over all devices.")
    per_device_train_batch_size: int = Field(1, ge=1, le=4096, description="Rows computed at once on a device.")
    learning_rate: float = Field(2e-5, gt=0, le=1, description="At its peak.")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="How the learning rate goes on from its peak."
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps in which the rate rises.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    packing: Literal["none", "grouped", "packed"] = Field(
        "grouped",
        description="grouped: rows of like length share a batch, so that little of it is padding. packed: the rows of a "
        "batch end to end in one sequence, none of it padding; refused where the model cannot keep them apart.",
    )
    validation_share: float = Field(
        0.0, ge=0, le=0.5, description="Share of the rows held out of training, for a validation loss at the end."
    )
    save_steps: int = Field(
        100,
        ge=0,
        description="Checkpoint to go on from after a crash, every so many steps and at the last; 0: none.",
        json_schema_extra=OPERATIONAL,
    )
    save_total_limit: int = Field(
        2, ge=1, le=100, description="Such checkpoints kept, the newest.", json_schema_extra=OPERATIONAL
    )
    report_to: tuple[str, ...] = Field(
        (), description="Trackers besides TensorBoard: wandb, mlflow, trackio.", json_schema_extra=OPERATIONAL
    )

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.nodes * self.processes_per_node

    @property
    def accumulation(self) -> int:
        """Batches whose gradients add up to one step."""
        return self.global_batch_size // (self.per_device_train_batch_size * self.world_size)

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's, 0 without DeepSpeed."""
        return {"deepspeed-zero2": 2, "deepspeed-zero3": 3}.get(self.strategy, 0)

    @model_validator(mode="after")
    def _batches_add_up(self) -> "SftSettings":
        at_once = self.per_device_train_batch_size * self.world_size
        if self.global_batch_size % at_once:
            nearest = max(round(self.global_batch_size / at_once), 1) * at_once
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is no multiple of the {at_once} rows that "
                "per_device_train_batch_size x processes_per_node x nodes compute at once; "
                f"change one of them, for example global_batch_size to {nearest}"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "SftSettings":
        if self.strategy == "single" and self.world_size > 1:
            raise ValueError("several processes need another strategy: ddp, fsdp, deepspeed-zero2 or deepspeed-zero3")
        if self.offload == "optimizer" and not self.zero_stage:
            raise ValueError("offload: optimizer needs strategy deepspeed-zero2 or deepspeed-zero3")
        if self.offload == "parameters" and self.strategy not in ("fsdp", "deepspeed-zero3"):
            raise ValueError("offload: parameters needs strategy deepspeed-zero3 or fsdp")
        if self.peft == "qlora" and self.strategy in ("fsdp", "deepspeed-zero3"):
            raise ValueError("peft: qlora holds whole layers in 4 bit, which fsdp and deepspeed-zero3 cannot share out; "
                             "take peft: lora, or strategy single, ddp or deepspeed-zero2")  # fmt: skip
        if self.hostfile and not self.zero_stage:
            raise ValueError("hostfile is for DeepSpeed's launcher; with other strategies give rdzv_endpoint")
        if self.nodes > 1 and not (self.rdzv_endpoint or self.hostfile):
            raise ValueError("several nodes need rdzv_endpoint (host:port of one of them), or for DeepSpeed a hostfile")
        return self


def launcher_command(settings: SftSettings) -> list[str]:
    """What starts the trainer, to be followed by `-m tasks.jobs.sft job.json`.

    Nothing for one process, torchrun for several, DeepSpeed too; DeepSpeed's own launcher where there is a hostfile.
    """
    if settings.strategy == "single":
        return []
    if settings.hostfile:
        # `--no_python` with python as the script lets the `-m` that follows reach python.
        starter = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", settings.hostfile]
        return [*starter, "--no_python", "--no_local_rank", sys.executable]
    meeting = ["--standalone"]
    if settings.nodes > 1:
        meeting = [f"--nnodes={settings.nodes}", "--rdzv_backend=c10d", f"--rdzv_endpoint={settings.rdzv_endpoint}"]
    # Its own logs would be empty folders, one a training, that nobody takes away: what is printed comes to us.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--log_dir", os.devnull]
    return [*torchrun, *meeting, f"--nproc_per_node={settings.processes_per_node}"]
