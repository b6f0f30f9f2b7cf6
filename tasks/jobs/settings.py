"""The trainer's settings and how it is launched. Imports no torch: the orchestrating process reads this."""

import sys
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class SftSettings(BaseModel):
    """How a student is fine-tuned. Defaults are the paper's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    strategy: Literal["single", "ddp", "fsdp"] = Field(
        "single", description="single: one process. ddp, fsdp: one process a device, under torchrun."
    )
    processes_per_node: int = Field(1, ge=1, le=64, description="Processes on this machine; one a GPU.")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="Of the computation; the weights that are trained are fp32. auto: what is native here."
    )
    gradient_checkpointing: bool = Field(False, description="Compute activations twice instead of keeping them.")
    num_train_epochs: float = Field(3.0, gt=0, le=100, description="Passes over the train pool.")
    max_length: int = Field(1024, ge=16, le=131072, description="Tokens of prompt and answer; a longer answer is cut.")
    global_batch_size: int = Field(128, ge=1, le=65536, description="Rows an optimizer step sees, over all devices.")
    per_device_train_batch_size: int = Field(1, ge=1, le=4096, description="Rows computed at once on a device.")
    learning_rate: float = Field(2e-5, gt=0, le=1, description="At its peak.")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="How the learning rate goes on from its peak."
    )
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="Share of the steps in which the rate rises.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    packing: Literal["none", "grouped"] = Field(
        "grouped", description="grouped: rows of like length share a batch, so that little of it is padding."
    )
    save_steps: int = Field(
        0, ge=0, description="Checkpoint to go on from after a crash, every so many steps; 0: none."
    )
    report_to: tuple[str, ...] = Field(
        (), description="Trackers besides TensorBoard: wandb, mlflow, trackio.", json_schema_extra={"operational": True}
    )

    @property
    def accumulation(self) -> int:
        """Batches whose gradients add up to one step."""
        return self.global_batch_size // (self.per_device_train_batch_size * self.processes_per_node)

    @model_validator(mode="after")
    def _batches_add_up(self) -> "SftSettings":
        at_once = self.per_device_train_batch_size * self.processes_per_node
        if self.global_batch_size % at_once:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is no multiple of the {at_once} rows that "
                "per_device_train_batch_size x processes_per_node compute at once; change one of them"
            )
        if self.strategy == "single" and self.processes_per_node > 1:
            raise ValueError("several processes need `strategy: ddp` or `strategy: fsdp`")
        return self


def launcher_command(settings: SftSettings) -> list[str]:
    """What starts the trainer: this python, or torchrun with one process a device."""
    if settings.strategy == "single":
        return [sys.executable]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={settings.processes_per_node}",
    ]
