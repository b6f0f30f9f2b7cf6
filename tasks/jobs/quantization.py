"""Weights held in 8 or 4 bit by bitsandbytes: how they are loaded, and products in which no row depends on another.

bitsandbytes multiplies in 8 bit what it rounds row by row, but for the columns in which any row of a batch has an
outlier (LLM.int8, Dettmers et al. 2022): what one row gets depends on the others. Here weights are held in few bits
and widened for each product, so that it is an ordinary one in the computed precision. For the hundreds of tokens of a
step that is what bitsandbytes does with 4 bit, too.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

# On a CPU it warns whoever imports peft of a kernel that is on the Hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

INT8 = 127  # what the largest weight of a row becomes


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


def widened(model: Any) -> Any:
    """A model that was loaded in 4 bit with its weights, as rounded as they are, in fp32."""
    import bitsandbytes

    for layer in model.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            layer.weight.quant_state.dtype = torch.float32  # else they would be rounded once more
    return model.dequantize(torch.float32).float()


def keep_layout(model: nn.Module) -> None:
    """On a CPU bitsandbytes lays 4 bit out anew at the first evaluation, as training cannot read it: it shall not."""
    import bitsandbytes

    for layer in model.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False


class WidenedLinear(nn.Module):
    """A linear layer of bitsandbytes, whose weights are widened for each product."""

    def __init__(self, layer: Any, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features, self.dtype = layer.in_features, layer.out_features, dtype
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._widened().to(x.dtype), self.bias)

    def _widened(self) -> Tensor:
        import bitsandbytes

        if isinstance(self.weight, bitsandbytes.nn.Params4bit):
            return bitsandbytes.functional.dequantize_4bit(self.weight.data, self.weight.quant_state)
        return self.weight.CB.to(self.dtype).mul_(self.weight.SCB[:, None] / INT8)


def widen_at_use(model: nn.Module, dtype: torch.dtype) -> list[WidenedLinear]:
    """Put a `WidenedLinear` in the place of each layer that is held in few bits."""
    import bitsandbytes

    widened = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt):
                widened.append(WidenedLinear(child, dtype))
                setattr(parent, name, widened[-1])
    return widened
