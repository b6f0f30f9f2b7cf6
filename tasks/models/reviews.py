"""Reads a referee's review: two scores from 1 to 10, or the reason why there are none. Never a guess."""

import json
import math
from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """What became of one review. Only `ok` carries scores."""

    OK = "ok"
    UNPARSABLE = "unparsable"
    OUT_OF_RANGE = "out_of_range"
    TRUNCATED = "truncated"
    REFUSED = "refused"
    MISSING = "missing"  # there were no two responses to compare
    FAILED = "failed"  # the referee gave no answer


@dataclass(frozen=True, slots=True)
class Parsed:
    """A review as far as it could be read."""

    outcome: Outcome
    first_score: float | None = None
    second_score: float | None = None
    evidence: str | None = None


def parse_review(text: str) -> Parsed:
    """Scores from a JSON object with `first_score` and `second_score`; anything else is unparsable."""
    start, end = text.find("{"), text.rfind("}")
    try:
        said = json.loads(text[start : end + 1])
        scores = [said["first_score"], said["second_score"]]
    except (ValueError, KeyError, TypeError):
        return Parsed(Outcome.UNPARSABLE)
    if any(
        isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score) for score in scores
    ):
        return Parsed(Outcome.UNPARSABLE)
    if any(not 1 <= score <= 10 for score in scores):
        return Parsed(Outcome.OUT_OF_RANGE)
    return Parsed(Outcome.OK, float(scores[0]), float(scores[1]), str(said.get("evidence", "")) or None)
