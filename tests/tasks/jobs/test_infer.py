"""The inference job: what it writes, and that a kill costs nothing but time."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tasks.jobs import infer
from tasks.jobs.engine import Engine
from tasks.jobs.infer import Lines, main, run
from tasks.jobs.launch import run_job
from tasks.jobs.sampling import Sampling
from tests.tiny import TEXTS


def job_in(directory: Path, model: Path, rows: int = 12, max_tokens: int = 30, **changes: Any) -> dict[str, Any]:
    """Write the files of a job and return what its job.json says."""
    directory.mkdir(parents=True, exist_ok=True)
    requests = [{"id": f"r{i}", "messages": [{"role": "user", "content": TEXTS[i]}], "draw": 0} for i in range(rows)]
    (directory / "requests.jsonl").write_text("".join(json.dumps(request) + "\n" for request in requests))
    return {
        "model": str(model),
        "engine": "transformers",
        "precision": "fp32",
        "quantization": "none",
        "max_batch_rows": 4,
        "max_batch_tokens": 65_536,
        "seed": 3,
        "sampling": {"temperature": 0.9, "top_p": 1.0, "max_tokens": max_tokens, "stop": []},
        "requests": "requests.jsonl",
        "score": None,
        **changes,
    }


def lines_of(path: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    assert len({row["id"] for row in rows}) == len(rows), "a row was answered twice"
    return {row["id"]: row for row in rows}


def test_every_request_is_answered_and_every_answer_scored(tmp_path: Path, tiny_model: Path) -> None:
    job = job_in(tmp_path / "job", tiny_model, score="score.jsonl")
    items = [{"id": f"s{i}", "messages": [{"role": "user", "content": "?"}], "answer": TEXTS[i]} for i in range(5)]
    (tmp_path / "job" / "score.jsonl").write_text("".join(json.dumps({**item, "whole": True}) + "\n" for item in items))
    seen: list[dict[str, Any]] = []
    result = run_job("tasks.jobs.infer", job, tmp_path / "job", on_progress=seen.append)
    replies, scores = lines_of(tmp_path / "job" / "replies.jsonl"), lines_of(tmp_path / "job" / "scores.jsonl")
    assert set(replies) == {f"r{i}" for i in range(12)} and set(scores) == {item["id"] for item in items}
    assert result["replies"] == 12 and result["scores"] == 5 and result["precision"] == "fp32"
    assert result["generated_tokens"] == sum(reply["completion_tokens"] for reply in replies.values())
    assert seen[-1]["done"] == seen[-1]["total"] == 17 and "tokens/s" in seen[-1]


def test_three_shards_give_what_one_gives(tmp_path: Path, tiny_model: Path) -> None:
    run(job := job_in(tmp_path / "one", tiny_model), tmp_path / "one")
    requests = (tmp_path / "one" / "requests.jsonl").read_text().splitlines(keepends=True)
    together: dict[str, dict[str, Any]] = {}
    for shard in range(3):
        directory = tmp_path / f"shard{shard}"
        directory.mkdir()
        (directory / "requests.jsonl").write_text("".join(requests[shard::3]))
        run({**job, "max_batch_rows": 64}, directory)
        together |= lines_of(directory / "replies.jsonl")
    assert together == lines_of(tmp_path / "one" / "replies.jsonl")


def test_a_killed_job_goes_on_and_gives_the_same_answers(tmp_path: Path, tiny_model: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for directory in (whole, killed):
        job = job_in(directory, tiny_model, rows=40, max_tokens=120)
        (directory / "job.json").write_text(json.dumps(job))
    replies = killed / "replies.jsonl"
    command = [sys.executable, "-m", "tasks.jobs.infer", str(killed / "job.json")]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (replies.exists() and replies.stat().st_size > 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    with replies.open("ab") as file:
        file.write(b'{"id": "torn", "te')
    answered = replies.read_bytes().count(b"\n")
    assert 0 < answered < 40 and not (killed / "result.json").exists()
    result = run(json.loads((killed / "job.json").read_text()), killed)
    run(json.loads((whole / "job.json").read_text()), whole)
    assert result["replies"] == 40
    assert lines_of(replies) == lines_of(whole / "replies.jsonl")


def test_a_torn_last_line_is_dropped_and_a_whole_one_kept(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"id": "a"}\n{"id": "b", "te')
    lines = Lines(path)
    lines.append([{"id": "c", "text": "one\u2028line"}])
    lines.make_durable()
    assert lines.done == {"a", "c"}
    assert lines_of(path) == {"a": {"id": "a"}, "c": {"id": "c", "text": "one\u2028line"}}


def test_a_second_run_computes_nothing(tmp_path: Path, tiny_model: Path) -> None:
    job = job_in(tmp_path, tiny_model)
    run(job, tmp_path)
    assert run(job, tmp_path)["generated_tokens"] == 0


@pytest.mark.slow
def test_memory_is_flat_over_ten_thousand_prompts(tmp_path: Path, tiny_model: Path) -> None:
    import psutil

    engine = Engine(tiny_model, "fp32")
    requests = [{"id": str(i), "messages": [{"role": "user", "content": TEXTS[i % 200]}]} for i in range(10_000)]
    sizes = []
    for done, _ in enumerate(engine.generate(requests, Sampling(temperature=1.0, max_tokens=16))):
        if done % 10 == 0:
            sizes.append(psutil.Process().memory_info().rss)
    middle = len(sizes) // 2
    # What oneDNN keeps for each shape that it has met levels off; keys and values, kept, would add a
    # third: 1 KB a token.
    assert max(sizes[middle:]) < max(sizes[:middle]) * 1.1


def test_weights_in_few_bits_without_bitsandbytes_are_refused_in_one_line(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.jobs.quantization.is_bitsandbytes_available", lambda: False)
    (tmp_path / "job.json").write_text(json.dumps(job_in(tmp_path, tiny_model, quantization="4bit")))
    with pytest.raises(
        SystemExit, match=r"^refused: weights in 4bit need bitsandbytes: pip install 'lion-distill\[gpu\]'$"
    ):
        main(tmp_path / "job.json")


def test_a_model_that_the_engine_does_not_compute_is_refused_in_one_line(tmp_path: Path, tiny_model: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny_model)
    config.layer_types = ["linear_attention"] * config.num_hidden_layers
    config.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    (tmp_path / "job.json").write_text(json.dumps(job_in(tmp_path, tmp_path)))
    with pytest.raises(SystemExit, match=r"^refused: a model of the type llama .* linear_attention. Have it served"):
        main(tmp_path / "job.json")


def test_memory_that_falls_short_is_told_in_one_line_with_what_would_help(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fall_short(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nSee the documentation")

    monkeypatch.setattr(infer, "Engine", fall_short)
    (tmp_path / "job.json").write_text(json.dumps(job_in(tmp_path, tiny_model)))
    with pytest.raises(SystemExit, match=r"^error: out of memory \(CUDA .* 9 GiB\.\); set max_batch_tokens or"):
        main(tmp_path / "job.json")


def test_answers_as_long_as_the_context_are_refused_in_one_line(tmp_path: Path, tiny_model: Path) -> None:
    job = job_in(tmp_path, tiny_model, max_tokens=512)  # the context
    (tmp_path / "job.json").write_text(json.dumps(job))
    with pytest.raises(SystemExit, match=r"^refused: max_tokens 512 leaves no room .* 512 tokens"):
        main(tmp_path / "job.json")
    assert run(job | {"requests": None}, tmp_path)["replies"] == 0  # where nothing is asked nothing is amiss


def test_two_processes_at_one_job_do_it_once(home: Path, tmp_path: Path, tiny_model: Path) -> None:
    directory = home / "jobs" / "shared"
    job = job_in(directory, tiny_model, rows=30, max_tokens=60)
    started: list[Any] = []
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(run_job, "tasks.jobs.infer", job, directory, on_start=started.append) for _ in range(2)]
        results = [each.result() for each in both]
    assert len(started) == 1 and results[0] == results[1]
    assert len(lines_of(directory / "replies.jsonl")) == 30


@pytest.fixture(scope="module")
def embedded_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tasks.jobs.convert import EMBEDDED, convert

    convert(EMBEDDED, folder := tmp_path_factory.mktemp("embedded"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_embedded_model_answers_the_same_in_any_batch(
    embedded_model: Path, precision: str, temperature: float
) -> None:
    questions = ["What is the capital of Australia?", *TEXTS[::3]]
    requests = [{"id": str(i), "messages": [{"role": "user", "content": text}]} for i, text in enumerate(questions)]
    sampling = Sampling(temperature=temperature, max_tokens=24)
    engine = Engine(embedded_model, precision)
    replies = []
    for lanes, rows, order in ((engine.lanes, 128, requests), (1, 9, requests[::-1])):
        engine.lanes, engine.max_batch_rows = lanes, rows
        replies.append({reply["id"]: reply for batch in engine.generate(order, sampling) for reply in batch})
    assert replies[0] == replies[1]
    assert temperature or "Canberra" in replies[0]["0"]["text"]
