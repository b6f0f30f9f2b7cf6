"""What a GPU computes beside linear layers, in Triton: for a token, or a few of one row, by themselves.

Attention over pages is computed in *pieces*, a few tokens of one row and the heads that share a key, against that row's
pages, one after the other from the first to the last (online softmax; FlashAttention-2, arXiv 2307.08691). So how it
sums up depends on its own row alone. Keys and values lie as in `tasks.jobs.attention`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from tasks.jobs.attention import PAGE

PIECE = 16  # tokens of a run that are computed by one program
HEADS = 8  # computed by one program, at most
FEWEST_ROWS = 16  # of a product on tensor cores
GATED = 1024  # numbers of a token that one program gates
ON_CHIP = 256  # bytes of a head's key, up to which pages are fetched ahead


@triton.jit
def _store(
    key, value, keys, values, tables, positions, width, key_token, key_head, value_token, value_head,
    KV_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Put a token's key and value of one head into its page."""
    token, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + token)
    page = tl.load(tables + token * width + position // PAGE).to(tl.int64)
    block, place = (page * KV_HEADS + head) * SIZE * PAGE, position % PAGE
    along = tl.arange(0, BLOCK)
    inside = along < SIZE
    its_key = tl.load(key + token * key_token + head * key_head + along, mask=inside)
    its_value = tl.load(value + token * value_token + head * value_head + along, mask=inside)
    tl.store(keys + block + along * PAGE + place, its_key, mask=inside)
    tl.store(values + block + place * SIZE + along, its_value, mask=inside)


@triton.jit
def _rotate(
    qkv, cosines, sines, positions, qkv_token,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn one head of a token by its position (RoPE), in place."""
    token, head = tl.program_id(0), tl.program_id(1)
    along = tl.arange(0, BLOCK)
    inside = along < HALF
    at_turn = tl.load(positions + token) * HALF + along
    cos = tl.load(cosines + at_turn, mask=inside)
    sin = tl.load(sines + at_turn, mask=inside)
    at = qkv + token * qkv_token + head * 2 * HALF + along
    left, right = tl.load(at, mask=inside).to(tl.float32), tl.load(at + HALF, mask=inside).to(tl.float32)
    tl.store(at, (left * cos - right * sin).to(qkv.dtype.element_ty), mask=inside)
    tl.store(at + HALF, (right * cos + left * sin).to(qkv.dtype.element_ty), mask=inside)


@triton.jit
def _add_norm(stream, change, weight, normed, epsilon, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Add a token's `change` to `stream` in place; the sum over its root mean square, times the weight."""
    along = tl.arange(0, BLOCK)
    inside = along < SIZE
    at = tl.program_id(0) * SIZE + along
    x = tl.load(stream + at, mask=inside, other=0.0) + tl.load(change + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(stream + at, x, mask=inside)
    scale = 1 / tl.sqrt(tl.sum(x * x, 0) / SIZE + epsilon)
    result = x * scale * tl.load(weight + along, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, result.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _gate(both, gated, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """silu(left) x right of the two halves of a token's numbers, BLOCK of them."""
    along = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = along < SIZE
    at = both + tl.program_id(0) * 2 * SIZE + along
    left = tl.load(at, mask=inside).to(tl.float32)
    result = left * tl.sigmoid(left) * tl.load(at + SIZE, mask=inside).to(tl.float32)
    tl.store(gated + tl.program_id(0) * SIZE + along, result.to(gated.dtype.element_ty), mask=inside)


@triton.jit
def _attend(
    query, keys, values, found, tables, positions, pieces, width, query_token, query_head, found_token,
    scaling, softcap, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, PAGE: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the queries of one piece find, for some heads that share a key. A row of the products is a token's head."""
    begin, count = tl.load(pieces + 2 * tl.program_id(0)), tl.load(pieces + 2 * tl.program_id(0) + 1)
    if count > 0:
        first_head = tl.program_id(1) * HEADS
        row, along, places = tl.arange(0, ROWS), tl.arange(0, BLOCK), tl.arange(0, PAGE)
        token, head = begin + row // HEADS, first_head + row % HEADS
        used, inside = row < count * HEADS, along < SIZE
        at_query = token[:, None] * query_token + head[:, None] * query_head + along[None, :]
        some = tl.load(query + at_query, mask=used[:, None] & inside[None, :], other=0.0)
        position = tl.load(positions + token, mask=used, other=0)
        first_page = 0
        if window > 0:
            first_page = tl.maximum(tl.load(positions + begin) - window + 1, 0) // PAGE
        last = tl.load(positions + begin + count - 1)
        end_page = last // PAGE + 1
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        summed = tl.zeros([ROWS, BLOCK], tl.float32)
        for number in range(first_page, end_page):
            page = tl.load(tables + begin * width + number).to(tl.int64)
            block = (page * KV_HEADS + first_head // GROUP) * SIZE * PAGE
            its_keys = tl.load(keys + block + along[:, None] * PAGE + places[None, :], mask=inside[:, None], other=0.0)
            scores = tl.dot(some, its_keys, input_precision=PRECISION) * scaling
            if SOFTCAP:
                scores = (2 * tl.sigmoid(2 * scores / softcap) - 1) * softcap  # tanh
            back = position[:, None] - (number * PAGE + places[None, :])
            seen = back >= 0
            if window > 0:
                seen = seen & (back < window)
            scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, 1))
            known = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
            weights = tl.exp(scores - known[:, None])
            kept = tl.exp(highest - known)
            # What a former row left behind may be infinite, and 0 x inf is NaN.
            written = number * PAGE + places <= last
            its_values = tl.load(
                values + block + places[:, None] * SIZE + along[None, :],
                mask=written[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            total = total * kept + tl.sum(weights, 1)
            summed = summed * kept[:, None] + tl.dot(
                weights.to(its_values.dtype), its_values, input_precision=PRECISION
            )
            highest = higher
        at_found = token[:, None] * found_token + head[:, None] * SIZE + along[None, :]
        result = summed / total[:, None]
        tl.store(found + at_found, result.to(found.dtype.element_ty), mask=used[:, None] & inside[None, :])


@dataclass(frozen=True)
class Places:
    """Where the tokens of a step belong: int32, on the GPU.

    The tokens of a step are in pieces: one alone, or up to `PIECE` of a run.
    """

    positions: Tensor  # (tokens), of each in its row
    tables: Tensor  # (tokens, most pages of a row), of each token's row
    alone: Tensor  # (tokens, 2): each token, and 1 where it is a run by itself, else 0
    pieces: Tensor  # (pieces, 2): the first token, and how many; 0 where there is no piece


def store(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, places: Places) -> None:
    """Put the tokens' keys and values (both: tokens, kv heads, size) into their pages.

    keys (pages, kv heads, size, PAGE); values (pages, kv heads, PAGE, size).
    """
    key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (key, value))
    tokens, kv_heads, size = key.shape
    _store[tokens, kv_heads](
        key, value, keys, values, places.tables, places.positions, places.tables.stride(0),
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        KV_HEADS=kv_heads, SIZE=size, BLOCK=triton.next_power_of_2(size), PAGE=PAGE,
    )  # fmt: skip


def attend(
    query: Tensor, keys: Tensor, values: Tensor, places: Places, scaling: float, window: int, softcap: float | None
) -> Tensor:
    """What each query (tokens, heads, size) finds in its row's pages up to itself, as much again.

    A window of 0 is none; softcap bounds the scores (Gemma 2, arXiv 2408.00118). A token in no piece finds zeros.

    Raises:
        OutOfResources: not even one head's keys and values fit on this GPU's chip.
    """
    query = query if query.stride(2) == 1 else query.contiguous()
    (tokens, heads, size), kv_heads = query.shape, keys.shape[1]
    group = heads // kv_heads
    found = torch.zeros(tokens, heads, size, dtype=query.dtype, device=query.device)
    for at_once in (n for n in range(min(HEADS, group), 0, -1) if group % n == 0):
        try:
            _attend_by(at_once, query, keys, values, found, places, scaling, window, softcap)
            break
        except OutOfResources:  # told before anything is launched; GPUs of one generation differ by half
            if at_once == 1:
                raise
    return found


def _attend_by(
    at_once: int,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    found: Tensor,
    places: Places,
    scaling: float,
    window: int,
    softcap: float | None,
) -> None:
    """`attend`, with so many heads in one program."""
    (_, heads, size), kv_heads = query.shape, keys.shape[1]
    block = triton.next_power_of_2(max(size, FEWEST_ROWS))
    for pieces, longest in ((places.pieces, PIECE), (places.alone, 1)):
        _attend[len(pieces), heads // at_once](
            query, keys, values, found, places.tables, places.positions, pieces, places.tables.stride(0),
            query.stride(0), query.stride(1), found.stride(0), scaling, softcap or 0.0, window,
            KV_HEADS=kv_heads, GROUP=heads // kv_heads, HEADS=at_once,
            ROWS=max(FEWEST_ROWS, triton.next_power_of_2(longest * at_once)), SIZE=size, BLOCK=block, PAGE=PAGE,
            SOFTCAP=bool(softcap), PRECISION=_precision(query),
            num_stages=2 if block * query.element_size() <= ON_CHIP else 1,
        )  # fmt: skip


def _precision(x: Tensor) -> str:
    """How fp32 is multiplied: in three parts on NVIDIA's tensor cores, to nearly all its digits; else as it is."""
    if not x.is_cuda or torch.version.hip:  # Triton refuses the former for AMD
        return "ieee"
    return "tf32x3" if torch.cuda.get_device_capability(x.device) >= (8, 0) else "ieee"


def rotate(qkv: Tensor, heads: int, size: int, cosines: Tensor, sines: Tensor, positions: Tensor) -> None:
    """Turn the first `heads` heads of each token (tokens, heads x size ...) by its position, in place.

    cosines, sines: (positions, size / 2), fp32.
    """
    block = triton.next_power_of_2(size // 2)
    _rotate[len(qkv), heads](qkv, cosines, sines, positions, qkv.stride(0), HALF=size // 2, BLOCK=block)


def add_norm(stream: Tensor, change: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Add `change` to `stream` (both: tokens, size; the latter fp32) in place; the sum over its root mean square, times
    the weight.
    """
    tokens, size = stream.shape
    normed, block = torch.empty_like(change), triton.next_power_of_2(size)
    _add_norm[(tokens,)](
        stream, change, weight, normed, epsilon, SIZE=size, BLOCK=block, num_warps=8 if block > 1024 else 4
    )
    return normed


def gate(both: Tensor) -> Tensor:
    """silu(left) x right of the two halves of (tokens, 2 x size)."""
    tokens, size = both.shape[0], both.shape[1] // 2
    gated = both.new_empty(tokens, size)
    _gate[tokens, triton.cdiv(size, GATED)](both, gated, SIZE=size, BLOCK=GATED)
    return gated
