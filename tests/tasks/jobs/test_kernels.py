"""Each kernel computes what torch computes, in fp32 and in bf16."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from tasks.jobs import kernels
from tasks.jobs.attention import PAGE, Pages, Step, attend_in_torch, attend_on_cpu
from tasks.jobs.kernels import bits, tensor

HEADS, KV_HEADS, SIZE = 6, 2, 16
CLOSE = {torch.float32: {"atol": 1e-5, "rtol": 1e-5}, torch.bfloat16: {"atol": 0.02, "rtol": 0.02}}
dtypes = pytest.mark.parametrize("dtype", list(CLOSE), ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@dtypes
def test_a_sum_is_normed_and_kept(dtype: torch.dtype) -> None:
    stream, change, weight = torch.randn(5, 48), torch.randn(5, 48).to(dtype), torch.randn(48).to(dtype)
    expected = stream + change
    normed = tensor(kernels.add_norm(stream.numpy(), bits(change), bits(weight), 1e-5))
    torch.testing.assert_close(stream, expected)  # it is written there
    rms = functional.rms_norm(expected, (48,), weight.float(), 1e-5)
    torch.testing.assert_close(normed, rms.to(dtype), **CLOSE[dtype])


@dtypes
def test_the_gate_is_silu_times_up(dtype: torch.dtype) -> None:
    both = (torch.randn(5, 96) * 20).to(dtype)
    left, right = both.float().chunk(2, -1)
    torch.testing.assert_close(
        tensor(kernels.gate(bits(both))), (functional.silu(left) * right).to(dtype), **CLOSE[dtype]
    )


@dtypes
def test_heads_turn_by_their_position_and_the_others_stay(dtype: torch.dtype) -> None:
    qkv = torch.randn(3, (HEADS + 2 * KV_HEADS) * SIZE).to(dtype)
    angles = torch.arange(10)[:, None] / 100 ** (torch.arange(SIZE // 2) / SIZE)
    positions = np.array([0, 4, 9], np.int32)
    x, y = qkv.float().view(3, -1, 2, SIZE // 2).unbind(2)
    cos, sin = angles[positions].cos()[:, None], angles[positions].sin()[:, None]
    expected = torch.cat([x * cos - y * sin, y * cos + x * sin], -1)
    expected[:, HEADS + KV_HEADS :] = torch.cat([x, y], -1)[:, HEADS + KV_HEADS :]
    cosines, sines = angles.cos().numpy(), angles.sin().numpy()
    turned = torch.empty_like(qkv)
    kernels.rotate(bits(qkv), HEADS + KV_HEADS, SIZE, positions, cosines, sines, bits(turned))
    torch.testing.assert_close(turned, expected.view(3, -1).to(dtype), **CLOSE[dtype])


def a_step() -> Step:
    """A row of 100 tokens of which 20 come now, three rows of which one comes, and one token that only makes up a tile."""
    cache = Pages(12, 4)
    tables = [cache.take(100), cache.take(70), cache.take(1), cache.take(150)]
    runs = [(0, 20), (20, 21), (21, 22), (22, 23)]
    positions = np.array([*range(80, 100), 69, 0, 130, 0], np.int32)
    pages = np.zeros((24, 3), np.int32)
    for table, (begin, end) in zip(tables, runs):
        pages[begin:end, : len(table)] = table
    return Step(np.zeros(24, np.int32), positions, pages, runs, cache, [])


@dtypes
@pytest.mark.parametrize("window", [0, 30])
@pytest.mark.parametrize("size", [16, 64, 72])
def test_a_query_finds_what_is_in_its_rows_pages_up_to_itself(dtype: torch.dtype, window: int, size: int) -> None:
    step = a_step()
    qkv = torch.randn(24, (HEADS + 2 * KV_HEADS) * size).to(dtype)
    keys, values = (torch.randn(12, KV_HEADS, a, b).to(dtype) for a, b in ((size, PAGE), (PAGE, size)))
    other_keys, other_values = keys.clone(), values.clone()
    query, key, value = qkv.view(24, -1, size).split([HEADS, KV_HEADS, KV_HEADS], 1)
    ours = attend_on_cpu(qkv, keys, values, step, 0.25, window)
    in_torch = attend_in_torch(query * 0.25, key, value, other_keys, other_values, step, window)
    torch.testing.assert_close(ours.view(24, HEADS, size), in_torch, **CLOSE[dtype])
    assert torch.equal(keys[1:], other_keys[1:]) and torch.equal(values[1:], other_values[1:])
    # And by hand, for the last token of the long row.
    i, seen = 22, slice(max(0, 131 - window) if window else 0, 131)
    table = step.pages[i]
    all_keys = torch.cat([keys[page] for page in table], -1)[..., seen].float()
    all_values = torch.cat([values[page] for page in table], 1)[:, seen].float()
    weights = torch.softmax(query[i].float().view(KV_HEADS, -1, size) * 0.25 @ all_keys, -1)
    torch.testing.assert_close(ours[i].float(), (weights @ all_values).flatten(), **CLOSE[dtype])


@dtypes
def test_the_likeliest_is_the_first_of_the_highest(dtype: torch.dtype) -> None:
    logits = torch.randn(4, 1300).to(dtype)
    logits[0, [7, 600, 1299]] = 50
    logits[1, 1299] = 50
    logits[2, :] = -torch.inf
    logits[2, 700] = -3
    assert kernels.likeliest(bits(logits)).tolist() == [7, 1299, 700, int(logits[3].argmax())]


@dtypes
def test_a_token_is_drawn_where_its_chance_falls_in_the_summed_probabilities(dtype: torch.dtype) -> None:
    logits, chances = (torch.randn(400, 1300) * 3).to(dtype), np.random.default_rng(0).random(400)
    sums = torch.softmax(logits.double() / 0.7, -1).cumsum(-1)
    expected = torch.searchsorted(sums, torch.tensor(chances)[:, None] * sums[:, -1:], right=True)[:, 0]
    drawn = torch.from_numpy(kernels.draw(bits(logits), chances, 0.7))
    assert (drawn == expected).float().mean() > 0.99  # rounding decides where a chance falls between two


def test_a_token_without_a_chance_is_never_drawn() -> None:
    logits = torch.full((2, 1300), -torch.inf)
    logits[:, [3, 900]] = 0
    drawn = kernels.draw(logits.numpy(), np.array([0.0, 1 - 1e-16]), 1.0)
    assert drawn.tolist() == [3, 900]


@dtypes
def test_the_loss_is_the_cross_entropy(dtype: torch.dtype) -> None:
    logits, targets = (torch.randn(6, 1300) * 5).to(dtype), torch.randint(0, 1300, (6,))
    ours = torch.from_numpy(kernels.losses(bits(logits), targets.numpy()))
    torch.testing.assert_close(ours, functional.cross_entropy(logits.float(), targets, reduction="none"))


def test_of_logits_that_are_no_numbers_the_loss_is_none_and_a_token_of_the_vocabulary_is_drawn() -> None:
    logits = np.full((3, 1300), np.nan, np.float32)
    assert np.isnan(kernels.losses(logits, np.zeros(3, np.int64))).all()
    for drawn in (kernels.draw(logits, np.array([0.0, 0.5, 0.999]), 1.0), kernels.likeliest(logits)):
        assert all(0 <= token < 1300 for token in drawn)
