"""Cache keys say what is made, and nothing else; records are trusted only while what they point to is whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.states import Failed

from storage.files import Checkpoint, Snapshot, StorageError
from storage.pools import write_snapshot
from tasks.discriminate import DiscriminateConfig, Split, discriminate
from tasks.models.errors import ModelError
from tasks.models.local import LocalModel
from tasks.policies import KernelLocks, WholeResult, identity, may_pass, stage_key, stage_key_of
from tasks.seed import SeedConfig
from tasks.teacher import TeacherConfig


def a_split() -> Split:
    verdicts = write_snapshot("verdicts", [{"instruction_id": "a", "difficulty": "easy"}], step="x", version=1)
    return Split(verdicts=verdicts, hard=0, easy=1, undecided=0, threshold=1.0)


def test_a_key_is_the_same_in_another_process() -> None:
    code = "from tasks.policies import stage_key; print(stage_key('s', 1, ['p'], {'a': {'y': 1, 'x': 2}}))"
    seeded = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=seeded)
    assert done.stdout.strip() == stage_key("s", 1, ["p"], {"a": {"x": 2, "y": 1}})


def test_version_prompt_and_parameters_each_change_the_key() -> None:
    keys = {
        stage_key("s", 1, ["p"], {"a": 1}),
        stage_key("s", 2, ["p"], {"a": 1}),
        stage_key("s", 1, ["q"], {"a": 1}),
        stage_key("s", 1, ["p"], {"a": 2}),
        stage_key("t", 1, ["p"], {"a": 1}),
    }
    assert len(keys) == 5


def test_a_setting_that_changes_only_how_is_in_no_key() -> None:
    assert identity(LocalModel(max_batch_rows=1)) == identity(LocalModel(max_batch_rows=512))
    assert identity(LocalModel(precision="fp32")) != identity(LocalModel(precision="bf16"))
    assert identity(SeedConfig(path="/here")) == identity(SeedConfig(path="/there"))
    assert identity(SeedConfig(heldout="/here")) == identity(SeedConfig(heldout="/there"))
    assert identity(TeacherConfig(license="MIT")) == identity(TeacherConfig()), "no answer is paid for again"


def test_weights_that_the_same_job_made_again_change_no_key() -> None:
    assert identity(Checkpoint(digest="job", content="a")) == identity(Checkpoint(digest="job", content="b"))
    assert identity([Checkpoint(digest="job", content="a")]) != identity([Checkpoint(digest="other", content="a")])


def test_a_stage_is_tried_again_unless_its_input_is_wrong_or_its_requests_were_tried_again_already() -> None:
    errors = (ValueError("wrong"), ModelError("gone"), RuntimeError("killed"))
    assert [may_pass(None, None, Failed(data=error)) for error in errors] == [False, False, True]


def test_an_input_without_an_identity_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot be keyed by a set"):
        identity({1, 2})


def test_a_stage_knows_its_key_without_running() -> None:
    reviews = Snapshot(table="reviews", digest="d", rows=1)
    key = stage_key_of(discriminate, (DiscriminateConfig(), reviews))
    assert key == stage_key_of(discriminate, (DiscriminateConfig(), reviews))
    assert key.startswith("discriminate-")
    assert key != stage_key_of(discriminate, (DiscriminateConfig(threshold=2), reviews))


def test_a_record_loads_while_what_it_points_to_is_whole(home: Path) -> None:
    split = a_split()
    serializer = WholeResult()
    blob = serializer.dumps(split)
    assert serializer.loads(blob) == split
    split.verdicts.path.write_bytes(b"damaged")
    with pytest.raises(StorageError, match="damaged"):
        serializer.loads(blob)
    split.verdicts.path.unlink()
    with pytest.raises(StorageError, match="missing"):
        serializer.loads(blob)


def test_a_record_can_hold_a_failure() -> None:
    assert b"StorageError" in WholeResult().dumps(StorageError("gone"))


def test_a_stage_is_held_by_one_run_at_a_time(home: Path) -> None:
    ours, theirs = KernelLocks(), KernelLocks()
    assert ours.acquire_lock("stage-1", "us")
    assert not theirs.acquire_lock("stage-1", "them", acquire_timeout=0.1)
    assert theirs.is_locked("stage-1")
    ours.release_lock("stage-1", "them")
    assert ours.is_lock_holder("stage-1", "us")
    ours.release_lock("stage-1", "us")
    assert theirs.acquire_lock("stage-1", "them", acquire_timeout=0.1)
