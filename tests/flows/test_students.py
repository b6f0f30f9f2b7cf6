"""A name means one student: the best of a run, that of one of its iterations, the one in a folder."""

from pathlib import Path

import pytest

from flows.students import Student, find_student
from flows.terminal import Refusal
from storage.runs import Manifest
from tasks.models.local import LocalModel
from tasks.prepare import ModelNotFound
from tests.recorded import record_run


@pytest.fixture
def run(home: Path) -> Manifest:
    return record_run("recorded-1", None, "student.model.max_batch_rows=7", "student.system_prompt=Be brief.")


def test_a_run_the_beginning_of_its_id_an_iteration_and_a_folder_name_a_student(
    run: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, trained = (checkpoint for _, checkpoint in run.students())
    names = [None, "recorded-1", "rec", "recorded-1/1", "rec/0", str(start.path)]
    found = [find_student(name) for name in names]
    assert [(student.name, student.iteration) for student in found] == [
        ("recorded-1/1", 1), ("recorded-1/1", 1), ("recorded-1/1", 1), ("recorded-1/1", 1),
        ("recorded-1/0", 0), ("recorded-1/0", 0),
    ]  # fmt: skip
    assert [student.checkpoint for student in found] == [trained] * 4 + [start] * 2
    assert all(student.manifest == run for student in found)
    assert (found[0].model.max_batch_rows, found[0].system_prompt) == (7, "Be brief."), "as its run had it"
    assert Student("from elsewhere", trained).model == LocalModel()
    (tmp_path / "rec").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match=r"rec: no config\.json"):  # a folder comes before a run
        find_student("rec")


def test_the_best_student_is_none_that_was_rolled_back_or_not_evaluated(run: Manifest) -> None:
    run.iterations[0].rolled_back = True
    run.save()
    assert find_student("recorded-1").name == "recorded-1/0"
    assert find_student("recorded-1/1").name == "recorded-1/1", "by its number"
    run.iterations[0].rolled_back, run.iterations[0].evaluation = False, None
    run.save()
    assert find_student(None).name == "recorded-1/0"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("recorded/7", r"recorded-1 has no student of iteration 7\. There are: 0, 1\."),
        ("recorded/best", "an iteration is a number, as in recorded-1/1"),
        ("begun", "begun-1 has no student yet"),
        ("", "leave it out for the best of the last run"),
    ],
)
def test_a_student_that_is_not_there_is_refused_with_those_that_are(run: Manifest, name: str, why: str) -> None:
    Manifest(run_id="begun-1").save()
    with pytest.raises(Refusal, match=why):
        find_student(name)
