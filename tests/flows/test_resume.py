"""Killed at any moment and started again, a run ends as an undisturbed one; two at once do no work twice."""

import os
import random
import time
from pathlib import Path

import pytest

from tests.lion import arguments, digests, kill_after, lion, processes_of, shown, start

KILLS = int(os.environ.get("LION_TEST_KILLS", "2"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def test_a_run_killed_again_and_again_ends_as_an_undisturbed_one(tmp_path: Path, tiny_model: Path) -> None:
    command = arguments(tiny_model)
    started = time.monotonic()
    lion(tmp_path / "whole", *command)
    whole = time.monotonic() - started
    rng = random.Random(0)
    for _ in range(KILLS):
        # Long enough to come past what is cached, short enough to die in the midst of something.
        kill_after(rng.uniform(0.1, 0.45) * whole, tmp_path / "killed", *command)
    lion(tmp_path / "killed", *command)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert processes_of(tmp_path / "killed") == []


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
