"""Attention over pages on a GPU, in Triton: the tokens of a step, of any rows, at once.

Each program computes a *piece*, a few tokens of one row and the heads that share a key, against that row's pages, one
after the other from the first to the last (online softmax; FlashAttention-2, arXiv 2307.08691). So how it sums up
depends on its own row alone. Keys and values lie as in `tasks.jobs.attention`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tasks.jobs.attention import PAGE

PIECE = 16  # tokens of a run that are computed by one program
HEADS = 8  # computed by one program, at most
FEWEST_ROWS = 16  # of a product on tensor cores
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
        end_page = tl.load(positions + begin + count - 1) // PAGE + 1
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
            its_values = tl.load(
                values + block + places[:, None] * SIZE + along[None, :], mask=inside[None, :], other=0.0
            )
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


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    places: Places,
    scaling: float,
    window: int,
    softcap: float | None,
) -> Tensor:
    """Put the tokens' keys and values into their pages; what each query finds there (tokens, heads, size).

    query (tokens, heads, size); key and value (tokens, kv heads, size); keys (pages, kv heads, size, PAGE); values
    (pages, kv heads, PAGE, size). A window of 0 is none. A token in no piece finds zeros.
    """
    query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
    (tokens, heads, size), kv_heads = query.shape, key.shape[1]
    block, width = triton.next_power_of_2(max(size, FEWEST_ROWS)), places.tables.stride(0)
    shape = {"KV_HEADS": kv_heads, "SIZE": size, "BLOCK": block, "PAGE": PAGE}
    strides = (key.stride(0), key.stride(1), value.stride(0), value.stride(1))
    _store[tokens, kv_heads](key, value, keys, values, places.tables, places.positions, width, *strides, **shape)
    found = torch.zeros(tokens, heads, size, dtype=query.dtype, device=query.device)
    group = heads // kv_heads
    at_once = max(n for n in range(1, HEADS + 1) if group % n == 0)
    for pieces, longest in ((places.alone, 1), (places.pieces, PIECE)):
        _attend[len(pieces), heads // at_once](
            query, keys, values, found, places.tables, places.positions, pieces, width,
            query.stride(0), query.stride(1), found.stride(0), scaling, softcap or 0.0, window, **shape,
            GROUP=group, HEADS=at_once, ROWS=max(FEWEST_ROWS, triton.next_power_of_2(longest * at_once)),
            SOFTCAP=bool(softcap), PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_stages=2 if block * query.element_size() <= ON_CHIP else 1,
        )  # fmt: skip
    return found
