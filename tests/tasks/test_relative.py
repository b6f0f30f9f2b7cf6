"""The relative score against an independent computation, and its mirror image."""

import random
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import pytest

from storage.runs import Interval
from tasks.relative import Figures, paired, relative_score

# A recorded study: question, category, then student and reference with the reference first, and with the student first.
STUDY = [
    ("q01", "writing", 7, 9, 8, 9), ("q02", "writing", 8, 8, 8, 7), ("q03", "writing", 6, 9, 7, 9),
    ("q04", "writing", 9, 8, 9, 7), ("q05", "math", 3, 9, 4, 9), ("q06", "math", 5, 7, 6, 7),
    ("q07", "math", 8, 7.5, 8, 7.5), ("q08", "math", 2, 10, 2, 10), ("q09", "generic", 8, 9, 9, 8),
    ("q10", "generic", 7, 8, 8, 8), ("q11", "generic", 9, 9, 9, 9), ("q12", "generic", 6, 8, 8, 8),
]  # fmt: skip
CATEGORIES = {row[0]: row[1] for row in STUDY}
ORDERS = ("teacher_first", "student_first")


def reviews(study: Iterable[tuple[Any, ...]] = STUDY) -> list[dict[str, Any]]:
    return [
        {"instruction_id": key, "order": order, "student_score": said[0], "teacher_score": said[1]}
        for key, _, *scores in study
        for order, said in zip(ORDERS, (scores[:2], scores[2:]))
    ]


def swapped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same reviews with the two models in each other's roles."""
    other = dict(zip(ORDERS, ORDERS[::-1]))
    return [
        row | {
            "order": other.get(row["order"], row["order"]),
            "student_score": row["teacher_score"],
            "teacher_score": row["student_score"],
        }
        for row in rows
    ]  # fmt: skip


def share(study: Iterable[tuple[Any, ...]], at: int) -> Fraction:
    rows = list(study)
    return sum((Fraction(row[at]) for row in rows), Fraction()) / sum(Fraction(row[at + 1]) for row in rows)


def test_a_recorded_study_has_its_known_figures() -> None:
    found = relative_score(reviews(), CATEGORIES).overall
    assert found.by_order["teacher_first"].value == pytest.approx(78 / 101.5)
    assert found.by_order["student_first"].value == pytest.approx(86 / 98.5)
    assert found.mean and found.mean.value == pytest.approx(float((share(STUDY, 2) + share(STUDY, 4)) / 2))
    assert found.pooled and found.pooled.value == pytest.approx(164 / 200)
    # Gaps over both orders: q04 +1.5, q02, q07 +0.5, q09, q11 0, and the others at -0.5, -1, -1, -1.5, -2, -5.5, -8.
    assert (found.wins, found.ties, found.losses) == (1, 5, 6)
    # Standing first: the student gains 86 - 78 = 8 points and the reference 101.5 - 98.5 = 3, over 24 answers.
    assert found.position_effect and found.position_effect.value == pytest.approx(11 / 24)


def test_every_category_has_its_own_figures() -> None:
    found = relative_score(reviews(), CATEGORIES)
    assert {name: part.questions for name, part in found.by_category.items()} == dict.fromkeys(
        ("writing", "math", "generic"), 4
    )
    for name, part in found.by_category.items():
        rows = [row for row in STUDY if row[1] == name]
        assert part.by_order["teacher_first"].value == pytest.approx(float(share(rows, 2)))
    assert sum(part.losses for part in found.by_category.values()) == found.overall.losses
    without = relative_score(reviews(), CATEGORIES | {"q01": None}).by_category
    assert {name: part.questions for name, part in without.items()} == {
        "generic": 4,
        "math": 4,
        "none": 1,
        "writing": 3,
    }


def test_the_interval_is_that_of_a_bootstrap_written_another_way() -> None:
    rng, drawn = random.Random(7), []
    for _ in range(10_000):
        rows = rng.choices(STUDY, k=len(STUDY))
        drawn.append(
            (sum(row[2] for row in rows) / sum(row[3] for row in rows)
             + sum(row[4] for row in rows) / sum(row[5] for row in rows)) / 2
        )  # fmt: skip
    drawn.sort()
    found = relative_score(reviews(), CATEGORIES, seed=3).overall.mean
    assert found and (found.low, found.high) == pytest.approx((drawn[250], drawn[-251]), abs=0.008)
    assert found.high - found.low > 0.2  # twelve questions leave much open


