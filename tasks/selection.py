"""Which student goes on, and whether another iteration is worth it: decided on the held-out instructions.

Every new student is compared, question by question, with the one it came after. Where it is worse, `keep: best`
rolls back: the loop goes on from the best so far. Where `stop.patience` iterations in a row gain nothing that their
interval can tell from nothing, the loop ends.
"""

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from storage.pools import by_id, read_lineage, read_rows
from storage.runs import Comparison, Evaluation, Interval
from storage.studies import Figures
from tasks.models.reviews import BEST_SCORE
from tasks.relative import paired, relative_score

Measure = Literal["loss", "score"]


class StopConfig(BaseModel):
    """When the loop ends before its last iteration."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    measure: Measure = Field(
        "loss",
        description="What says whether a student is better, here and for `keep`. loss: nats per token of the teacher's "
        "held-out answers, which tells small steps apart. score: mean score of the student's own answers.",
    )
    min_gain: float = Field(
        0.0, ge=0, description="An iteration gained something if the 95 % interval of its gain lies above this."
    )
    patience: int | None = Field(
        None, ge=1, description="Stop after so many iterations in a row that gained nothing. Null: turn to the end."
    )


def compare(now: Evaluation, before: Evaluation, against: int, seed: int) -> Comparison:
    """A student's held-out figures beside the teacher's and beside those of the student of iteration `against`.

    There is no gain where they were held against other answers. Losses can be told from each other where they are of the
    same tokens: else there is no gain in loss.
    """
    columns = ["loss_sum", "tokens", "score"]
    new, old = by_id(now.details, columns), by_id(before.details, columns)
    both = [(new[key], old[key]) for key in sorted(new.keys() & old.keys())] if same_reference(now, before) else []
    same = all(a["tokens"] == b["tokens"] for a, b in both)
    losses = [(b["loss_sum"] - a["loss_sum"], a["tokens"]) for a, b in both if same and a["tokens"]]
    scores = [(a["score"] - b["score"], 1) for a, b in both if a["score"] is not None and b["score"] is not None]
    return Comparison(
        against=against,
        relative=relative_to_teacher(now, seed),
        loss_gain=_ratio(losses, seed),
        score_gain=_ratio(scores, seed),
    )


def same_reference(a: Evaluation, b: Evaluation) -> bool:
    """Whether both students were held against the same answers to the same instructions."""
    first, second = (read_lineage(each.details)["inputs"] for each in (a, b))
    return bool(first == second)


def relative_to_teacher(evaluation: Evaluation, seed: int = 0) -> Interval | None:
    """Sum of the student's held-out scores over the teacher's, as the referee gave them where it is a model, the mean
    of both orders; null where nothing was scored."""
    if judged := judged_by_referee(evaluation, seed):
        return judged.mean
    return mean_score(evaluation, seed, of=BEST_SCORE)


def mean_score(evaluation: Evaluation, seed: int = 0, of: float = 1) -> Interval | None:
    """Mean score of the student's held-out answers, as a share `of` the best; null where nothing was scored."""
    rows = sorted(by_id(evaluation.details, ["score"]).items())
    return _ratio([(row["score"], of) for _, row in rows if row["score"] is not None], seed)


def loss_per_token(evaluation: Evaluation) -> Interval | None:
    """Nats per token of the teacher's held-out answers; null where that is no number."""
    rows = sorted(by_id(evaluation.details, ["loss_sum", "tokens"]).items())
    return _ratio([(row["loss_sum"], row["tokens"]) for _, row in rows if row["tokens"]])


def judged_by_referee(evaluation: Evaluation, seed: int = 0) -> Figures | None:
    """What the referee says of the held-out answers; null where it is a metric."""
    return relative_score(read_rows(evaluation.reviews), seed=seed).overall if evaluation.reviews else None


def _ratio(pairs: Sequence[tuple[float, float]], seed: int = 0) -> Interval | None:
    """Null as well where a loss is no number: a student that broke has no gain to speak of."""
    if not all(math.isfinite(numerator) for numerator, _ in pairs):
        return None
    return paired(*zip(*pairs), seed=seed) if pairs else None


def is_worse(now: Evaluation, before: Evaluation, measure: Measure, gain: Interval | None) -> bool:
    """Whether a student is worse than the one before: by its gain, which is of what both answered, where there is one. One
    whose figure cannot be had is, if the other's can."""
    new, old = getattr(now, measure), getattr(before, measure)
    if new is None or old is None:
        return old is not None
    if gain is not None:
        return gain.value < 0
    return new > old if measure == "loss" else new < old


def gain_in(comparison: Comparison, measure: Measure) -> Interval | None:
    """The gain that decides."""
    return comparison.loss_gain if measure == "loss" else comparison.score_gain


def is_stalled(stop: StopConfig, comparisons: Sequence[Comparison]) -> bool:
    """Whether the last `patience` iterations gained nothing that can be told from `min_gain`.

    Args:
        comparisons: of all iterations so far, in order.
    """
    if stop.patience is None or len(comparisons) < stop.patience:
        return False
    gains = [gain_in(comparison, stop.measure) for comparison in comparisons[-stop.patience :]]
    return all(gain is None or gain.low <= stop.min_gain for gain in gains)


def told(gain: Interval | None, measure: Measure) -> str:
    """A gain in words; a gain in loss is a loss that fell."""
    if gain is None:
        return f"gain in {measure}: no figure"
    unit = "nats per token" if measure == "loss" else "points"
    return f"gain in {measure}: {gain.value:+.3f} {unit}, 95 % interval {gain.low:+.3f} to {gain.high:+.3f}"
