"""A student's held-out figures are of the teacher's answers that there are, and of nothing else."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.files import Checkpoint, Snapshot
from storage.pools import by_id, read_lineage, write_snapshot
from storage.runs import Evaluation
from tasks import evaluate
from tasks.evaluate import EvaluationConfig, evaluate_student
from tasks.models.chat import Reply, Request, Status
from tasks.models.local import LocalModel
from tasks.models.ready import ReadyModel

STUDENT = ReadyModel(settings=LocalModel(), checkpoint=Checkpoint(digest="s", content="c"))
TEACHER = {
    "a": ("ok", "It is blue."),
    "b": ("truncated", "用 Python 写一个排序函数"),
    "c": ("empty", ""),
    "d": ("failed", None),
}
Evaluate = Callable[..., tuple[Evaluation, list[Request], list[dict[str, Any]]]]


def teacher_answers() -> Snapshot:
    rows = [
        {"instruction_id": key, "role": "teacher", "model": "t", "status": status, "response": text}
        | {"prompt_tokens": 1, "completion_tokens": 1}
        for key, (status, text) in TEACHER.items()
    ]
    return write_snapshot("responses", rows, step="test", version=1)


@pytest.fixture
def evaluated(home: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """The stage with a student that says, and to which the teacher's words are as likely as, the test wants."""

    def run(said: dict[str, str | None], losses: dict[str, tuple[float | None, int]]) -> Any:
        asked: list[Any] = []

        def infer(model: Any, student: Any, requests: Any, answers: Any, *rest: Any, **more: Any) -> Any:
            asked.extend((requests, answers))
            status = {request.id: Status.FAILED if said[request.id] is None else Status.OK for request in requests}
            return [Reply(request.id, status[request.id], said[request.id]) for request in requests], losses

        monkeypatch.setattr(evaluate, "infer", infer)
        rows = [{"instruction_id": key, "instruction": f"Ask {key}.", "origin": "heldout"} for key in TEACHER]
        heldout = write_snapshot("instructions", rows, step="test", version=1)
        found = evaluate_student.fn(EvaluationConfig(), STUDENT, heldout, teacher_answers(), "Be brief.", 0)
        return found, *asked

    return run


def test_the_loss_is_of_every_token_alike_and_the_score_of_every_answer(evaluated: Evaluate) -> None:
    found, _, _ = evaluated({"a": "It is blue.", "b": "Python"}, {"a": (30.0, 10), "b": (20.0, 40)})
    assert (found.loss, found.score) == (pytest.approx(50 / 50), pytest.approx((10 + 2.8) / 2))
    assert (found.rows, found.scored) == (4, 2)
    rows = by_id(found.details)
    assert [(rows[key]["loss_sum"], rows[key]["tokens"], rows[key]["score"]) for key in "ab"] == [
        (30.0, 10, 10.0), (20.0, 40, 2.8)
    ]  # fmt: skip


def test_the_student_is_asked_what_the_teacher_answered_and_as_in_training(evaluated: Evaluate) -> None:
    found, requests, answers = evaluated({"a": "Hm.", "b": "Hm."}, {"a": (1.0, 1), "b": (1.0, 1)})
    assert by_id(found.details).keys() == {"a", "b"}
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Ask a."}]
    assert [request.id for request in requests] == ["a", "b"] and list(requests[0].messages) == said
    assert answers == [
        {"id": "a", "messages": said, "answer": "It is blue.", "whole": True},
        {"id": "b", "messages": answers[1]["messages"], "answer": "用 Python 写一个排序函数", "whole": False},
    ], "where the teacher was cut its end is not in the loss"


def test_an_answer_that_failed_has_no_score_and_one_that_was_not_scored_no_loss(evaluated: Evaluate) -> None:
    found, _, _ = evaluated({"a": None, "b": "用 Python 写一个排序函数"}, {"a": (30.0, 10), "b": (None, 0)})
    assert (found.loss, found.score, found.scored) == (3.0, 10.0, 1)
    assert found.measured == 1, "what is said of the loss is of one answer"
    rows = by_id(found.details)
    assert [(rows[key]["status"], rows[key]["response"], rows[key]["score"]) for key in "ab"] == [
        ("failed", None, None),
        ("ok", "用 Python 写一个排序函数", 10.0),
    ]


def test_the_figures_know_which_answers_they_were_held_against(evaluated: Evaluate) -> None:
    found, _, _ = evaluated({"a": "Hm.", "b": "Hm."}, {"a": (1.0, 1), "b": (1.0, 1)})
    lineage = read_lineage(found.details)
    assert lineage["step"] == "evaluate" and lineage["inputs"][1] == teacher_answers().digest, "no gain without them"
    assert len(lineage["inputs"]) == 2


@pytest.mark.parametrize("losses", [{"a": (math.nan, 10), "b": (20.0, 40)}, {"a": (None, 0), "b": (None, 0)}])
def test_a_loss_that_is_no_number_is_none(evaluated: Evaluate, losses: dict[str, Any]) -> None:
    assert evaluated({"a": "Hm.", "b": "Hm."}, losses)[0].loss is None
