"""Every strategy with two real processes on the CPU: killed with -9, resumed, saved, read back, and the same curve.

One undisturbed training in a single process is what all of them are held against: the same rows in the same steps.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tasks.jobs.launch import run_job
from tasks.jobs.process import free_port, stop
from tasks.jobs.settings import SftSettings, launcher_command
from tests.tasks.jobs.test_sft import NUMBERS, make_job, train_here, write_rows

pytestmark = pytest.mark.slow

TRAINING: dict[str, Any] = {
    "num_train_epochs": 4,
    "global_batch_size": 12,
    "save_steps": 6,
    "save_total_limit": 1,
    "validation_share": 0.21,
}  # 38 rows: two processes of two rows do not come out even, and three such batches are a step; killed in the second epoch
STRATEGIES = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp", "gradient_checkpointing": True},
    "zero2": {"strategy": "deepspeed-zero2"},
    "zero3": {"strategy": "deepspeed-zero3", "gradient_checkpointing": True},
    "zero3-offload": {"strategy": "deepspeed-zero3", "offload": "parameters"},
    "fsdp-lora": {"strategy": "fsdp", "peft": "lora", "lora_dropout": 0.0},
    "ddp-qlora": {"strategy": "ddp", "peft": "qlora", "lora_dropout": 0.0},
    "zero2-qlora": {"strategy": "deepspeed-zero2", "peft": "qlora", "lora_dropout": 0.0},
}
WRAPPED = {"ddp": "DistributedDataParallel", "fsdp": "FSDP", "deepspeed": "DeepSpeedEngine"}
REFERENCE: dict[str, dict[str, Any]] = {}  # of each kind of peft, trained once


@pytest.fixture
def undisturbed(home: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A training in this process alone, of the same rows in the same steps."""

    def of(peft: str) -> dict[str, Any]:
        if peft not in REFERENCE:
            data = write_rows(*NUMBERS * 2)
            folder = tmp_path_factory.mktemp("undisturbed")
            job = make_job(tiny_model, data, **TRAINING | {"peft": peft, "lora_dropout": 0.0})
            REFERENCE[peft] = train_here(job, folder) | {"weights": load_file(folder / "model.safetensors")}
        return REFERENCE[peft]

    return of


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_killed_training_resumes_and_ends_as_one_process_would(
    name: str, undisturbed: Any, home: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    expected = undisturbed(STRATEGIES[name].get("peft", "none"))
    launched = {"processes_per_node": 2, "per_device_train_batch_size": 2}
    job = make_job(tiny_model, write_rows(*NUMBERS * 2), **TRAINING | launched | STRATEGIES[name])
    launcher = launcher_command(SftSettings(**job["config"]))
    directory = tmp_path / "job"
    kill_after_a_checkpoint(job, launcher, directory, whom=list(STRATEGIES).index(name))
    assert not (directory / "result.json").exists()

    result = run_job("tasks.jobs.sft", job, directory, launcher=launcher)
    assert result["preflight"]["resumed_from"].startswith("checkpoint-")
    assert result["world_size"] == 2
    assert WRAPPED[result["strategy"].split("-")[0]] in result["wrapped_in"]
    assert [step for step, _ in result["loss_by_step"]] == [step for step, _ in expected["loss_by_step"]]
    np.testing.assert_allclose(result["loss_by_step"], expected["loss_by_step"], atol=1e-5)
    assert result["validation_loss"] == pytest.approx(expected["validation_loss"], abs=1e-5)
    assert result["tokens"] == expected["tokens"]
    assert result["reloaded_loss_difference"] < 1e-5  # by a fresh process
    saved = load_file(directory / "model.safetensors")
    assert saved.keys() == expected["weights"].keys()
    for key, weight in saved.items():
        np.testing.assert_allclose(weight, expected["weights"][key], rtol=0, atol=2e-5, err_msg=key)
    assert not (directory / "trainer").exists()
    assert not list(temporary.glob("torchelastic_*")), "each training leaves a folder that nobody takes away"
    if "lora" in name:
        assert (directory / "adapter" / "adapter_model.safetensors").exists()


def test_two_machines_that_share_a_home_train_as_one_process_would(
    undisturbed: Any, home: Path, tiny_model: Path, tmp_path: Path
) -> None:
    expected = undisturbed("none")
    machines = {"strategy": "ddp", "nodes": 2, "rdzv_endpoint": f"127.0.0.1:{free_port()}"}
    job = make_job(tiny_model, write_rows(*NUMBERS * 2), **TRAINING | machines | {"per_device_train_batch_size": 2})
    launcher = launcher_command(SftSettings(**job["config"]))
    directory = tmp_path / "job"
    other = [*launcher, "-m", "tasks.jobs.sft", str(directory / "job.json")]  # as the log says it
    started: list[subprocess.Popen[bytes]] = []

    def start_other(_: Any) -> None:
        started.append(subprocess.Popen(other, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    try:
        result = run_job("tasks.jobs.sft", job, directory, launcher=launcher, on_start=start_other)
        assert started[0].wait(60) == 0
    finally:
        for process in started:
            stop(process)
    assert result["world_size"] == 2
    np.testing.assert_allclose(result["loss_by_step"], expected["loss_by_step"], atol=1e-5)
    assert result["tokens"] == expected["tokens"]


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp", "deepspeed-zero2", "deepspeed-zero3"])
def test_what_little_was_learned_in_16_bit_is_in_the_student(
    strategy: str, home: Path, tiny_model: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    for name, dtype in (("in-16", torch.bfloat16), ("in-32", torch.float32)):  # the same weights
        shutil.copytree(tiny_model, tmp_path / name)
        model.to(dtype).save_pretrained(tmp_path / name)
    settings = {"precision": "bf16", "learning_rate": 2e-5, "num_train_epochs": 2}
    data = write_rows(*NUMBERS * 2)
    whole, student = tmp_path / "whole", tmp_path / "student"
    train_here(make_job(tmp_path / "in-32", data, **settings), whole)
    launched = {"strategy": strategy, "processes_per_node": 1 if strategy == "single" else 2}
    job = make_job(tmp_path / "in-16", data, **settings | launched | {"per_device_train_batch_size": 2})
    result = run_job("tasks.jobs.sft", job, student, launcher=launcher_command(SftSettings(**job["config"])))
    assert any(loss != float(np.float16(loss)) for _, loss in result["loss_by_step"]), "the losses are told in 16 bit"
    base, learned, kept = (load_file(folder / "model.safetensors") for folder in (tmp_path / "in-32", whole, student))
    learned, kept = (torch.cat([(of[key].float() - base[key]).flatten() for key in base]) for of in (learned, kept))
    assert (kept @ learned) / (learned @ learned) == pytest.approx(1, abs=0.1)


def kill_after_a_checkpoint(job: dict[str, Any], launcher: list[str], directory: Path, whom: int) -> None:
    """Start a training and kill the process that asked for it, its launcher or a rank, once a checkpoint is complete.

    All of them must be gone then.
    """
    asked = f"run_job('tasks.jobs.sft', json.loads(sys.argv[1]), Path({str(directory)!r}), launcher={launcher})"
    code = f"import json, sys; from pathlib import Path; from tasks.jobs.launch import run_job; {asked}"
    flow = subprocess.Popen([sys.executable, "-c", code, json.dumps(job)], stderr=subprocess.DEVNULL)
    while not list(directory.glob("trainer/checkpoint-*/complete")):
        time.sleep(0.02)
        assert flow.poll() is None, (directory / "log.txt").read_text()
    below = psutil.Process(flow.pid).children(recursive=True)
    assert len(below) >= 3, "a launcher and two ranks"
    os.kill([flow.pid, *(process.pid for process in below)][whom % 4], signal.SIGKILL)
    assert flow.wait() != 0
    _, alive = psutil.wait_procs(below, timeout=30)
    assert not alive, f"still there: {alive}"
