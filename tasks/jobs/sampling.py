"""How the next token is drawn: by a row's own random number, so that its answer is the same in any company."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tasks.jobs import kernels

GPU_ROWS = 256  # drawn at once, never fewer: how a GPU sums up a row depends on the number of rows
SORTED_ROWS = 32  # at once, and on a GPU never fewer: sorting takes ten times the memory that the probabilities do
GPU_READ = 4  # numbers in fp32 that a GPU reads at once
TOP_P_CANDIDATES = 512  # the nucleus is looked for among these; a row that needs more is sorted whole


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn, and when an answer ends."""

    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    max_tokens: int = 1024
    stop: tuple[str, ...] = ()  # texts that end an answer and are left out of it
    seed: int = 0

    def seed_of(self, request: dict[str, Any]) -> str:
        """What a request's random numbers begin with: its own, so that its answer does not depend on when it is asked."""
        return f"{self.seed}/{request['id']}/{request.get('draw', 0)}"


def draw_tokens(logits: Tensor, chances: Sequence[float], sampling: Sampling) -> list[int]:
    """The next token of each row: where its chance, from 0 to 1, falls in the summed probabilities."""
    if logits.device.type == "cpu" and logits.dtype in kernels.DTYPES:
        if sampling.temperature == 0:
            return kernels.likeliest(kernels.bits(logits)).tolist()
        if sampling.top_p >= 1:
            return kernels.draw(kernels.bits(logits), np.array(chances), sampling.temperature).tolist()
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    if logits.device.type == "cpu":
        return _draw_in_torch(logits, chances, sampling).tolist()
    drawn: list[int] = []
    for begin, some in zip(range(0, len(logits), GPU_ROWS), logits.split(GPU_ROWS)):
        those = list(chances[begin : begin + GPU_ROWS])
        missing = GPU_ROWS - len(some)
        filled = aligned(torch.cat([some, some[:1].expand(missing, -1)]))
        drawn += _draw_in_torch(filled, [*those, *those[:1] * missing], sampling).tolist()[: len(some)]
    return drawn


def aligned(logits: Tensor) -> Tensor:
    """In fp32, with tokens that are impossible added until each row begins where a GPU reads several numbers at once.

    Where a row begins elsewhere, torch's softmax sums it up otherwise: vocabularies are not all divisible (GPT-2).
    """
    missing = -logits.shape[1] % GPU_READ
    return functional.pad(logits.float(), (0, missing), value=-torch.inf) if missing else logits.float()


def _draw_in_torch(logits: Tensor, chances: Sequence[float], sampling: Sampling) -> Tensor:
    probabilities = torch.softmax(logits.float() / sampling.temperature, -1)
    uniform = torch.tensor(chances, device=logits.device)[:, None]
    if sampling.top_p >= 1:
        return _invert(probabilities, uniform)
    top, tokens = probabilities.topk(min(TOP_P_CANDIDATES, probabilities.shape[1]))
    drawn = _from_nucleus(top, tokens, uniform, sampling.top_p)
    flat = (top.sum(-1) < sampling.top_p).nonzero()[:, 0]  # rows whose nucleus is larger
    for begin in range(0, len(flat), SORTED_ROWS):
        some = flat[begin : begin + SORTED_ROWS]
        missing = 0 if logits.device.type == "cpu" else SORTED_ROWS - len(some)
        rows = torch.cat([some, some[:1].expand(missing)])
        top, tokens = probabilities[rows].sort(descending=True, stable=True)
        drawn[some] = _from_nucleus(top, tokens, uniform[rows], sampling.top_p)[: len(some)]
    return drawn


def _from_nucleus(top: Tensor, tokens: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """The token drawn for each row, given its probabilities from the highest on and whose they are."""
    before = top.cumsum(-1) - top
    nucleus = top.where(before < top_p, 0)
    return tokens.gather(1, _invert(nucleus, uniform)[:, None])[:, 0]


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The index in each row where the running sum of the weights passes `uniform` of the row's sum."""
    sums = weights.cumsum(-1)
    index = torch.searchsorted(sums, uniform * sums[:, -1:], right=True)[:, 0]
    # A number that rounds up to the whole sum would point behind the last token that has any weight.
    return index.minimum((sums < sums[:, -1:]).sum(-1))
