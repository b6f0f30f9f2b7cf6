"""Keys and values of many rows in pages, and attention over them for one step of an engine.

A step is a flat sequence of tokens of any rows, parts of prompts and single new tokens alike. Each knows its place in its
row and its row's pages, which is all that attention asks: a token's key and value go into its page, its query sees what
lies there up to itself. Rows of any length share the memory; nothing is moved when one ends.

Works with every model that lets its attention be chosen (transformers' `AttentionInterface`): `attend_in_model` is
what such a model calls. In fp32 or bf16 a single token is `kernels.attend`'s, and a run of several tokens of one row
torch's; elsewhere all is torch's. On a GPU a step brings attention of its own (`tasks.jobs.gpu`).
"""

import math
import mmap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers.modeling_utils import AttentionInterface

from tasks.jobs import kernels
from tasks.jobs.kernels import PAGE, Places, bits, tensor

ATTENTION = "lion"  # the name in transformers
PIECE = 128  # positions of a run whose queries are multiplied by the same keys, and by none that come later


class Pages:
    """The cache of one engine's lane. Page 0 is nobody's: tokens that only fill up a step are written there.

    Args:
        count: pages.
        width: how many of them a row has at most.
    """

    def __init__(self, count: int, width: int):
        self.count, self.width = count, width
        self.free = list(range(count - 1, 0, -1))
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, tokens: int) -> list[int]:
        """Pages for a row of so many tokens."""
        return [self.free.pop() for _ in range(pages_for(tokens))]

    def give_back(self, pages: Iterable[int]) -> None:
        self.free += pages

    def of_layer(self, layer: int, kv_heads: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (pages, kv heads, size, PAGE) and values (pages, kv heads, PAGE, size) of a layer, made at first use."""
        if layer not in self._layers:
            keys = _zeros((self.count, kv_heads, size, PAGE), like)
            self._layers[layer] = keys, _zeros((self.count, kv_heads, PAGE, size), like)
        return self._layers[layer]

    def bytes_of_a_token(self) -> int:
        """Of its keys and values in all layers that were computed; a model's layers may differ (Gemma 4)."""
        held = sum(each.nbytes for both in self._layers.values() for each in both)
        return held // (self.count * PAGE)

    def copy(self, source: int, target: int) -> None:
        """One page's keys and values of all layers into another."""
        for keys, values in self._layers.values():
            keys[target], values[target] = keys[source], values[source]


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros, as what no query sees must still be a number (0 x NaN is NaN); on Linux in pages of 2 MB.

    Each step reads all of it, and looking up where a small page lies takes as long as reading it.
    """
    if like.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_zeros(shape)
    memory = mmap.mmap(-1, math.prod(shape) * like.element_size(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


def pages_for(tokens: int) -> int:
    """How many pages hold so many tokens."""
    return -(-tokens // PAGE)


def filled(numbers: Sequence[int], size: int) -> np.ndarray:
    """Numbers as an array of so many, zeros behind them."""
    array = np.zeros(size, np.int32)
    array[: len(numbers)] = numbers
    return array


@dataclass(frozen=True)
class Step:
    """Tokens that go through the network together."""

    tokens: np.ndarray  # (tokens)
    positions: np.ndarray  # (tokens), of each in its row
    pages: np.ndarray  # (tokens, most pages of a row), those of each token's row
    runs: Sequence[tuple[int, int]]  # tokens [begin, end) are of one row, one after the other
    cache: Pages
    wanted: Sequence[int]  # the tokens whose logits are

    @property
    def used(self) -> int:
        """How many tokens are of rows; those behind them only make up a tile, and attend to nothing."""
        return self.runs[-1][1]

    @cached_property
    def alone(self) -> np.ndarray:
        """The tokens that are a run by themselves."""
        return np.array([begin for begin, end in self.runs if end - begin == 1], np.int32)

    @cached_property
    def together(self) -> np.ndarray:
        """The tokens of all other runs."""
        return np.array([i for run in self.long_runs for i in range(run.begin, run.end)], np.int32)

    @cached_property
    def long_runs(self) -> list["Run"]:
        """The runs of several tokens."""
        return [self._run(begin, end) for begin, end in self.runs if end - begin > 1]

    def _run(self, begin: int, end: int) -> "Run":
        pages = self.pages[begin, : pages_for(int(self.positions[end - 1]) + 1)]
        return Run(begin, end, torch.from_numpy(self.positions[begin:end]), pages)


@dataclass(frozen=True)
class Run:
    """Tokens [begin, end) of a step, which are of one row, one after the other."""

    begin: int
    end: int
    positions: Tensor
    pages: np.ndarray  # of the row, up to these tokens
    _pieces: dict[Any, list[tuple[slice, Tensor]]] = field(default_factory=dict)

    def pieces(self, window: int, group: int, dtype: torch.dtype) -> list[tuple[slice, Tensor]]:
        """Tokens of the run that are multiplied by the same keys, and the mask: 0, or -inf where a key is not seen.

        Masks are (group x tokens, keys up to the last of the tokens). Most layers ask for the same.
        """
        if (window, group, dtype) not in self._pieces:
            first, last = int(self.positions[0]), int(self.positions[-1])
            pieces = []
            for begin in range(first // PIECE * PIECE, last + 1, PIECE):
                tokens = slice(max(begin - first, 0), min(begin + PIECE, last + 1) - first)
                positions = self.positions[tokens]
                seen = _seen(positions, pages_for(int(positions[-1]) + 1) * PAGE, window)
                mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)
                pieces.append((tokens, mask.repeat(group, 1)))
            self._pieces[window, group, dtype] = pieces
        return self._pieces[window, group, dtype]


def attend_in_model(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    step: Any,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer; `step` reaches it through the arguments of the model's forward.

    query (1, heads, tokens, size); key and value (1, kv heads, tokens, size); what is found (1, tokens, heads, size). On a
    GPU it is a step that attends by itself (`tasks.jobs.gpu.GpuStep`), elsewhere a `Step`.
    """
    if s_aux is not None:
        raise NotImplementedError(f"{type(module).__name__}: attention with sinks is not supported")
    (heads, tokens, size), kv_heads = query.shape[1:], key.shape[1]
    keys, values = step.cache.of_layer(module.layer_idx, kv_heads, size, key)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, heads or kv heads, size)
    window = sliding_window or 0
    if not isinstance(step, Step):
        output = step.attend(q, k, v, keys, values, scaling, window, softcap)
    elif kernels.can_attend(query.dtype, size) and not softcap:
        qkv = torch.cat([q, k, v], 1).reshape(tokens, -1)
        output = attend_on_cpu(qkv, keys, values, step, scaling, window)
    else:
        output = attend_in_torch(q * scaling, k, v, keys, values, step, window, softcap)
    return output.view(1, tokens, heads, size), None