def test_swapping_the_models_mirrors_the_study_exactly() -> None:
    there, back = relative_score(reviews(), CATEGORIES), relative_score(swapped(reviews()), CATEGORIES)
    for here, mirrored in [
        (there.overall, back.overall),
        *((part, back.by_category[name]) for name, part in there.by_category.items()),
    ]:
        assert (mirrored.wins, mirrored.ties, mirrored.losses) == (here.losses, here.ties, here.wins)
        assert is_inverse(here.pooled, mirrored.pooled)
        for order, other in zip(ORDERS, ORDERS[::-1]):
            assert is_inverse(here.by_order[order], mirrored.by_order[other])
        assert here.position_effect and mirrored.position_effect
        assert mirrored.position_effect.model_dump() == pytest.approx(here.position_effect.model_dump())


def is_inverse(interval: Interval | None, other: Interval | None) -> bool:
    assert interval and other
    expected = (1 / interval.value, 1 / interval.high, 1 / interval.low)
    return (other.value, other.low, other.high) == pytest.approx(expected, rel=1e-12)


def test_neither_the_sequence_of_reviews_nor_the_time_of_day_moves_an_interval() -> None:
    shuffled = random.Random(0).sample(reviews(), k=2 * len(STUDY))
    assert relative_score(shuffled, CATEGORIES) == relative_score(reviews(), CATEGORIES)


def test_a_question_without_a_valid_review_in_every_order_is_left_out_and_counted() -> None:
    rows = reviews()
    rows[1] |= {"student_score": None, "teacher_score": None}  # q01, student first
    found = relative_score(rows)
    assert (found.left_out, found.overall.questions) == (1, 11)
    assert found.overall.by_order["teacher_first"].value == pytest.approx(71 / 92.5)
    assert relative_score([row for row in reviews() if row["instruction_id"] != "q01"]).overall == found.overall


def test_votes_of_one_order_are_one_review() -> None:
    twice = [*reviews(), *(row | {"student_score": row["student_score"] + 1} for row in reviews())]
    found = relative_score(twice).overall.by_order["teacher_first"].value
    assert found == pytest.approx((78 + 12 / 2) / 101.5)


def test_the_turns_of_a_conversation_are_drawn_together() -> None:
    rows = [row | {"instruction_id": f"{row['instruction_id']}/{turn}"} for row in reviews() for turn in (1, 2)]
    questions = {row["instruction_id"]: row["instruction_id"].partition("/")[0] for row in rows}
    once, twice = relative_score(reviews()).overall, relative_score(rows, questions=questions).overall
    assert (twice.questions, twice.losses) == (2 * once.questions, 2 * once.losses)
    for name in ("mean", "pooled", "position_effect"):
        expected, found = getattr(once, name), getattr(twice, name)
        assert found.model_dump() == pytest.approx(expected.model_dump()), "a second turn alike says nothing new"


def test_a_wider_tie_margin_makes_more_ties() -> None:
    def outcomes(figures: Figures) -> tuple[int, int, int]:
        return figures.wins, figures.ties, figures.losses

    assert outcomes(relative_score(reviews(), tie_margin=0).overall) == (3, 2, 7)
    assert outcomes(relative_score(reviews(), tie_margin=1.5).overall) == (0, 9, 3)


def test_a_gap_at_the_tie_margin_is_a_tie_though_its_means_are_of_thirds() -> None:
    votes = {"teacher_first": [(1, 3), (5, 3), (3, 4)], "student_first": [(3, 4), (8, 3), (2, 8)]}
    rows = [
        {"instruction_id": "q", "order": order, "student_score": float(own), "teacher_score": float(other)}
        for order, said in votes.items()
        for own, other in said
    ]
    for found in (relative_score(rows).overall, relative_score(swapped(rows)).overall):
        assert (found.wins, found.ties, found.losses) == (0, 1, 0)


def test_without_reviews_there_are_no_figures() -> None:
    found = relative_score([]).overall
    assert (found.questions, found.mean, found.pooled, found.position_effect) == (0, None, None, None)
    assert (found.wins, found.ties, found.losses) == (0, 0, 0)


def test_a_metric_has_one_order_and_no_position_effect() -> None:
    rows = [row | {"order": "unordered"} for row in reviews() if row["order"] == "teacher_first"]
    found = relative_score(rows).overall
    assert found.position_effect is None
    assert found.mean == found.pooled == found.by_order["unordered"]


def test_a_gain_is_a_ratio_of_sums_with_its_interval() -> None:
    gain = paired([4.0, 2.0, 6.0], [4, 2, 2])
    assert gain and gain.value == pytest.approx(12 / 8)
    assert (gain.low, gain.high) == (1, 3)  # all draws of one question alone are within 2.5 % of the ends
    assert paired([], []) is None
