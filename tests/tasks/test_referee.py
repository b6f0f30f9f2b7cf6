"""Reviews: both orders, asked again when unusable, and never a score that nobody gave."""

import json
from pathlib import Path
from typing import Any

import pytest
from rouge_score.rouge_scorer import RougeScorer

from storage.files import Checkpoint, Snapshot
from storage.pools import read_rows, write_snapshot
from tasks import referee
from tasks.models.budget import Account
from tasks.models.chat import Reply, Request, Status
from tasks.models.local import LocalModel
from tasks.models.ready import ReadyModel
from tasks.referee import LLMReferee, ReferenceReferee, review_responses
from tasks.scores import reference_score

ACCOUNT = Account(run_id="r", role="referee")
MODEL = ReadyModel(settings=LocalModel(), checkpoint=Checkpoint(digest="m", content="c"))


def pool() -> Snapshot:
    return write_snapshot(
        "instructions", [{"instruction_id": "a", "instruction": "Why?", "origin": "seed"}], step="test", version=1
    )


def response(role: str, text: str | None, status: str = "ok") -> Snapshot:
    row = {"instruction_id": "a", "role": role, "model": "m", "status": status, "response": text}
    return write_snapshot("responses", [row | {"prompt_tokens": 1, "completion_tokens": 1}], step="test", version=1)


def review(config: Any, student: Snapshot, teacher: Snapshot | None = None) -> list[dict[str, Any]]:
    teacher = teacher or response("teacher", "Because of gravity.")
    return read_rows(review_responses.fn(config, MODEL, pool(), teacher, student, seed=0, account=ACCOUNT))


def test_the_reference_score_is_rouge_l_on_the_scale_of_the_referee() -> None:
    reference, said = "The quick brown fox jumps over the lazy dog.", "A quick fox jumped over a dog"
    rouge = RougeScorer(["rougeL"], use_stemmer=False).score(reference, said)["rougeL"].fmeasure
    assert reference_score(said, reference) == pytest.approx(1 + 9 * rouge)
    assert reference_score(reference, reference) == 10
    assert reference_score("🦁\n", "🦁") == 10 and reference_score("🐈", "🦁") == 1
    assert reference_score("", reference) == 1


def test_a_reference_review_scores_the_teacher_ten(home: Path) -> None:
    (row,) = review(ReferenceReferee(), response("student", "Because of magic."))
    assert (row["outcome"], row["order"], row["teacher_score"]) == ("ok", "unordered", 10)
    assert row["student_score"] == pytest.approx(1 + 9 * 2 / 3)
    (row,) = review(ReferenceReferee(), response("student", "Python"), response("teacher", "用 Python 写一个排序函数"))
    assert row["student_score"] == pytest.approx(1 + 9 * 2 / 10), "the teacher's script says what a word is"


@pytest.mark.parametrize("status", ["failed", "filtered"])
def test_without_two_answers_there_is_no_score(home: Path, status: str) -> None:
    (row,) = review(ReferenceReferee(), response("student", None, status))
    assert (row["outcome"], row["student_score"]) == ("missing", None)


@pytest.mark.parametrize("nothing", ["", " \n"])
def test_a_teacher_who_said_nothing_is_nothing_to_be_measured_by(home: Path, nothing: str) -> None:
    (row,) = review(ReferenceReferee(), response("student", "Magic."), response("teacher", nothing, "empty"))
    assert (row["outcome"], row["teacher_score"]) == ("missing", None)


def test_an_empty_student_answer_is_the_worst_one_and_not_a_missing_one(home: Path) -> None:
    (row,) = review(ReferenceReferee(), response("student", "", "empty"))
    assert (row["outcome"], row["student_score"]) == ("ok", 1.0)


