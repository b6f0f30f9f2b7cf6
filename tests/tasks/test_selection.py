"""Who goes on and when the loop ends, on evaluations whose figures are known."""

import math
from pathlib import Path
from typing import Any

import pytest

from storage.files import Checkpoint
from storage.pools import read_rows, write_snapshot
from storage.runs import Baseline, Comparison, Evaluation, Interval, IterationRecord, Manifest
from tasks.selection import (
    Measure,
    StopConfig,
    compare,
    gain_in,
    is_stalled,
    is_worse,
    loss_per_token,
    mean_score,
    told,
)


def evaluation(losses: dict[str, float], scores: dict[str, float | None], loss: float | None = None) -> Evaluation:
    rows: list[dict[str, Any]] = [
        {"instruction_id": key, "status": "ok", "loss_sum": losses[key], "tokens": 10, "score": scores[key]}
        for key in losses
    ]
    details = write_snapshot("evaluations", rows, step="test", version=1)
    known = [score for score in scores.values() if score is not None]
    score = sum(known) / len(known) if known else None
    return Evaluation(loss=loss, score=score, rows=len(rows), scored=len(known), details=details)


def test_gains_are_paired_by_question(home: Path) -> None:
    before = evaluation({"a": 30.0, "b": 20.0, "c": 10.0}, {"a": 1.0, "b": 2.0, "c": None})
    after = evaluation({"c": 10.0, "b": 10.0, "a": 20.0}, {"c": 9.0, "b": 4.0, "a": 5.0})
    found = compare(after, before, against=0, seed=0)
    assert found.loss_gain and found.loss_gain.value == pytest.approx(20 / 30)
    assert found.score_gain and found.score_gain.value == pytest.approx((4 + 2) / 2)
    assert (found.score_gain.low, found.score_gain.high) == (2, 4)
    assert found.relative and found.relative.value == pytest.approx(18 / 30)


def test_a_row_that_could_not_be_measured_counts_in_no_figure(home: Path) -> None:
    before, after = (evaluation({"a": loss, "b": 10.0}, {"a": 2.0, "b": None}) for loss in (30.0, 20.0))

    def unmeasured(whole: Evaluation) -> Evaluation:
        beside = {"instruction_id": "c", "status": "failed", "loss_sum": None, "tokens": 0, "score": None}
        details = write_snapshot("evaluations", [*read_rows(whole.details), beside], step="test", version=1)
        return whole.model_copy(update={"details": details})

    assert compare(unmeasured(after), unmeasured(before), 0, seed=0) == compare(after, before, 0, seed=0)
    assert loss_per_token(unmeasured(after)) == loss_per_token(after)


def test_students_held_against_other_answers_have_no_gain_over_each_other(home: Path) -> None:
    measured = evaluation({"a": 30.0}, {"a": 1.0})
    rows = [row | {"response": "Another teacher's."} for row in read_rows(measured.details)]
    other = write_snapshot("evaluations", rows, step="test", version=1, inputs=[measured.details])
    found = compare(measured.model_copy(update={"details": other}), measured, against=0, seed=0)
    assert (found.loss_gain, found.score_gain) == (None, None)
    assert found.relative and found.relative.value == pytest.approx(0.1)


def test_loss_and_score_of_a_student_have_intervals(home: Path) -> None:
    measured = evaluation({"a": 30.0, "b": 20.0, "c": 10.0}, {"a": 1.0, "b": 2.0, "c": None})
    loss, score = loss_per_token(measured), mean_score(measured)
    assert loss and score
    assert (loss.value, loss.low, loss.high) == pytest.approx((2, 1, 3))
    assert (score.value, score.low, score.high) == pytest.approx((1.5, 1, 2))
    assert loss_per_token(evaluation({"a": math.nan}, {"a": 1.0})) is None


def test_a_referees_word_on_the_held_out_answers_is_the_relative_score(home: Path) -> None:
    measured = evaluation({"a": 30.0, "b": 20.0}, {"a": 1.0, "b": 2.0})
    given = {"a": (("teacher_first", 8, 4), ("student_first", 8, 6)), "b": (("teacher_first", 2, 6), ("student_first", 2, 4))}  # fmt: skip
    rows = [
        {
            "instruction_id": key,
            "order": order,
            "vote": 0,
            "outcome": "ok",
            "teacher_score": teacher,
            "student_score": own,
        }
        for key, reviews in given.items()
        for order, teacher, own in reviews
    ]
    judged = measured.model_copy(update={"reviews": write_snapshot("reviews", rows, step="test", version=1)})
    found = compare(judged, measured, against=0, seed=0)
    assert found.relative and found.relative.value == pytest.approx((10 / 10 + 10 / 10) / 2)
    relative = compare(measured, judged, against=0, seed=0).relative
    assert relative and relative.value == pytest.approx(3 / 20), "without a review the metric's"


