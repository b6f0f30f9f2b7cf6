"""Reads a referee's review: two scores from 1 to 10, or the reason why there are none. Never a guess.

A JSON object with `first_score` and `second_score` is read first. Else the text must say both scores clearly:
labelled ("Score 1: 8/10, Score 2: **7**"), or as a line of two numbers, or as two lines of one number each.
Whatever can be read in two ways is unparsable, and the referee is asked again.
"""

import json
import math
import re
from bisect import bisect_left
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tasks.models.chat import JSON_OBJECT, storable

WORST_SCORE, BEST_SCORE = 1.0, 10.0


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
    """The scores that a review gives, if it gives two and only two."""
    objects, rest = _objects_with_scores(text)
    if objects:
        pairs = {(_score(said["first_score"]), _score(said["second_score"])) for said in objects}
        # What follows may be the verdict, and the object a quotation from an answer.
        return _judged(pairs | _in_words(rest), str(objects[0].get("evidence") or "") or None)
    if text.lstrip().startswith("{"):
        return Parsed(Outcome.UNPARSABLE)  # JSON that broke off: its last number may be half a number
    return _judged(_in_words(text), text.strip())


Pair = tuple[float | None, float | None]  # null: something that is no number


def _judged(pairs: set[Pair], evidence: str | None) -> Parsed:
    """Scores, if there is one reading and it lies within the scale."""
    if len(pairs) != 1:
        return Parsed(Outcome.UNPARSABLE)
    ((first, second),) = pairs
    if first is None or second is None:
        return Parsed(Outcome.UNPARSABLE)
    if not (WORST_SCORE <= first <= BEST_SCORE and WORST_SCORE <= second <= BEST_SCORE):
        return Parsed(Outcome.OUT_OF_RANGE)
    return Parsed(Outcome.OK, first, second, evidence and storable(evidence))


# --- JSON -----------------------------------------------------------------------------------------------------------


NO_SCORES: dict[str, Any] = {"first_score": None, "second_score": None}
KEYED = re.compile(r"\{\s*\"(?:evidence|first_score|second_score)\"")


class _Ambiguous(ValueError):
    """An object that says something twice."""


def _objects_with_scores(text: str) -> tuple[list[dict[str, Any]], str]:
    """The outermost JSON objects of a text that have both scores, and what follows the last of them."""
    decoder, at, found = json.JSONDecoder(object_pairs_hook=_without_repetition), 0, []
    rest = text
    while brace := JSON_OBJECT.search(text, at):
        at = brace.start()
        try:
            said, at = decoder.raw_decode(text, at)
        except (_Ambiguous, RecursionError):
            return [NO_SCORES], ""
        except ValueError:
            if KEYED.match(text, at):  # a review that is no JSON: an object inside it may be part of an answer
                return [NO_SCORES], ""
            at += 1
            continue
        if {"first_score", "second_score"} <= said.keys():
            found.append(said)
            rest = text[at:]
    return found, rest


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    said = dict(pairs)
    if len(said) != len(pairs):
        raise _Ambiguous
    return said


def _score(value: Any) -> float | None:
    """A JSON value as a number: 8, 8.5, "8", "8/10"."""
    if isinstance(value, str):
        found = re.fullmatch(rf"\s*{NUMBER}{SCALE}\s*", value)
        return float(found["number"]) if found else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


# --- text -----------------------------------------------------------------------------------------------------------

# A text may be white space or one word without end: what cannot be read in another way is not given back (`*+`), and
# `_goes_on` looks at each label once.

