"""What a GPU computes. Without one its kernels run in Triton's interpreter, slowly, and nothing is recorded."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("triton", reason="needs Triton, which there is for Linux")

from triton.backends.amd.compiler import HIPOptions
from triton.backends.nvidia.compiler import CUDAOptions
from triton.runtime.errors import OutOfResources

from tasks.jobs import gpu_kernels
from tasks.jobs.attention import ATTENTION, PAGE, Pages, Step, attend_in_torch
from tasks.jobs.engine import Engine, stream_of_lane
from tasks.jobs.gpu import CACHE_SHARE, DRAWN_BYTES, GpuLlama, GpuNetwork
from tasks.jobs.gpu_kernels import PIECE, Places, attend, store
from tasks.jobs.network import UnsupportedModel
from tasks.jobs.sampling import GPU_ROWS, SORTED_ROWS, Sampling, _draw_in_torch, aligned, draw_tokens
from tests.tasks.jobs.test_engine import (
    GREEDY,
    LAYERS,
    REQUESTS,
    SAMPLED,
    answers,
    largest_error,
    logits_after,
    prompts_of,
    save_random,
)

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")
CLOSE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "window", "softcap", "dtype"),
    [
        (4, 2, 16, 0, None, torch.float32),
        (9, 3, 64, 0, None, torch.float32),
        (4, 2, 20, 70, 0.5, torch.float32),
        (4, 2, 16, 8, None, torch.float32),
        (11, 1, 32, 0, None, torch.float32),
        (16, 1, 32, 0, None, torch.float16),
        pytest.param(9, 3, 64, 0, None, torch.bfloat16, marks=needs_gpu),  # Triton's interpreter does not know it
        pytest.param(32, 8, 128, 0, None, torch.bfloat16, marks=needs_gpu),
        pytest.param(12, 2, 96, 0, None, torch.bfloat16, marks=needs_gpu),
        pytest.param(8, 4, 256, 100, 50.0, torch.bfloat16, marks=needs_gpu),
        pytest.param(16, 2, 512, 0, None, torch.bfloat16, marks=needs_gpu),  # Gemma 4
        pytest.param(8, 4, 256, 0, None, torch.float32, marks=needs_gpu),
    ],
)
def test_a_query_finds_what_is_in_its_rows_pages_up_to_itself(heads, kv_heads, size, window, softcap, dtype) -> None:
    begins_and_lengths = [(0, 40), (5, 1), (130, 1), (64, 20), (0, 2), (63, 1), (64, 1)]
    tokens = sum(length for _, length in begins_and_lengths) + 3  # that only make up a tile
    cache = Pages(1 + 3 * len(begins_and_lengths), 3)
    pages, positions = np.zeros((tokens, 3), np.int32), np.zeros(tokens, np.int32)
    alone, pieces = torch.zeros(tokens, 2, dtype=torch.int32), torch.zeros(tokens // 2, 2, dtype=torch.int32)
    alone[:, 0] = torch.arange(tokens)
    runs, cut, at = [], [], 0
    for begin, length in begins_and_lengths:
        run = slice(at, at + length)
        pages[run], positions[run] = cache.take(3 * PAGE), range(begin, begin + length)
        runs.append((at, at + length))
        alone[at, 1] = int(length == 1)
        cut += [(i, min(PIECE, run.stop - i)) for i in range(at, run.stop, PIECE) if length > 1]
        at = run.stop
    pieces[: len(cut)] = torch.tensor(cut)
    torch.manual_seed(0)
    query = torch.randn(tokens, heads, size).to(dtype)
    key, value = torch.randn(2, tokens, kv_heads, size).to(dtype)
    keys = torch.randn(cache.count, kv_heads, size, PAGE).to(dtype)
    values = torch.randn(cache.count, kv_heads, PAGE, size).to(dtype)
    scaling = size**-0.5

    step = Step(np.zeros(tokens, np.int32), positions, pages, runs, cache, [])
    wide = (x.float() for x in (query.float() * scaling, key, value, keys, values))
    expected = attend_in_torch(*wide, step, window, softcap)
    places = Places(*(torch.as_tensor(x).to(DEVICE) for x in (positions, pages, alone, pieces)))
    query, key, value, keys, values = (x.to(DEVICE) for x in (query, key, value, keys, values))
    store(key, value, keys, values, places)
    found = attend(query, keys, values, places, scaling, window, softcap).cpu().float()

    assert (found - expected).abs().max() < CLOSE[dtype] * expected.abs().max()
    assert not found[at:].any()


def one_row(positions: int, heads: int, kv_heads: int, size: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of a row's last token, in two pages; those of its own are ones."""
    torch.manual_seed(0)
    query = torch.randn(1, heads, size)
    keys, values = torch.randn(3, kv_heads, size, PAGE), torch.ones(3, kv_heads, PAGE, size)
    int32 = {"dtype": torch.int32}
    places = Places(
        torch.tensor([positions - 1], **int32), torch.tensor([[1, 2]], **int32), torch.tensor([[0, 1]], **int32),
        torch.zeros(1, 2, **int32),
    )  # fmt: skip
    places = Places(*(x.to(DEVICE) for x in (places.positions, places.tables, places.alone, places.pieces)))
    return *(x.to(DEVICE) for x in (query, keys, values)), places


