"""The split: what is hard, what is easy, and what nobody may say."""

from pathlib import Path
from typing import Any

import pytest

from storage.files import Snapshot
from storage.pools import by_id, write_snapshot
from tasks.discriminate import DiscriminateConfig, TooManyUndecided, UntrustworthyReferee, discriminate


def reviews(*rows: tuple[str, str, float | None, float | None]) -> Snapshot:
    """(instruction_id, order, teacher's score, student's score); no score: the review could not be parsed."""
    full = [
        {
            "instruction_id": key,
            "order": order,
            "vote": number,
            "outcome": "ok" if teacher is not None else "unparsable",
            "teacher_score": teacher,
            "student_score": student,
        }
        for number, (key, order, teacher, student) in enumerate(rows)
    ]
    return write_snapshot("reviews", full, step="referee", version=1)


def verdicts(snapshot: Snapshot, **settings: Any) -> dict[str, dict[str, Any]]:
    config = DiscriminateConfig(max_undecided_share=1, **settings)
    return by_id(discriminate.fn(config, snapshot).verdicts)


def test_scores_are_the_mean_over_both_orders(home: Path) -> None:
    (row,) = verdicts(reviews(("a", "teacher_first", 8, 6), ("a", "student_first", 9, 8))).values()
    assert (row["teacher_score"], row["student_score"], row["score_gap"]) == (8.5, 7.0, 1.5)


def test_a_gap_at_the_threshold_is_hard(home: Path) -> None:
    found = verdicts(reviews(("a", "unordered", 8, 7), ("b", "unordered", 8, 7.01)), threshold=1.0)
    assert [found[key]["difficulty"] for key in "ab"] == ["hard", "easy"]


def test_a_gap_at_the_threshold_is_hard_though_its_means_are_of_thirds(home: Path) -> None:
    votes = [("a", "teacher_first", teacher, student) for teacher, student in [(1, 1), (1, 1), (6, 3)]]
    found = verdicts(reviews(*votes), threshold=1.0)
    assert found["a"]["score_gap"] < 1 and found["a"]["difficulty"] == "hard"


def test_a_row_with_one_valid_order_is_undecided_and_has_no_score(home: Path) -> None:
    (row,) = verdicts(reviews(("a", "teacher_first", 9, 2), ("a", "student_first", None, None))).values()
    assert (row["difficulty"], row["reason"]) == ("undecided", "missing_review")
    assert (row["teacher_score"], row["student_score"], row["score_gap"]) == (None, None, None)


def test_an_order_with_more_valid_votes_does_not_weigh_more(home: Path) -> None:
    rows = [("a", "teacher_first", 10, 3), ("a", "teacher_first", 8, 5), ("a", "student_first", 5, 10)]
    (row,) = verdicts(reviews(*rows)).values()
    assert (row["teacher_score"], row["student_score"], row["score_gap"]) == (7, 7, 0)


def test_a_weak_teacher_answer_is_not_worth_learning(home: Path) -> None:
    found = verdicts(reviews(("a", "unordered", 4.9, 1), ("b", "unordered", 5, 1)), min_teacher_score=5)
    assert [(row["difficulty"], row["reason"]) for row in found.values()] == [
        ("undecided", "weak_teacher"), ("hard", None)
    ]  # fmt: skip


def test_a_quantile_splits_by_the_gaps_of_this_iteration_alone(home: Path) -> None:
    gaps = reviews(*[(str(number), "unordered", 10, 10 - number) for number in range(9)])
    found = verdicts(gaps, threshold_kind="quantile", threshold=0.5)
    assert [key for key, row in found.items() if row["difficulty"] == "hard"] == ["4", "5", "6", "7", "8"]
    assert {row["threshold"] for row in found.values()} == {4.0}
    assert discriminate.fn(DiscriminateConfig(threshold_kind="quantile", threshold=0.5), gaps).threshold == 4.0


def test_undecided_rows_do_not_move_the_quantile(home: Path) -> None:
    rows = [
        ("a", "unordered", 10, 8),
        ("b", "unordered", 10, 6),
        ("c", "unordered", None, None),
        ("d", "unordered", 3, 3),
    ]
    found = verdicts(reviews(*rows), threshold_kind="quantile", threshold=0.5, min_teacher_score=5)
    assert found["a"]["threshold"] == 3.0


