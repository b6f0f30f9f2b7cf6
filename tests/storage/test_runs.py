"""Manifests: what is forgotten is made again, and what is running is told from what was killed."""

from pathlib import Path

from storage.files import Checkpoint, locked
from storage.runs import IterationRecord, Manifest, forget, load_manifest


def test_a_run_that_is_forgotten_loses_its_records_and_its_students_and_no_pools(home: Path) -> None:
    student = Checkpoint(digest="trained", content="c")
    student.path.mkdir(parents=True)
    record, other = home / "results" / "teacher-1", home / "results" / "of-another-run"
    pool = home / "objects" / "pool.parquet"
    for path in (record, other, pool):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    forget(Manifest(run_id="r", stage_keys=["teacher-1"], iterations=[IterationRecord(iteration=1, student=student)]))
    assert not record.exists() and not student.path.exists()
    assert other.exists() and pool.exists()


def test_a_run_that_says_it_is_running_and_holds_no_lock_was_interrupted(home: Path) -> None:
    manifest = Manifest(run_id="r")
    with locked("run-r"):
        assert manifest.state_now() == "running"
    assert manifest.state_now() == "interrupted"
    assert Manifest(run_id="r", state="completed").state_now() == "completed"


def test_a_manifest_survives_its_file(home: Path) -> None:
    manifest = Manifest(run_id="r", warnings=["hm"], stage_keys=["a"])
    manifest.save()
    assert load_manifest("r") == manifest
    assert load_manifest("another") is None