def test_what_a_former_row_left_in_a_page_does_no_harm() -> None:
    query, keys, values, places = one_row(PAGE + 9, 4, 2, 16)
    values[2, :, 9:], keys[2, :, :, 9:] = torch.inf, torch.nan
    assert attend(query, keys, values, places, 1.0, 0, None).cpu().numpy() == pytest.approx(1, abs=1e-5)


def test_heads_that_do_not_fit_on_the_chip_together_are_computed_by_more_programs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, keys, values, places = one_row(PAGE + 9, 12, 2, 16)
    values = torch.randn(values.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    expected = attend(query, keys, values, places, 1.0, 0, None)
    kernel, asked = gpu_kernels._attend, []

    class Small:
        most = 2

        def __getitem__(self, grid: tuple[int, int]) -> Any:
            def launch(*arguments: Any, HEADS: int, **others: Any) -> None:
                asked.append(HEADS)
                if self.most < HEADS:
                    raise OutOfResources(163_840, 101_376, "shared memory")
                kernel[grid](*arguments, HEADS=HEADS, **others)

            return launch

    monkeypatch.setattr(gpu_kernels, "_attend", Small())
    assert torch.allclose(attend(query, keys, values, places, 1.0, 0, None), expected, atol=1e-6)
    assert asked == [6, 3, 2, 2]
    monkeypatch.setattr(Small, "most", 0)
    with pytest.raises(OutOfResources):
        attend(query, keys, values, places, 1.0, 0, None)


def test_fp32_is_multiplied_as_triton_can_for_each_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 4))  # an MI300, and nearly an H100
    on_gpu: Any = SimpleNamespace(is_cuda=True, device=None)
    assert gpu_kernels._precision(on_gpu) in CUDAOptions.allowed_dot_input_precisions
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert gpu_kernels._precision(on_gpu) in HIPOptions.allowed_dot_input_precisions


@pytest.mark.slow
def test_kernels_compile_and_fit_on_generations_of_gpus_that_are_not_here(tmp_path: Path) -> None:
    chips = {"80": 163, "86": 99, "89": 99, "90": 227, "100": 227, "120": 99}  # KB that a program may have
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.compiled", *chips]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    for generation, kernels in json.loads(done.stdout).items():
        assert max(kernels.values()) <= chips[generation] * 1024


@pytest.fixture(scope="module", params=["transformers", "written out"])
def on_a_gpu(tiny_model: Path, request: pytest.FixtureRequest) -> Engine:
    """An engine of the tiny model in fp32 that computes as on a GPU."""
    engine = Engine(tiny_model, "fp32")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation=ATTENTION)
    model = model.eval().to(DEVICE)
    compute = GpuLlama(model) if request.param == "written out" else None
    engine.network = GpuNetwork(model, compute) if HAS_GPU else GpuNetwork(model, compute, [32])
    return engine


def test_logits_are_those_of_transformers(tiny_model: Path, on_a_gpu: Engine) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    short, long = prompts_of(on_a_gpu)[-3:-1]
    assert largest_error(on_a_gpu, [short, long[: PAGE + 9]], model) < 1e-4


def test_a_row_answers_the_same_in_any_company(on_a_gpu: Engine) -> None:
    sampling = Sampling(temperature=1.0, top_p=0.9, max_tokens=2, seed=7)
    together = answers(on_a_gpu, REQUESTS[:2], sampling)
    alone = {id: reply for request in REQUESTS[:2] for id, reply in answers(on_a_gpu, [request], sampling).items()}
    assert alone == together


def test_a_model_whose_layers_have_heads_of_other_sizes_is_that_of_transformers(
    tiny_model: Path, tmp_path: Path
) -> None:
    vocabulary = len(AutoTokenizer.from_pretrained(tiny_model))
    config = transformers.Gemma4TextConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, global_head_dim=32, sliding_window=8, hidden_size_per_layer_input=8,
        layer_types=["sliding_attention", "full_attention"], vocab_size_per_layer_input=vocabulary,
        eos_token_id=2, pad_token_id=2, bos_token_id=None,
    )  # fmt: skip
    model = save_random(config, tiny_model, tmp_path)
    engine = Engine(tmp_path, "fp32")
    if not HAS_GPU:
        engine.network = GpuNetwork(engine.network.model, tiles=[32])
    assert largest_error(engine, prompts_of(engine)[:1], model) < 1e-4
    assert engine.network._bytes_of_a_token == 2 * 4 * 2 * (16 + 32)  # key and value, in fp32, of two heads


