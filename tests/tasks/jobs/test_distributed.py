"""What a training finds of those before it, and what it takes its strategy for."""

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from tasks.jobs.distributed import (
    SettingsError,
    choose_device,
    drop_dead_build_locks,
    raise_unless_sharded,
    training_arguments,
)
from tasks.jobs.settings import SftSettings


def test_a_compilation_that_was_killed_keeps_no_later_training_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    now = time.time()
    locks = {name: tmp_path / name / "lock" for name in ("killed", "ours", "at_work")}
    for name, lock in locks.items():
        lock.parent.mkdir()
        lock.touch()
        age = -1 if name == "ours" else 600
        os.utime(lock, (now - age, now - age))
    compiler = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"], cwd=tmp_path / "at_work", stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    with compiler:
        assert compiler.stdout is not None
        compiler.stdout.readline()
        drop_dead_build_locks(began=now)
        compiler.communicate(b"\n")
    assert {name for name, lock in locks.items() if lock.exists()} == {"ours", "at_work"}


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    settings = SftSettings(strategy="ddp", processes_per_node=4)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device(settings) == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        SettingsError, match="4 processes need as many GPUs, and here are 2: set processes_per_node to 2"
    ):
        choose_device(settings)


def test_processes_of_our_own_group_wait_as_long_as_in_accelerates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Made(Exception):
        pass

    def make(*_: str, timeout: timedelta) -> None:
        assert timeout.total_seconds() == TrainingArguments(tmp_path, use_cpu=True).ddp_timeout
        raise Made

    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", make)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    with pytest.raises(Made):
        training_arguments(
            SftSettings(strategy="fsdp", offload="parameters"), tmp_path, torch.device("cuda", 0), "bf16", 0, False
        )


def test_a_strategy_that_did_not_take_hold_is_refused() -> None:
    plain = torch.nn.Linear(1, 1)
    raise_unless_sharded(SftSettings(), plain)
    raise_unless_sharded(SftSettings(strategy="ddp"), plain)  # alone on a GPU it is not wrapped
    for settings in (
        {"strategy": "ddp", "processes_per_node": 2},
        {"strategy": "fsdp"},
        {"strategy": "deepspeed-zero3"},
    ):
        with pytest.raises(SettingsError, match=f"{settings['strategy']} did not take hold; the model is a Linear"):
            raise_unless_sharded(SftSettings(**settings), plain)
