"""Teachers: each answers its part, and what one of them answered is not asked again."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from storage.files import Checkpoint, Snapshot
from storage.pools import by_id, write_snapshot
from tasks import student, teacher
from tasks.models.budget import Account
from tasks.models.chat import Reply, Request, Status
from tasks.models.local import LocalModel
from tasks.models.ready import ReadyModel
from tasks.student import StudentConfig, answer_with_student
from tasks.teacher import FurtherTeacher, TeacherConfig, answer_with_teacher

NAMES = ("main", "coder", "third")
MODELS = [ReadyModel(settings=LocalModel(), checkpoint=Checkpoint(digest=name, content="c")) for name in NAMES]
CONFIG = TeacherConfig(
    further=(
        FurtherTeacher(model=LocalModel(), category="coding"),
        FurtherTeacher(model=LocalModel(), share=0.25),
    )
)


def pool(rows: int) -> Snapshot:
    made = [
        {
            "instruction_id": f"r{number}",
            "instruction": f"Say {number}.",
            "category": "coding" if number % 10 == 0 else "math" if number % 2 else None,
            "origin": "seed",
        }
        for number in range(rows)
    ]
    return write_snapshot("instructions", made, step="test", version=1)


@pytest.fixture
def asked(home: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Who was asked how often."""
    count: Counter[str] = Counter()

    def answer(model: ReadyModel, requests: list[Request], sampling: Any, **rest: Any) -> list[Reply]:
        assert model.checkpoint is not None
        count[model.checkpoint.digest] += len(requests)
        return [Reply(request.id, Status.OK, "Yes.", model=model.checkpoint.digest) for request in requests]

    monkeypatch.setattr(teacher, "answer", answer)
    return count


def answers(snapshot: Snapshot, known: tuple[Snapshot, ...] = ()) -> Snapshot:
    account = Account(run_id="r", role="teacher")
    return answer_with_teacher.fn(CONFIG, MODELS, snapshot, known, seed=0, account=account)


def test_each_teacher_answers_its_category_or_its_share(asked: Counter[str]) -> None:
    rows = by_id(answers(pool(1000)))
    assert {row["model"] for key, row in rows.items() if int(key[1:]) % 10 == 0} == {"coder"}
    assert asked["coder"] == 100
    assert 0.2 < asked["third"] / 900 < 0.3
    assert asked.total() == 1000


def test_who_answers_a_row_does_not_depend_on_the_other_rows(asked: Counter[str]) -> None:
    few, many = by_id(answers(pool(20))), by_id(answers(pool(100)))
    assert all(many[key]["model"] == row["model"] for key, row in few.items())


def test_what_is_known_is_not_asked_again(asked: Counter[str]) -> None:
    first = answers(pool(20))
    asked.clear()
    answers(pool(30), (first,))
    assert asked.total() == 10
    lost = [row | ({"status": "failed"} if row["instruction_id"] == "r7" else {}) for row in by_id(first).values()]
    asked.clear()
    answers(pool(30), (write_snapshot("responses", lost, step="test", version=1),))
    assert asked.total() == 11, "one that failed is"


def test_several_teachers_may_share_all_of_it() -> None:
    half = FurtherTeacher(model=LocalModel(), share=0.5)
    assert len(TeacherConfig(further=(half, half)).models) == 3


def test_teacher_and_student_are_asked_in_the_same_words(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"instruction_id": "a", "instruction": "Add.", "input": "1 2", "origin": "seed"}
    seen: list[Request] = []

    def answer(model: ReadyModel, requests: list[Request], *rest: Any, **more: Any) -> list[Reply]:
        seen.extend(requests)
        return [Reply(request.id, Status.TRUNCATED, "3", model="s") for request in requests]

    monkeypatch.setattr(student, "answer", answer)
    pool = write_snapshot("instructions", [row], step="test", version=1)
    (said,) = by_id(answer_with_student.fn(StudentConfig(system_prompt="Be brief."), MODELS[0], pool, 0)).values()
    assert (said["role"], said["status"], said["response"]) == ("student", "truncated", "3")
    request = TeacherConfig(system_prompt="Be brief.", draw=2).request(row)
    assert (request.id, request.draw, request.messages) == ("a", 2, seen[0].messages)
    assert [said["content"] for said in request.messages or ()] == ["Be brief.", "Add.\n\n1 2"]


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ([{"share": 0.5, "category": "math"}], "either a `share` or a `category`"),
        ([{}], "either a `share` or a `category`"),
        ([{"share": 0.6}, {"share": 0.6}], "add up to 1.2"),
        ([{"category": "math"}, {"category": "math"}], "one teacher"),
    ],
)
def test_parts_that_do_not_fit_are_refused(further: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TeacherConfig(further=tuple({"model": {}, **part} for part in further))  # type: ignore[arg-type]
