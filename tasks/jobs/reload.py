"""Saves a trained model, and reads it back as a stranger would: `python -m tasks.jobs.reload FOLDER ROWS.json HELD`.

Prints the loss that the model in FOLDER has on the encoded rows. The trainer compares it with its own: a model that was
gathered wrongly from several devices is found out before anyone uses it. Under FSDP and ZeRO a fresh process does this,
since in the trainer's own every model that is loaded would be sharded as well.

With a folder `adapter` in FOLDER, the adapter is first merged into its base and the result saved into FOLDER. HELD is
what the base was widened to in training where it was held in 4 bit, else None.

Who trains on one GPU may have little memory beside it: the model is here once, as it is stored, and never whole in fp32.
"""

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tasks.jobs.dataset import padded
from tasks.jobs.quantization import quantized

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_")
PART = 2**24  # elements that are rounded at once


def stored_dtype(model: str) -> torch.dtype:
    """The precision in which a model's weights are stored."""
    dtype = AutoConfig.from_pretrained(model).dtype or "float32"
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def rounded(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight in a type of fewer bits, up or down by chance, so that it is right on average; the same each time.

    An update by less than half of what two numbers of that type are apart would be undone by rounding to the nearest,
    and most updates of a short training are that small (stochastic rounding: Gupta et al. 2015).
    """
    if weight.dtype == dtype:
        return weight.contiguous()
    whole = weight.float().contiguous()
    if dtype == torch.float32:
        return whole
    chance = torch.Generator().manual_seed(zlib.crc32(whole.numpy()))  # no two students lean the same way
    parts = []
    for part in whole.flatten().split(PART):
        near = part.to(dtype)
        missed = part - near.float()
        beyond = torch.nextafter(near, torch.full_like(near, torch.inf).copysign(missed.to(dtype)))
        share = missed / (beyond.float() - near.float())
        parts.append(torch.where(torch.rand(part.shape, generator=chance) < share, beyond, near))
    return torch.cat(parts).view(weight.shape)


def save_model(weights: dict[str, torch.Tensor], like: Any, dtype: torch.dtype, folder: Path) -> None:
    """Save weights as a plain checkpoint in `dtype`, with the config and the generation config of the model `like`."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(like.config, dtype=dtype)
    buffers = dict(skeleton.named_buffers())  # not trained, and of types of their own
    given = {
        name: weight.cpu() if name in buffers else rounded(weight.cpu(), dtype) for name, weight in weights.items()
    }
    skeleton.load_state_dict(given, strict=False, assign=True)
    skeleton.tie_weights()  # a tied weight may have been given by one of its names
    if lost := [name for name, weight in skeleton.named_parameters() if weight.is_meta]:
        raise RuntimeError(f"the trained model lacks the weights {lost}")
    skeleton.generation_config, skeleton.config.use_cache = like.generation_config, True
    skeleton.save_pretrained(folder)


def merge_adapter(folder: Path, held: torch.dtype | None) -> None:
    """Merge `folder/adapter` into the base model that its config names; the result, as the base is stored, into `folder`.

    An adapter to a base held in 4 bit learned to mend what rounding did to it: it is merged into the rounded weights,
    widened again, and not into those of the base.
    """
    from peft import PeftModel

    base = json.loads((folder / "adapter" / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    dtype = stored_dtype(base)
    in_4_bit = quantized("4bit", held, torch.device("cpu")) if held else {}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=held or dtype, **in_4_bit)
    if held:
        model = model.dequantize(held)  # as training widened it
    adapted = PeftModel.from_pretrained(model, str(folder / "adapter"))
    for layers in list(_adapted_layers(adapted)):
        inner = layers[0].get_base_layer().float()
        for layer in layers:
            layer.merge()
        for weight in inner.parameters():
            weight.data = rounded(weight.data, dtype)
    merged = adapted.unload()
    save_model(merged.state_dict(), merged, dtype, folder)


def _adapted_layers(module: nn.Module) -> Iterator[list[Any]]:
    """The layers with an adapter; of experts, whose weights have an adapter each, all that are around one layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for child in module.children():
        if isinstance(child, BaseTunerLayer):
            yield [part for part in child.modules() if isinstance(part, BaseTunerLayer)]
        else:
            yield from _adapted_layers(child)


@torch.no_grad()
def loss_of_saved(folder: Path, rows: list[dict[str, Any]]) -> float:
    """Mean loss a labelled token, by a model just read from disk, computed in the precision in which it is stored."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    AutoTokenizer.from_pretrained(folder)  # it must be there, and readable
    batch = padded(rows)
    names = ("input_ids", "attention_mask", "logits_to_keep", "labels", "shift_labels")
    return model(**{name: batch[name] for name in names}).loss.item()


def loss_in_fresh_process(folder: Path, rows: list[dict[str, Any]], held: torch.dtype | None) -> float:
    """`python -m tasks.jobs.reload`, outside of the launcher's group of processes."""
    file = folder / "trainer" / "rows.json"
    file.write_text(json.dumps([row | {"input_ids": row["input_ids"].tolist()} for row in rows]), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHED)}
    command = [sys.executable, "-m", "tasks.jobs.reload", str(folder), str(file), str(held).removeprefix("torch.")]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"the saved model could not be read back: {' '.join(command)}")
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    if (directory / "adapter").is_dir():
        merge_adapter(directory, getattr(torch, sys.argv[3], None))
    print(loss_of_saved(directory, json.loads(Path(sys.argv[2]).read_bytes())))