def test_too_many_undecided_rows_fail_with_their_reasons(home: Path) -> None:
    snapshot = reviews(("a", "unordered", 8, 7), ("b", "unordered", None, None))
    with pytest.raises(TooManyUndecided, match=r"1 of 2 rows .* 1 ok, 1 unparsable"):
        discriminate.fn(DiscriminateConfig(max_undecided_share=0.4), snapshot)


def test_when_nothing_is_decided_nothing_is_hard(home: Path) -> None:
    split = discriminate.fn(DiscriminateConfig(max_undecided_share=1), reviews(("a", "unordered", None, None)))
    assert (split.hard, split.easy, split.undecided) == (0, 0, 1)


def test_a_quantile_above_one_is_refused() -> None:
    with pytest.raises(ValueError, match="a share from 0 to 1"):
        DiscriminateConfig(threshold_kind="quantile", threshold=2)


def both(key: str, teacher_first: tuple[float, float], student_first: tuple[float, float]) -> list[Any]:
    return [(key, "teacher_first", *teacher_first), (key, "student_first", *student_first)]


def test_the_health_of_a_judge_is_counted_over_both_orders(home: Path) -> None:
    rows = [
        *both("same", (8, 5), (7, 4)),  # one winner, gaps 3 and 3
        *both("flip", (8, 5), (4, 7)),  # the first one wins, by 3 each time: nobody does over both orders
        *both("tie", (7, 7), (6, 6)),
        ("half", "teacher_first", 9.0, 2.0),
        ("half", "student_first", None, None),
        ("other", "teacher_first", None, None),
        ("other", "student_first", 9.0, 2.0),
    ]
    health = discriminate.fn(DiscriminateConfig(max_undecided_share=1), reviews(*rows)).judge
    assert health is not None
    assert (health.reviews, health.unusable, health.unusable_share) == (10, {"unparsable": 2}, 2 / 10)
    assert health.pairs == 3
    assert (health.flip_share, health.tie_share) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert health.position_bias == pytest.approx((0 + 6 + 0) / 2 / 3)
    assert health.vote_agreement is None


def test_votes_agree_where_all_of_one_order_name_one_winner(home: Path) -> None:
    rows = [("a", "teacher_first", 8.0, 5.0), ("a", "teacher_first", 9.0, 5.0), ("a", "student_first", 8.0, 5.0)]
    rows += [("b", "teacher_first", 8.0, 5.0), ("b", "teacher_first", 5.0, 8.0), ("b", "student_first", 8.0, 5.0)]
    rows += [("c", "teacher_first", 8.0, 5.0), ("c", "teacher_first", 8.0, 5.0), ("c", "student_first", 8.0, 5.0)]
    health = discriminate.fn(DiscriminateConfig(), reviews(*rows)).judge
    assert health is not None and health.vote_agreement == pytest.approx(2 / 3)
    assert health.position_bias == pytest.approx((3.5 - 3 + 0 - 3 + 3 - 3) / 2 / 3), "of the votes' mean gap"


def test_a_judge_that_evens_out_ties_and_does_not_flip_though_its_scores_are_of_tenths(home: Path) -> None:
    rows = [*both("tie", (8.3, 8.1), (7.9, 8.1)), ("even", "student_first", 9.0, 8.0)]
    rows += [("even", "teacher_first", teacher, 8.3) for teacher in (8.4, 8.5, 8.0)]
    health = discriminate.fn(DiscriminateConfig(), reviews(*rows)).judge
    assert health is not None and (health.flip_share, health.tie_share) == (0.5, 0.5)


def test_a_metric_has_no_health(home: Path) -> None:
    assert discriminate.fn(DiscriminateConfig(), reviews(("a", "unordered", 10, 4))).judge is None


def test_a_judge_that_sees_only_the_place_is_refused(home: Path) -> None:
    rows = [row for number in range(10) for row in both(f"r{number}", (9, 3), (3, 9))]
    with pytest.raises(UntrustworthyReferee, match=r"100% of 10 pairs.*\+6\.0 points"):
        discriminate.fn(DiscriminateConfig(), reviews(*rows))
    assert discriminate.fn(DiscriminateConfig(max_flip_share=1), reviews(*rows)).hard == 0