# A number that is not part of something longer: no 8-9, 8,5, 80%, 1e3, 4/5.
NUMBER = r"(?<![\w.,/+\-−])(?P<number>[+\-−]?[0-9]{1,6}(?:\.[0-9]{1,6})?)(?![\w%]|[.,][0-9]|\s*+[-–—−]\s*+[0-9])"
SCALE = r"(?:\s*+(?:/|out\s++of)\s*+10(?![0-9.,]*[0-9]))?(?!\s*+(?:/|out\s++of)\s*+[0-9])"
THING = r"(?:score|answer|assistant|response|reply|model|ai|rating)"
LABEL = rf"\b(?:(?P<first>first|1st|{THING}\s*+(?:#\s*+)?(?:1|a|one))|(?P<second>second|2nd|{THING}\s*+(?:#\s*+)?(?:2|b|two)))\b"
BETWEEN = rf"(?:'s)?(?:\s++(?:{THING}|gets|scores|scored|is|receives|deserves|an?|of)\b)*\s*+(?:\)\s*+)?"
SAYS = r"(?:[:=]|[-–—]\s|\b(?:gets|scores|scored|is|receives|deserves|score of)(?:\s++(?:an?|the|score|of))*+\b)"
AFTER = r"(?=\s*(?:$|[.,;:!|)\]/\n]|and\b|points?\b|while\b|but\b))"
LABELLED = re.compile(rf"{LABEL}{BETWEEN}{SAYS}\s*+(?:\(\s*+)?{NUMBER}{SCALE}{AFTER}", re.IGNORECASE | re.MULTILINE)
LABELS, NUMBERS, SENTENCES = re.compile(LABEL, re.IGNORECASE), re.compile(NUMBER), re.compile(r"[\n.;]|$")
UNSIGNED = NUMBER.replace(r"[+\-−]?", "", 1)  # "8 -7" may be anything
ONE = re.compile(rf"\s*+{UNSIGNED}{SCALE}\s*+(?:[.,;]\s*+)?")
TWO = re.compile(
    rf"\s*+(?:scores?\s*+[:=]\s*+)?\(?{UNSIGNED}{SCALE}(?:\s++and\s++|\s*+[,;|&]\s++|\s++){UNSIGNED.replace('number', 'other')}{SCALE}\)?\s*+(?:\.\s*+)?",
    re.IGNORECASE,
)


def _in_words(text: str) -> set[Pair]:
    """All readings of a text that is no JSON."""
    plain = re.sub(r"[*`#>]", "", text).replace("first_score", "first score").replace("second_score", "second score")
    return _labelled(plain) or _bare(plain)


def _labelled(text: str) -> set[Pair]:
    """All readings of labelled scores; empty where not both labels have one."""
    scores: dict[str, set[float]] = {"first": set(), "second": set()}
    end = 0
    for found in LABELLED.finditer(text):
        scores["first" if found["first"] else "second"].add(_float(found["number"]))
        end = found.end()
    if scores["first"] and scores["second"] and _goes_on(text, end):
        return {(None, None)}  # it goes on about the scores: perhaps it changes its mind
    return {(first, second) for first in scores["first"] for second in scores["second"]}


def _goes_on(text: str, at: int) -> bool:
    """Whether from a place on a number follows on a label in one sentence."""
    numbers, ends = ([found.start() for found in form.finditer(text, at)] for form in (NUMBERS, SENTENCES))
    for label in LABELS.finditer(text, at):
        following = bisect_left(numbers, label.end())
        if following < len(numbers) and numbers[following] < ends[bisect_left(ends, label.end())]:
            return True
    return False


def _bare(text: str) -> set[Pair]:
    """All readings of lines that hold nothing but numbers: one line of two, or two lines of one that follow."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    pairs: set[Pair] = {
        (_float(found["number"]), _float(found["other"])) for line in lines if (found := TWO.fullmatch(line))
    }
    singles = [(at, found) for at, line in enumerate(lines) if (found := ONE.fullmatch(line))]
    if len(singles) == 2 and singles[1][0] == singles[0][0] + 1:
        pairs.add((_float(singles[0][1]["number"]), _float(singles[1][1]["number"])))
    elif singles:
        pairs.add((None, None))
    return pairs


def _float(number: str) -> float:
    return float(number.replace("−", "-"))