AttentionInterface.register(ATTENTION, attend_in_model)


def attend_on_cpu(qkv: Tensor, keys: Tensor, values: Tensor, step: Step, scaling: float, window: int) -> Tensor:
    """Put the tokens' keys and values into their pages; what each query finds there (tokens, heads x size).

    Each run is computed by itself, so that what it finds depends on nothing but its own row.
    """
    tokens, places = bits(qkv), Places(bits(keys), bits(values), step.pages, step.positions)
    kernels.store(tokens, step.together, places)
    output = tensor(kernels.attend(tokens, step.alone, places, scaling, window))
    output[step.used :] = 0
    for run in step.long_runs:
        row_keys, row_values = kernels.gather(places.keys, places.values, run.pages)
        query = qkv[run.begin : run.end, : output.shape[1]]
        _attend_run(query, tensor(row_keys), tensor(row_values), run, scaling, window, output[run.begin : run.end])
    return output


def _attend_run(
    query: Tensor, keys: Tensor, values: Tensor, run: Run, scaling: float, window: int, output: Tensor
) -> None:
    """query and output (length, heads x size); keys and values (kv heads, keys, size), of its row."""
    kv_heads, _, size = keys.shape
    group = query.shape[1] // (kv_heads * size)
    for tokens, mask in run.pieces(window, group, query.dtype):
        # (kv heads, group x tokens, size): what shares its keys is multiplied at once
        some = query[tokens].view(-1, kv_heads, group, size).permute(1, 2, 0, 3).reshape(kv_heads, -1, size)
        seen = slice(mask.shape[1])
        found = functional.scaled_dot_product_attention(
            some[None], keys[None, :, seen], values[None, :, seen], attn_mask=mask, scale=scaling
        )
        by_token = found.view(kv_heads, group, -1, size).permute(2, 0, 1, 3)
        output[tokens].view(by_token.shape).copy_(by_token)


def _seen(positions: Tensor, keys: int, window: int) -> Tensor:
    """(..., keys): whether the query at each position sees each key."""
    back = positions[..., None] - torch.arange(keys, device=positions.device)
    return (back >= 0) & (back < (window or keys))


def attend_in_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    step: Step,
    window: int,
    softcap: float | None = None,
) -> Tensor:
    """As `attend_on_cpu`, for any type: (tokens, heads, size).

    query (tokens, heads, size), already scaled; key and value (tokens, kv heads, size); softcap bounds the scores
    (Gemma 2, arXiv 2408.00118).
    """
    pages, positions = torch.from_numpy(step.pages).long(), torch.from_numpy(step.positions).long()
    page, place = pages.gather(1, positions[:, None] // PAGE)[:, 0], positions % PAGE
    keys[page, :, :, place], values[page, :, place] = key, value
    output = torch.zeros_like(query)
    for begin, end in step.runs:
        table = pages[begin, : pages_for(int(step.positions[end - 1]) + 1)]
        run = slice(begin, end)
        output[run] = _attend_row(query[run], keys[table], values[table], positions[run], window, softcap)
    return output


def _attend_row(
    query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, window: int, softcap: float | None
) -> Tensor:
    """query (length, heads, size); keys and values (pages, kv heads, ...); positions (length)."""
    length, heads, size = query.shape
    kv_heads = keys.shape[1]
    keys = keys.permute(1, 2, 0, 3).reshape(kv_heads, size, -1)
    values = values.permute(1, 0, 2, 3).reshape(kv_heads, -1, size)
    seen = _seen(positions, keys.shape[2], window)
    # (kv heads, group x length, size): what shares its keys is multiplied at once
    grouped = query.view(length, kv_heads, -1, size).permute(1, 2, 0, 3).reshape(kv_heads, -1, size)
    scores = (grouped @ keys).view(kv_heads, -1, length, keys.shape[2])
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1, dtype=torch.float32)
    found = weights.to(values.dtype).flatten(1, 2) @ values
    return found.view(kv_heads, -1, length, size).permute(2, 0, 1, 3).reshape(length, heads, size)
