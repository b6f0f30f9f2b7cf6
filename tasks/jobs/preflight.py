"""What a training will need, told before its first step: memory by strategy, time, and what to change if it won't fit.

Estimates, to choose settings by; the rows' own checks are made where they are encoded (`tasks.jobs.dataset`), and the
first batch trained is the largest one, so that memory falls short in the first seconds or not at all.

Knows nothing of the Trainer.
"""

import time
from typing import Any, get_args

import psutil
import torch

from tasks.jobs.dataset import Examples
from tasks.jobs.network import DTYPES
from tasks.jobs.settings import SftSettings

GB = 1e9
ADAM = 12  # bytes a trained parameter: fp32 master weight and AdamW's two moments
HARDWARE_SHARE = 0.5  # of a bare matmul's speed; training reached 0.4 to 0.6 of it (CPU, 106M parameters)


def estimate(
    settings: SftSettings, precision: str, device: torch.device, model: Any, examples: Examples
) -> dict[str, Any]:
    """Memory of one process under each strategy, what its device has, and the time that all epochs will take."""
    config = model.config.get_text_config()
    # ZeRO-3 leaves nothing of a weight here but its number of elements.
    sizes = [(getattr(p, "ds_numel", p.numel()), p) for p in model.parameters()]
    parameters = sum(size for size, _ in sizes)
    counts = {
        "parameters": parameters,
        "trained": sum(size for size, p in sizes if p.requires_grad),
        "held_bytes": sum(size * p.element_size() for size, p in sizes),
    }
    needs = {
        strategy: _bytes_needed(settings, strategy, precision, config, examples, **counts) / GB
        for strategy in get_args(SftSettings.model_fields["strategy"].annotation)
    }
    has = _bytes_there(device, settings) / GB
    needed = needs[settings.strategy]
    fitting = [name for name, need in needs.items() if need < has]
    return {
        "needed_gb_a_process": {name: round(need, 2) for name, need in needs.items()},
        "device_gb_a_process": round(has, 2),
        "advice": None if needed < has else advice(settings, fitting),
        "seconds": round(_seconds(settings, precision, device, parameters, examples)),
    }


def advice(settings: SftSettings, fitting: list[str]) -> str:
    """What would make the training fit into memory, gentlest first."""
    ways = []
    if settings.per_device_train_batch_size > 1:
        ways.append("a smaller per_device_train_batch_size (the same global_batch_size gives the same training)")
    if not settings.gradient_checkpointing:
        ways.append("gradient_checkpointing: true")
    if others := [name for name in fitting if name != settings.strategy]:
        ways.append(f"strategy: {' or '.join(others)}")
    elif settings.strategy in ("single", "ddp"):
        ways.append("strategy: fsdp or deepspeed-zero3 on several devices")
    if settings.offload != "parameters":
        ways.append("deepspeed-zero3 with offload: parameters")
    if settings.peft == "none":
        ways.append("peft: lora")
    return "to make it fit: " + "; ".join([*ways, "a shorter max_length"])


def _bytes_needed(
    settings: SftSettings,
    strategy: str,
    precision: str,
    config: Any,
    examples: Examples,
    parameters: int,
    trained: int,
    held_bytes: int,
) -> float:
    """Weights, gradients, optimizer and the activations of the largest batch, on one device."""
    world = settings.world_size if strategy != "single" else 1
    width = 4 if precision == "fp32" else 2  # bytes of a computed number
    weights, gradients, optimizer = width * parameters, 4 * trained, (ADAM if width == 2 else ADAM - 4) * trained
    if settings.peft == "qlora":
        weights = held_bytes  # some of it in 4 bit, some widened
    if strategy in ("fsdp", "deepspeed-zero2", "deepspeed-zero3"):
        gradients, optimizer = gradients / world, optimizer / world
    if strategy in ("fsdp", "deepspeed-zero3"):  # and one layer whole, while it computes
        weights = weights / world + weights / config.num_hidden_layers
    if settings.offload != "none" and strategy in ("deepspeed-zero2", "deepspeed-zero3"):
        optimizer = gradients = 0
    if settings.offload == "parameters" and strategy in ("fsdp", "deepspeed-zero3"):
        optimizer, gradients, weights = 0, 0, 2 * width * parameters / config.num_hidden_layers

    rows = settings.per_device_train_batch_size
    tokens = rows * int(examples.lengths.max())
    a_layer = 17 * width * tokens * config.hidden_size  # Korthikanti et al. 2022, without the attention matrix
    if settings.peft != "none" and settings.lora_dropout:  # the inputs of the linear layers, dropped out, and what was
        inputs = 6 * config.hidden_size + getattr(config, "intermediate_size", 4 * config.hidden_size)
        a_layer += (width + 1) * tokens * inputs
    kept = width * tokens * config.hidden_size if settings.gradient_checkpointing else a_layer
    logits = (8 + width) * rows * int(examples.labelled.max()) * config.vocab_size
    return weights + gradients + optimizer + config.num_hidden_layers * kept + a_layer + logits


def _bytes_there(device: torch.device, settings: SftSettings) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().available / settings.processes_per_node


def _seconds(settings: SftSettings, precision: str, device: torch.device, parameters: int, examples: Examples) -> float:
    """All epochs: six operations a parameter and token, at half the speed at which this device multiplies matrices."""
    side = 4096 if device.type == "cuda" else 512
    square = torch.ones(side, side, device=device, dtype=DTYPES[precision])
    fastest = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        (square @ square)[0, 0].item()
        fastest = min(fastest, time.perf_counter() - started)
    speed = HARDWARE_SHARE * 2 * side**3 / fastest * settings.world_size
    tokens = float(examples.lengths.sum()) * settings.num_train_epochs
    return (8 if settings.gradient_checkpointing else 6) * parameters * tokens / speed