@pytest.mark.skipif(HAS_GPU, reason="pretends to have one")
class TestPretended:
    """What torch would do on a GPU is said in its place."""

    def test_a_recording_that_fails_leaves_nothing_behind(
        self, on_a_gpu: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        did: list[Any] = []

        @contextmanager
        def graph(*arguments: Any, **_: Any) -> Iterator[None]:
            assert (0, 7) in arguments
            yield
            raise RuntimeError("operation failed due to a previous error during capture")

        stream = SimpleNamespace(device_index=0)
        for name, value in {
            "CUDAGraph": object,
            "current_stream": lambda: stream,
            "graph_pool_handle": lambda: (0, 7),
            "graph": graph,
            "set_stream": did.append,
            "synchronize": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, lambda *given, name=name: did.append((name, *given)), raising=False)
        monkeypatch.setattr(on_a_gpu.network, "_can_record", True)
        together = answers(on_a_gpu, REQUESTS[:1], Sampling(max_tokens=1))
        assert did == [stream, ("_cuda_endAllocateToPool", 0, (0, 7)), ("_cuda_releasePool", 0, (0, 7))]
        assert not on_a_gpu.network._can_record  # once is enough
        assert answers(on_a_gpu, REQUESTS[:1], Sampling(max_tokens=1)) == together

    def test_lanes_have_the_same_streams_each_time(self, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        dealt, taken = iter(range(100)), []
        monkeypatch.setattr(torch.cuda, "Stream", lambda: next(dealt))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: taken.append(stream) or nullcontext())
        stream_of_lane.cache_clear()
        engine = Engine(tiny_model, "fp32")
        engine.on_cpu, engine.lanes, engine.fewest_rows = False, 2, 1
        for _ in range(20):
            answers(engine, REQUESTS[:2], Sampling(max_tokens=1))
        stream_of_lane.cache_clear()
        assert sorted(taken) == [0] * 20 + [1] * 20

    def test_a_step_that_does_not_fit_into_memory_is_not_taken(
        self, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compute = GpuNetwork._by_transformers

        def little_memory(network: GpuNetwork, ids: torch.Tensor, *others: Any) -> torch.Tensor:
            if len(ids) > 32:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return compute(network, ids, *others)

        monkeypatch.setattr(GpuNetwork, "_by_transformers", little_memory)
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation=ATTENTION)
        assert GpuNetwork(model.eval(), tiles=[32, 64]).tiles == [32]

    def test_the_cache_leaves_room_for_what_lanes_compute(
        self, on_a_gpu: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        network: GpuNetwork = on_a_gpu.network
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(network, "tiles", [256, 512, 1024])
        drawn = DRAWN_BYTES * GPU_ROWS * network.config.vocab_size
        for free, step, left in ((100e9, 1e9, 96.5e9 - 2 * drawn), (8e9, 1e9, 4.5e9 - 2 * drawn), (2e9, 1e9, 0)):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (int(free), int(free)))
            monkeypatch.setattr(network, "_largest_step", int(step))
            assert network.tokens_that_fit() == int(CACHE_SHARE * left) // network._bytes_of_a_token

    def test_a_model_whose_heads_do_not_fit_is_refused(self, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def too_large(*_: Any) -> None:
            raise OutOfResources(81_920, 65_536, "shared memory")

        monkeypatch.setattr(gpu_kernels, "attend", too_large)
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation=ATTENTION)
        with pytest.raises(UnsupportedModel, match=r"its heads are too large for this GPU .*Required: 81920"):
            GpuNetwork(model.eval(), tiles=[32])


def test_rows_of_any_vocabulary_begin_where_a_gpu_reads_several_numbers_at_once() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 5001)
    wide = aligned(logits.half())
    assert wide.shape[1] % 4 == 0 and wide.dtype == torch.float32
    assert aligned(logits[:, :5000]).shape[1] == 5000
    for top_p in (1.0, 0.9):
        sampling, chances = Sampling(temperature=1.0, top_p=top_p), [0.0, 0.5, 1.0]
        drawn = _draw_in_torch(wide, chances, sampling).tolist()
        assert drawn == _draw_in_torch(logits.half(), chances, sampling).tolist()
        assert max(drawn) < 5001


