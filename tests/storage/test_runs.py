"""Manifests: what is forgotten is made again, and what is running is told from what was killed."""

import os
import shutil
from pathlib import Path

import pytest

from storage import runs
from storage.files import Checkpoint, StorageError, locked
from storage.gc import collect, forget
from storage.runs import Baseline, IterationRecord, Manifest, list_manifests, load_manifest
from storage.studies import Study
from tests.recorded import evaluation, record_run


def test_a_run_that_is_forgotten_loses_its_records_and_its_students_and_no_pools(home: Path) -> None:
    student = Checkpoint(digest="trained", content="c")
    student.path.mkdir(parents=True)
    gone = Checkpoint(digest="deleted-by-hand", content="c")
    record, other = home / "results" / "teacher-1", home / "results" / "of-another-run"
    pool = home / "objects" / "pool.parquet"
    for path in (record, other, pool):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    made = [IterationRecord(iteration=number, student=one) for number, one in enumerate((gone, student), 1)]
    run = Manifest(run_id="r", stage_keys=["gone-1", "teacher-1"], iterations=made)
    run.save()
    forget(run)
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


def study_of(student: Checkpoint, run_id: str | None = None) -> Study:
    return Study(
        study_id="s",
        student="as it was named",
        checkpoint=student,
        run_id=run_id,
        reference="teacher",
        questions="q",
        rows=1,
    )


def test_a_run_that_is_forgotten_leaves_other_runs_their_models_and_its_own_models_no_answers(home: Path) -> None:
    shared, evaluated, own = student_of("shared"), student_of("evaluated"), student_of("own")
    study_of(evaluated, run_id="r").save()
    Manifest(run_id="other", iterations=[IterationRecord(iteration=1, student=shared)]).save()
    for name, model in (("done", own), ("under-way", own), ("of-another", student_of("another"))):
        (home / "jobs" / name).mkdir(parents=True)
        (home / "jobs" / name / "job.json").write_text(f'{{"model": "{model.path}"}}')
        if name != "under-way":
            (home / "jobs" / name / "result.json").write_text("{}")
    mine = [
        IterationRecord(iteration=number, student=student) for number, student in enumerate((shared, evaluated, own), 1)
    ]
    forget(Manifest(run_id="r", iterations=mine))
    assert shared.path.exists() and evaluated.path.exists() and not own.path.exists()
    assert sorted(path.name for path in (home / "jobs").iterdir()) == ["of-another", "under-way"]


def test_gc_deletes_what_nothing_refers_to_and_nothing_else(home: Path) -> None:
    kept, lost, before = student_of("kept"), student_of("lost"), student_of("made-by-an-earlier-attempt")
    evaluated = student_of("evaluated")
    study_of(evaluated).save()
    (lost.path / "deeper").mkdir()
    (lost.path / "deeper" / "weights").write_bytes(bytes(70))
    done, undone = home / "results" / "teacher-1", home / "results" / "of-no-run"
    for record in (done, undone):
        record.parent.mkdir(exist_ok=True)
        record.write_text("{}")
    iterations = [IterationRecord(iteration=1, student=kept)]
    Manifest(run_id="r", iterations=iterations, earlier=[before], stage_keys=["teacher-1"]).save()
    assert collect(delete=False) == [(lost.path, 70), (undone, 2)]
    assert lost.path.exists() and undone.exists()
    collect(delete=True)
    assert all(path.exists() for path in (kept.path, before.path, evaluated.path, done))
    assert not lost.path.exists() and not undone.exists()


def test_gc_deletes_nothing_while_something_is_being_made(home: Path) -> None:
    lost = student_of("lost")
    with locked("run-r"):
        assert [path for path, _ in collect(delete=False)] == [lost.path], "to look is allowed"
        with pytest.raises(StorageError, match="run-r"):
            collect(delete=True)
    assert lost.path.exists()
    collect(delete=True)
    assert not lost.path.exists()


def test_gc_may_look_while_a_job_takes_its_files_away(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = home / "jobs" / "j" / "trainer" / "checkpoint-1" / "weights"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"1234")
    (home / "jobs" / "j" / "log.txt").write_bytes(b"12")
    lstat = Path.lstat

    def gone_by_then(path: Path) -> os.stat_result:
        if path == file and path.exists():
            shutil.rmtree(file.parent)
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", gone_by_then)
    assert collect(delete=False) == [(home / "jobs" / "j", 2)]


def test_gc_deletes_a_link_and_not_what_it_leads_to(home: Path, tmp_path: Path) -> None:
    elsewhere = student_of("lost").path.rename(tmp_path / "another disk")
    (home / "checkpoints" / "lost").symlink_to(elsewhere)
    collect(delete=True)
    assert elsewhere.is_dir() and not list((home / "checkpoints").iterdir())


def test_the_run_touched_last_comes_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for run_id, at in (("b", "2026-03-01"), ("a", "2026-01-01"), ("c", "2026-02-01"), ("d", "2026-03-01")):
        monkeypatch.setattr(runs, "now", lambda at=at: at)
        Manifest(run_id=run_id).save()
    assert [manifest.run_id for manifest in list_manifests()] == ["d", "b", "c", "a"]


def test_what_a_student_descends_from_leaves_out_what_was_rolled_back_and_what_came_later() -> None:
    records = [IterationRecord(iteration=number, rolled_back=number in {2, 3}) for number in (1, 2, 3, 4)]
    run = Manifest(run_id="r", config={"student": {"init_from": "previous"}}, iterations=records)
    assert [record.iteration for record in run.lineage(4)] == [1, 4]
    assert [record.iteration for record in run.lineage(3)] == [1, 3]
    run.config = {"student": {"init_from": "base"}}
    assert [record.iteration for record in run.lineage(4)] == [4]


def test_the_student_to_use_is_the_last_one_that_was_measured_and_not_rolled_back(home: Path) -> None:
    run = Manifest(run_id="r")
    assert run.best() is None and run.students() == [] and run.evaluations() == {}
    measured, worse = (evaluation(("Lava.", loss, 6.0), ("5", 10.0, 3.0)) for loss in (20.0, 90.0))
    students = [Checkpoint(digest=f"s{number}", content="c") for number in range(4)]
    run.baseline = Baseline(student=students[0])
    assert run.best() == (0, students[0])
    run.iterations = [
        IterationRecord(iteration=1, student=students[1], evaluation=measured),
        IterationRecord(iteration=2, student=students[2], evaluation=worse, rolled_back=True),
        IterationRecord(iteration=3, student=students[3]),
        IterationRecord(iteration=4),
    ]
    assert run.best() == (1, students[1])
    assert run.loss() == measured.loss
    assert run.students() == list(enumerate(students)), "also one that was rolled back can be talked to"
    assert list(run.evaluations()) == [1, 2]
    run.iterations[0].rolled_back = True
    assert run.best() == (0, students[0])
    assert run.loss() is None


def test_a_run_is_whole_while_all_it_made_is_there_and_its_report(home: Path) -> None:
    run = record_run()
    run.baseline.student = run.iterations[0].student = None  # files that only look like checkpoints
    assert not run.is_whole(), "it has no report"
    (run.folder / "report.html").write_text("<p>")
    assert run.is_whole()
    run.iterations[0].snapshots["reviews"].path.write_bytes(b"x")
    assert not run.is_whole()


def test_a_manifest_that_cannot_be_read_is_named_with_the_way_out(home: Path) -> None:
    run = Manifest(run_id="r")
    run.save()
    (run.folder / "manifest.json").write_text("{")
    with pytest.raises(StorageError, match=r"(?s)manifest\.json cannot be read .* Move it away and run again"):
        list_manifests()
