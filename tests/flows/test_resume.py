"""Killed at any moment and started again, a run ends as an undisturbed one; two at once do no work twice."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.lion import COMMAND, arguments, digests, environment, lion, shown

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def start(home: Path, *args: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*COMMAND, *args],
        env=environment(home),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_run_killed_ten_times_ends_as_an_undisturbed_one(tmp_path: Path, tiny_model: Path) -> None:
    command = arguments(tiny_model)
    started = time.monotonic()
    lion(tmp_path / "whole", *command)
    whole = time.monotonic() - started
    rng = random.Random(0)
    for _ in range(10):
        child = start(tmp_path / "killed", *command)
        try:
            # Long enough to come past what is cached, short enough to die in the midst of something.
            child.wait(timeout=rng.uniform(0.1, 0.45) * whole)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            time.sleep(0.5)  # whatever survives its parent survives it here too
            os.killpg(child.pid, signal.SIGKILL)  # the temporary Prefect server does
        child.communicate()
    lion(tmp_path / "killed", *command)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def test_two_runs_at_once_both_end_right_and_do_no_work_twice(tmp_path: Path, tiny_model: Path) -> None:
    home = tmp_path / "home"
    one = arguments(tiny_model, "--set", "iterations=1")
    other = [*one, "--set", "discriminate.threshold=0.2"]
    children = [start(home, *one), start(home, *other)]
    for child in children:
        _, errors = child.communicate(timeout=600)
        assert child.returncode == 0, errors
    checkpoints = list((home / "checkpoints").glob("*/history.jsonl"))
    assert len(checkpoints) == 1, "the same fine-tuning was done twice"
    trained = checkpoints[0].read_text().splitlines()
    assert len(trained) == len({line.split(",")[0] for line in trained}), "a step was trained twice"
    assert shown(home)["state"] == "completed"
