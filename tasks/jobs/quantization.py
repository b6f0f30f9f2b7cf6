"""Models whose linear layers bitsandbytes holds in 8 or 4 bit: how they are loaded and trained on."""

import logging
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

# On a CPU it warns whoever imports peft of a kernel that is on the Hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class NotInstalled(Exception):
    """bitsandbytes is not there, and the settings need it."""


def quantized(quantization: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told so that it holds the linear layers in `8bit` or `4bit`, and computes in `dtype`.

    Raises:
        NotInstalled: bitsandbytes is not there.
    """
    if quantization == "none":
        return {}
    if not is_bitsandbytes_available():
        raise NotInstalled(f"weights in {quantization} need bitsandbytes: pip install 'lion-distill[gpu]'")
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if quantization == "8bit"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    )
    return {"quantization_config": config, "device_map": {"": device}}


def keep_layout(model: nn.Module) -> None:
    """On a CPU bitsandbytes lays 4 bit out anew at the first evaluation, as training cannot read it: it shall not."""
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
