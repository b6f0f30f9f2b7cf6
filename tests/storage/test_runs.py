"""Manifests: what is forgotten is made again, and what is running is told from what was killed."""

from pathlib import Path

import pytest

from storage.files import Checkpoint, StorageError, locked
from storage.gc import collect, forget
from storage.runs import IterationRecord, Manifest, load_manifest


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


def student_of(name: str) -> Checkpoint:
    student = Checkpoint(digest=name, content="c")
    student.path.mkdir(parents=True)
    return student


def test_a_run_that_is_forgotten_leaves_other_runs_their_models_and_its_own_models_no_answers(home: Path) -> None:
    shared, own = student_of("shared"), student_of("own")
    Manifest(run_id="other", iterations=[IterationRecord(iteration=1, student=shared)]).save()
    for name, result in (("done", True), ("under-way", False)):
        (home / "jobs" / name).mkdir(parents=True)
        (home / "jobs" / name / "job.json").write_text(f'{{"model": "{own.path}"}}')
        if result:
            (home / "jobs" / name / "result.json").write_text("{}")
    mine = [IterationRecord(iteration=number, student=student) for number, student in enumerate((shared, own), 1)]
    forget(Manifest(run_id="r", iterations=mine))
    assert shared.path.exists() and not own.path.exists()
    assert [path.name for path in (home / "jobs").iterdir()] == ["under-way"]


def test_gc_deletes_what_nothing_refers_to_and_nothing_else(home: Path) -> None:
    kept, lost, before = student_of("kept"), student_of("lost"), student_of("made-by-an-earlier-attempt")
    Manifest(run_id="r", iterations=[IterationRecord(iteration=1, student=kept)], earlier=[before]).save()
    assert [path for path, _ in collect(delete=False)] == [lost.path]
    assert lost.path.exists()
    collect(delete=True)
    assert kept.path.exists() and before.path.exists() and not lost.path.exists()


def test_gc_deletes_nothing_while_something_is_being_made(home: Path) -> None:
    lost = student_of("lost")
    with locked("run-r"), pytest.raises(StorageError, match="run-r"):
        collect(delete=True)
    assert lost.path.exists()
    collect(delete=True)
    assert not lost.path.exists()


def test_what_a_student_descends_from_leaves_out_what_was_rolled_back_and_what_came_later() -> None:
    records = [IterationRecord(iteration=number, rolled_back=number in {2, 3}) for number in (1, 2, 3, 4)]
    run = Manifest(run_id="r", config={"student": {"init_from": "previous"}}, iterations=records)
    assert [record.iteration for record in run.lineage(4)] == [1, 4]
    assert [record.iteration for record in run.lineage(3)] == [1, 3]
    run.config = {"student": {"init_from": "base"}}
    assert [record.iteration for record in run.lineage(4)] == [4]