@pytest.fixture
def judge(home: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A referee that says what the test wants, and counts what it is asked."""

    def install(say: Any) -> list[Request]:
        asked: list[Request] = []

        def answer(model: Any, requests: list[Request], sampling: Any, **rest: Any) -> list[Reply]:
            asked.extend(requests)
            return [Reply(request.id, *say(request)) for request in requests]

        monkeypatch.setattr(referee, "answer", answer)
        return asked

    return install


def scores(first: float, second: float) -> str:
    return json.dumps({"evidence": "seen", "first_score": first, "second_score": second})


def test_scores_follow_the_answers_when_their_order_is_swapped(judge: Any) -> None:
    def say(request: Request) -> tuple[Status, str]:
        text = request.messages[0]["content"]  # type: ignore[index]
        return Status.OK, scores(9, 4) if text.index("gravity") < text.index("Magic") else scores(3, 8)

    asked = judge(say)
    rows = review(LLMReferee(model=LocalModel()), response("student", "Magic."))
    assert [(row["order"], row["teacher_score"], row["student_score"], row["evidence"]) for row in rows] == [
        ("teacher_first", 9, 4, "seen"),
        ("student_first", 8, 3, "seen"),
    ]
    assert all(request.response_schema == referee.REVIEW_SCHEMA for request in asked)


def test_a_row_without_two_answers_is_not_put_to_the_referee(judge: Any) -> None:
    asked, nothing = judge(lambda request: (Status.OK, scores(9, 4))), response("student", None, "failed")
    for student, teacher in ((nothing, None), (response("student", "Magic."), response("teacher", None, "filtered"))):
        rows = review(LLMReferee(model=LocalModel()), student, teacher)
        assert {(row["outcome"], row["teacher_score"]) for row in rows} == {("missing", None)} and len(rows) == 2
    assert asked == []


@pytest.mark.parametrize(
    ("status", "outcome", "asks"),
    [("truncated", "truncated", 2), ("refused", "refused", 2), ("filtered", "refused", 2), ("failed", "failed", 1)],
)
def test_a_review_that_did_not_end_well_gives_no_score(judge: Any, status: str, outcome: str, asks: int) -> None:
    asked = judge(lambda request: (Status(status), scores(9, 4) + " But then again"))
    rows = review(LLMReferee(model=LocalModel(), max_asks=2), response("student", "Magic."))
    assert {(row["outcome"], row["teacher_score"], row["student_score"]) for row in rows} == {(outcome, None, None)}
    assert len(asked) == 2 * asks, "a failed request was tried again already"


def test_an_unusable_review_is_asked_again_as_a_new_draw(judge: Any) -> None:
    asked = judge(lambda request: (Status.OK, "hm" if request.draw == 0 else scores(8, 7)))
    rows = review(LLMReferee(model=LocalModel()), response("student", "Magic."))
    assert [row["outcome"] for row in rows] == ["ok", "ok"]
    assert [request.draw for request in asked] == [0, 0, 1, 1]


def test_a_review_that_stays_unusable_has_an_outcome_and_no_score(judge: Any) -> None:
    asked = judge(lambda request: (Status.OK, "-1 100"))
    rows = review(LLMReferee(model=LocalModel(), max_asks=2), response("student", "Magic."))
    assert [(row["outcome"], row["teacher_score"]) for row in rows] == [("unparsable", None)] * 2
    assert len(asked) == 4


@pytest.mark.parametrize(("first", "outcome"), [(0, "out_of_range"), (11, "out_of_range"), (-1, "out_of_range")])
def test_a_score_outside_one_to_ten_is_never_a_score(judge: Any, first: float, outcome: str) -> None:
    judge(lambda request: (Status.OK, scores(first, 5)))
    rows = review(LLMReferee(model=LocalModel(), max_asks=1), response("student", "Magic."))
    assert {(row["outcome"], row["teacher_score"], row["student_score"]) for row in rows} == {(outcome, None, None)}


def test_votes_are_asked_for_as_draws_of_their_own(judge: Any) -> None:
    asked = judge(lambda request: (Status.OK, "hm" if request.draw < 3 else scores(8, 7)))
    config = LLMReferee(model=LocalModel(), votes=3)
    rows = review(config, response("student", "Magic."))
    assert len(rows) == config.reviews_per_row == 6
    assert {row["outcome"] for row in rows} == {"ok"}
    assert sorted(request.draw for request in asked) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5], "none is another's again"


def test_the_reference_score_reads_every_script() -> None:
    assert reference_score("Потому что свет рассеивается", "Потому что свет рассеивается") == 10
    assert reference_score("因为光的散射", "因为光的散射") == 10
    assert 1 < reference_score("Python это плохо, очень", "Python это хорошо") < 10
    assert reference_score("It is blue.", "Потому что свет рассеивается") == 1
