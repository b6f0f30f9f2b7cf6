"""How good is a student, as a share of its reference? Sums of scores, with intervals; and what a change was worth.

The *relative score* is the figure of Lion's tables (arXiv 2305.12870): the sum of the student's scores over the sum
of the reference's, for each order of the two answers, and the mean of both orders. Every interval is a paired
bootstrap (Efron 1979) by question: a draw takes whole questions, with all turns, both models' scores and both orders.

Pure: knows reviews as rows, and nothing of models, files or Prefect.

    >>> rows = [{"instruction_id": "a", "order": "unordered", "student_score": 4.0, "teacher_score": 8.0}]
    >>> relative_score(rows).overall.mean.value
    0.5
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.runs import Interval
from storage.studies import Figures, Relative

DRAWS = 10_000
DRAWS_AT_ONCE = 500  # bounds the memory: so many rows of one count a question
OUTSIDE = 0.05  # of the draws lie outside an interval, half on each side
TIE_MARGIN = 0.5  # points: two scores closer than this, over both orders, are no win
FIRST, SECOND = "teacher_first", "student_first"  # an order says whose answer stood first; "teacher": the reference

Scores = npt.NDArray[np.float64]


def relative_score(
    reviews: Iterable[Mapping[str, Any]],
    categories: Mapping[str, str | None] | None = None,
    *,
    questions: Mapping[str, str] | None = None,
    tie_margin: float = TIE_MARGIN,
    seed: int = 0,
) -> Relative:
    """The relative score, overall and by category, of reviews as the table `reviews` holds them.

    Votes of one order are averaged first. A question counts only with a valid review in every order that occurs.

    Args:
        categories: of the questions, by instruction_id; one without goes under "none".
        questions: to which each turn belongs, by instruction_id; by default each is a question of its own. The turns of
            one conversation are drawn together, since how one went says much about the next.
        seed: of the bootstrap. The same reviews in any sequence give the same figures.
    """
    votes: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in reviews:
        given = votes[row["instruction_id"]][row["order"]]
        if row["student_score"] is not None and row["teacher_score"] is not None:
            given.append((row["student_score"], row["teacher_score"]))
    orders = sorted({order for question in votes.values() for order in question})
    whole = {
        key: [np.mean(question[order], axis=0) for order in orders]
        for key, question in sorted(votes.items())
        if all(question.get(order) for order in orders)
    }
    scores = np.array(list(whole.values()), dtype=float).reshape(len(whole), len(orders), 2)
    named = np.array([(categories or {}).get(key) or "none" for key in whole], dtype=object)
    asked = np.array([(questions or {}).get(key, key) for key in whole])
    return Relative(
        overall=_figures(scores, asked, orders, tie_margin, seed),
        by_category={
            str(name): _figures(scores[named == name], asked[named == name], orders, tie_margin, seed)
            for name in sorted(set(named))
        },
        left_out=len(votes) - len(whole),
        tie_margin=tie_margin,
    )


def _figures(scores: Scores, asked: npt.NDArray[np.str_], orders: list[str], tie_margin: float, seed: int) -> Figures:
    """Args: scores: (turns, orders, 2), the student's and the reference's; asked: the question of each turn."""
    if not len(scores):
        return Figures(
            questions=0, by_order={}, mean=None, pooled=None, wins=0, ties=0, losses=0, position_effect=None
        )  # fmt: skip
    _, question = np.unique(asked, return_inverse=True)

    def by_question(columns: Scores) -> Scores:  # (turns, k) -> (questions, k)
        return np.stack([np.bincount(question, column) for column in columns.T], axis=1)

    sums = _Bootstrap(by_question(scores.reshape(len(scores), -1)), seed)

    def by_order(sums: Scores) -> Scores:  # (draws, orders)
        pairs = sums.reshape(len(sums), len(orders), 2)
        return pairs[:, :, 0] / pairs[:, :, 1]

    def pooled(sums: Scores) -> Scores:
        student, reference = sums.reshape(len(sums), len(orders), 2).sum(1).T
        return student / reference

    # Means of thirds, and scores such as 8.1, are off in their last digits, in which nobody wins.
    gaps = np.round(scores.mean(1)[:, 0] - scores.mean(1)[:, 1], 9)
    effect = None
    if set(orders) == {FIRST, SECOND}:
        first, second = orders.index(FIRST), orders.index(SECOND)
        student, reference = scores[:, :, 0], scores[:, :, 1]
        gained = student[:, second] - student[:, first] + reference[:, first] - reference[:, second]
        effect = paired(*by_question(np.column_stack([gained / 2, np.ones(len(gained))])).T, seed=seed)
    return Figures(
        questions=len(scores),
        drawn=int(question.max()) + 1,
        by_order={
            order: sums.interval(lambda drawn, at=at: by_order(drawn)[:, at])  # type: ignore[misc]
            for at, order in enumerate(orders)
        },
        mean=sums.interval(lambda drawn: by_order(drawn).mean(1)),
        pooled=sums.interval(pooled),
        wins=int((gaps > tie_margin).sum()),
        ties=int((abs(gaps) <= tie_margin).sum()),
        losses=int((gaps < -tie_margin).sum()),
        position_effect=effect,
    )


def paired(numerators: Iterable[float], denominators: Iterable[float], *, seed: int = 0) -> Interval | None:
    """Sum of the numerators over sum of the denominators, one pair a question; null without a question.

    With ones as denominators this is a mean. The gain from one student to the next in nats per token is the
    differences of the questions' losses over their tokens.
    """
    columns = np.array([list(numerators), list(denominators)], dtype=float).T
    if not len(columns):
        return None
    return _Bootstrap(columns, seed).interval(lambda sums: sums[:, 0] / sums[:, 1])


class _Bootstrap:
    """Sums of columns (questions, k) over the questions as they are, and over resampled ones."""

    def __init__(self, columns: Scores, seed: int):
        rng, questions = np.random.default_rng(seed), len(columns)
        equal = np.full(questions, 1 / questions)
        draws = [rng.multinomial(questions, equal, size=DRAWS_AT_ONCE) @ columns for _ in range(DRAWS // DRAWS_AT_ONCE)]
        self._observed, self._drawn = columns.sum(0, keepdims=True), np.concatenate(draws)

    def interval(self, statistic: Callable[[Scores], Scores]) -> Interval:
        """Of a statistic that takes sums (draws, k) and gives a figure a draw.

        The bounds are two of the drawn figures, equally far from both ends, never a value between two: so the
        interval of an inverse is the inverse of the interval.
        """
        drawn = np.sort(statistic(self._drawn))
        outside = math.floor(len(drawn) * OUTSIDE / 2)
        return Interval(
            value=float(statistic(self._observed)[0]), low=float(drawn[outside]), high=float(drawn[-1 - outside])
        )
