"""Linear layers as an engine computes them: laid out for oneDNN, or held in few bits; a token's result is by itself alone.

bitsandbytes multiplies in 8 bit what it rounds row by row, but for the columns in which any row of a batch has an
outlier (LLM.int8, Dettmers et al. 2022): what one row gets depends on the others. Here weights are held in few bits
and widened for each product, so that it is an ordinary one in the computed precision. For the hundreds of tokens of a
step that is what bitsandbytes does with 4 bit, too.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

TILE = 64  # tokens of a product on a CPU; other numbers are held against it
TILES = tuple(range(16, 257, 16))  # numbers that are tried
INT8 = 127  # what the largest weight of a row becomes

Layer = TypeVar("Layer", bound=nn.Module)


class PackedLinear(nn.Module):
    """Linear layers of one input on a CPU, side by side, laid out once for oneDNN and not again at every call."""

    def __init__(self, *layers: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layers[0].in_features, sum(layer.out_features for layer in layers)
        self.dtype = layers[0].weight.dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat([layer.weight.detach() for layer in layers]))
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class JoinedLinear:
    """Linear layers of one input on a GPU, side by side."""

    def __init__(self, *layers: nn.Linear):
        weights = [layer.weight.detach() for layer in layers]
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        self.bias = torch.cat(biases) if biases else None

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class WidenedLinear(nn.Module):
    """A linear layer of bitsandbytes, whose weights are widened for each product."""

    def __init__(self, dtype: torch.dtype, layer: Any):
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


def pack_linear_layers(model: nn.Module) -> list[PackedLinear]:
    """Put a `PackedLinear` in the place of each linear layer."""
    return _replace(model, {nn.Linear}, PackedLinear)


def widen_at_use(model: nn.Module, dtype: torch.dtype) -> list[WidenedLinear]:
    """Put a `WidenedLinear` in the place of each layer that is held in few bits."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return _replace(model, {Linear4bit, Linear8bitLt}, partial(WidenedLinear, dtype))


def _replace(model: nn.Module, kinds: set[type], make: Callable[[Any], Layer]) -> list[Layer]:
    """Put what `make` makes of it in the place of each layer of these kinds; what was made."""
    made = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in kinds:
                made.append(make(child))
                setattr(parent, name, made[-1])
    return made


@torch.inference_mode()
def alike_tiles(layers: Iterable[PackedLinear | WidenedLinear]) -> list[int]:
    """Of `TILES` those at which every layer gives a token the same as in a `TILE`, to the last bit, wherever it stands.

    A library picks how a product is summed up by its shape alone, and it is not said how; so it is tried out, once for
    each shape, with one thread, as lanes have.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sizes = list(TILES)
    for layer in {(layer.in_features, layer.out_features): layer for layer in layers}.values():
        some = torch.randn(max(TILES), layer.in_features, generator=torch.Generator().manual_seed(0))
        tokens = some.to(layer.dtype)
        expected = torch.cat([layer(part) for part in tokens.split(TILE)])
        for size in list(sizes):
            whole = tokens[: len(tokens) // size * size]
            if not torch.equal(torch.cat([layer(part) for part in whole.split(size)]), expected[: len(whole)]):
                sizes.remove(size)
    torch.set_num_threads(threads)
    return sizes


def can_pack(precision: str) -> bool:
    """Whether oneDNN multiplies in this precision on this CPU."""
    able = {
        "fp32": torch.backends.mkldnn.is_available,
        "bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported,
        "fp16": torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return torch.backends.mkldnn.is_available() and able[precision]()
