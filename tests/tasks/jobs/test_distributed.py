"""What a training finds of those before it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.jobs.distributed import drop_dead_build_locks


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