def test_rows_are_sorted_a_few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sort, rows = torch.Tensor.sort, []

    def counted(x: torch.Tensor, **how: Any) -> Any:
        rows.append(len(x))
        return sort(x, **how)

    monkeypatch.setattr(torch.Tensor, "sort", counted)
    logits = torch.zeros(3 * SORTED_ROWS - 1, 2000)  # flat, but for a few
    logits[::9, 7] = 50
    chances, sampling = torch.linspace(0, 1, len(logits)).tolist(), Sampling(temperature=1.0, top_p=0.5)
    drawn = draw_tokens(logits.half().to(DEVICE), chances, sampling)
    flat = sum(token != 7 for token in drawn)
    assert rows == ([SORTED_ROWS] * 3 if HAS_GPU else [SORTED_ROWS, SORTED_ROWS, flat - 2 * SORTED_ROWS])
    assert draw_tokens(logits.half()[::9].to(DEVICE), chances[::9], sampling) == [7] * 11  # nothing to sort


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_what_is_recorded_gives_the_same_to_the_last_bit(tiny_model: Path, precision: str) -> None:
    engine = Engine(tiny_model, precision)
    prompts = prompts_of(engine)
    recorded = logits_after(engine, prompts)
    assert engine.network._can_record
    engine.network._can_record = False
    assert torch.equal(logits_after(engine, prompts), recorded)


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_prompt_has_the_same_logits_at_any_place_of_a_step(tiny_model: Path, precision: str) -> None:
    engine = Engine(tiny_model, precision)
    prompt, *others = prompts_of(engine)[:9]
    expected = logits_after(engine, [prompt])[0]
    for before in range(len(others)):
        assert torch.equal(logits_after(engine, [*others[:before], prompt, *others[before:]])[before], expected)


@needs_gpu
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_two_lanes_answer_as_one(tiny_model: Path, sampling: Sampling) -> None:
    engine = Engine(tiny_model, "bf16")
    requests = [{**request, "id": f"{request['id']} {n}"} for n in range(40) for request in REQUESTS]
    engine.lanes = 1
    one = answers(engine, requests, sampling)
    engine.lanes, engine.fewest_rows = 2, 1
    assert all(answers(engine, requests, sampling) == one for _ in range(3))
    assert engine.network._can_record


@needs_gpu
def test_a_recording_that_fails_keeps_no_memory(tiny_model: Path) -> None:
    engine = Engine(tiny_model, "fp32")
    expected, compute = answers(engine, REQUESTS[:3], GREEDY), engine.network._compute

    def looks(*given: Any) -> torch.Tensor:
        logits = compute(*given)
        float(logits[0, 0])  # which no graph can
        return logits

    engine.network._compute = looks
    assert answers(engine, REQUESTS[:3], GREEDY) == expected
    assert not engine.network._can_record
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == before


@needs_gpu
def test_lanes_are_recorded_where_little_memory_is_left(tiny_model: Path) -> None:
    engine = Engine(tiny_model, "fp32")
    torch.cuda.empty_cache()
    held = torch.empty(torch.cuda.mem_get_info()[0] - 2**30, dtype=torch.uint8, device=DEVICE)
    engine.max_batch_tokens, engine.fewest_rows = engine.network.tokens_that_fit(), 1
    assert len(answers(engine, REQUESTS, SAMPLED)) == len(REQUESTS)
    assert engine.network._can_record
    del held


@needs_gpu
def test_a_model_of_experts_is_that_of_transformers(tiny_model: Path, tmp_path: Path) -> None:
    tokens = {"vocab_size": len(AutoTokenizer.from_pretrained(tiny_model)), "eos_token_id": 2, "pad_token_id": 2}
    config = transformers.MixtralConfig(**tokens, **LAYERS, bos_token_id=None, num_local_experts=4)
    model = save_random(config, tiny_model, tmp_path)
    engine = Engine(tmp_path, "fp32")
    assert largest_error(engine, prompts_of(engine)[:4], model) < 1e-3


@needs_gpu
@pytest.mark.parametrize("top_p", [1.0, 0.95])
def test_a_row_draws_the_same_beside_others(top_p: float) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(600, 50_000)).bfloat16().to(DEVICE)
    logits[::7] = 0  # flat
    chances = torch.rand(600).tolist()
    sampling = Sampling(temperature=1.0, top_p=top_p)
    together = draw_tokens(logits, chances, sampling)
    assert [draw_tokens(logits[i : i + 1], chances[i : i + 1], sampling)[0] for i in range(60)] == together[:60]
    assert draw_tokens(logits.flip(0), chances[::-1], sampling)[::-1] == together