def worse(now: Evaluation, before: Evaluation, measure: Measure) -> bool:
    return is_worse(now, before, measure, gain_in(compare(now, before, against=0, seed=0), measure))


def test_a_student_whose_loss_is_no_number_is_worse_and_has_no_gain(home: Path) -> None:
    before = evaluation({"a": 30.0}, {"a": 2.0}, loss=3.0)
    broken = evaluation({"a": math.nan}, {"a": 1.0}, loss=None)
    assert worse(broken, before, "loss")
    assert not worse(before, broken, "loss")
    assert compare(broken, before, against=0, seed=0).loss_gain is None
    whole, partly = (evaluation({"a": loss, "b": 10.0}, {"a": 2.0, "b": 2.0}) for loss in (30.0, math.nan))
    assert compare(partly, whole, against=0, seed=0).loss_gain is None


def test_lower_loss_and_higher_score_are_better(home: Path) -> None:
    good = evaluation({"a": 1.0}, {"a": 5.0}, loss=1.0)
    bad = evaluation({"a": 2.0}, {"a": 4.0}, loss=2.0)
    measures: list[Measure] = ["loss", "score"]
    for measure in measures:
        assert worse(bad, good, measure) and not worse(good, bad, measure)
        assert not worse(good, good, measure)


def test_a_student_that_answers_more_is_not_rolled_back_for_what_it_adds(home: Path) -> None:
    from flows.config import resolve
    from flows.distill import Run

    losses = dict.fromkeys("abc", 10.0)
    before, now = evaluation(losses, {"a": 9, "b": 9, "c": None}), evaluation(losses, {"a": 9.5, "b": 9.5, "c": 2})
    run = Run(resolve("smoke", ["stop.measure=score"]), Manifest(run_id="r"))
    run.standing = Baseline(evaluation=before, student=Checkpoint(digest="start", content=""))
    record = IterationRecord(iteration=1, evaluation=now, student=Checkpoint(digest="new", content=""))
    assert run._standing_student(record) == record.student
    assert record.comparison and told(record.comparison.score_gain, "score").startswith("gain in score: +0.500")


def gains(*lows: float | None) -> list[Comparison]:
    return [
        Comparison(
            against=0,
            relative=None,
            score_gain=None,
            loss_gain=None if low is None else Interval(value=low + 0.1, low=low, high=low + 0.2),
        )
        for low in lows
    ]


@pytest.mark.parametrize(
    ("lows", "stalled"),
    [((-0.1,), False), ((0.1, 0.1), False), ((0.1, -0.1), False), ((-0.1, -0.1), True), ((-0.1, -0.1, 0.1), False), ((0.1, 0.0, None), True)],
)  # fmt: skip
def test_the_loop_ends_after_patience_iterations_without_a_sure_gain(lows: tuple[Any, ...], stalled: bool) -> None:
    assert is_stalled(StopConfig(patience=2), gains(*lows)) is stalled


def test_without_patience_it_turns_to_the_end_and_a_least_gain_is_asked_for() -> None:
    assert not is_stalled(StopConfig(), gains(-1, -1, -1))
    assert is_stalled(StopConfig(patience=1, min_gain=0.2), gains(0.1))


def test_losses_of_other_answers_are_no_gain(home: Path) -> None:
    scores: dict[str, float | None] = {"a": 1.0, "b": 1.0}
    before, after = (evaluation({"a": loss, "b": 10.0}, scores, loss=2.0) for loss in (20.0, 40.0))
    rows = [row | {"tokens": 20} if row["instruction_id"] == "a" else row for row in read_rows(after.details)]
    longer = after.model_copy(update={"details": write_snapshot("evaluations", rows, step="test", version=1)})
    assert compare(longer, before, against=0, seed=0).loss_gain is None
    assert compare(after, before, against=0, seed=0).loss_gain is not None


def test_a_gain_is_told_in_its_unit_and_a_missing_one_is_no_zero() -> None:
    gain = Interval(value=0.5, low=-0.1, high=1.0)
    assert told(gain, "loss") == "gain in loss: +0.500 nats per token, 95 % interval -0.100 to +1.000"
    assert told(gain, "score") == "gain in score: +0.500 points, 95 % interval -0.100 to +1.000"
    assert told(None, "loss") == "gain in loss: no figure"
