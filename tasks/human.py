"""Studies in which people judge: blind, in random order, by aspect; every vote durable at once.

    lion human-eval new --questions q.jsonl --answers student.jsonl reference.jsonl

A folder holds `study.json`, which never changes, and `votes.jsonl`, which only grows: the last vote of a voter on an
item and aspect counts. Whoever votes sees a first and a second answer; which model is first is drawn for each voter
and item. The aspects are those of the paper's human evaluation (Askell et al. 2021, arXiv 2112.00861).
"""

import csv
import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict

from storage.files import digest_of, home, locked, read_csv, write_atomic
from storage.runs import Interval
from tasks.relative import paired

Aspect = Literal["helpful", "honest", "harmless"]
Choice = Literal["first", "tie", "second"]  # as the answers were shown to this voter
ASPECTS: tuple[Aspect, ...] = get_args(Aspect)
CHOICES: tuple[Choice, ...] = get_args(Choice)
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # so begins what a spreadsheet computes, and what a link is hidden in
SHEET = ("item", "instruction", "input", "first", "second", *ASPECTS)


class HumanEvalError(ValueError):
    """A study or a sheet cannot be used. The message names it, the place and the way out."""


class Item(BaseModel):
    """One instruction with both answers."""

    model_config = ConfigDict(frozen=True)

    item: str
    instruction: str
    input: str | None
    a: str
    b: str


class HumanStudy(BaseModel):
    """What is judged: answers of model a and of model b to the same instructions."""

    model_config = ConfigDict(frozen=True)

    study_id: str
    model_a: str
    model_b: str
    seed: int
    items: tuple[Item, ...]

    @property
    def folder(self) -> Path:
        return home() / "human" / self.study_id


class Vote(BaseModel):
    """One voter's choice on one aspect of one item."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    item: str
    voter: str
    aspect: Aspect
    choice: Choice


class AspectResult(BaseModel):
    """What the votes on one aspect say."""

    votes: int
    items: int
    voters: int
    wins: int  # votes for model a
    ties: int
    losses: int
    win_share: Interval | None  # of all votes; resampled by item
    loss_share: Interval | None
    agreement: float | None  # kappa: 1 is full agreement, 0 what chance gives; null: one voter, or all votes alike
    kappa: str  # Cohen's for two voters, Fleiss' for more
    shared_items: int  # items that all voters voted on: the agreement is over these


def new_study(model_a: str, model_b: str, items: Sequence[Item], seed: int) -> HumanStudy:
    """Write a new study; the same answers and seed are the same study.

    Raises:
        HumanEvalError: there is nothing to judge.
    """
    if not items:
        raise HumanEvalError("no question has an answer in both files: there is nothing to judge.")
    content = [model_a, model_b, seed, [item.model_dump() for item in items]]
    study = HumanStudy(
        study_id=f"human-{digest_of(content)[:8]}", model_a=model_a, model_b=model_b, seed=seed, items=tuple(items)
    )
    write_atomic(study.folder / "study.json", study.model_dump_json(indent=2))
    return study


def find_study(study_id: str | None) -> HumanStudy:
    """The study whose id begins so; without one, the newest.

    Raises:
        HumanEvalError: there is none.
    """
    found = [file for file in (home() / "human").glob("*/study.json") if file.parent.name.startswith(study_id or "")]
    files = sorted(found, key=lambda file: file.stat().st_mtime)
    if not files:
        raise HumanEvalError(
            f"no human evaluation {f'{study_id} ' if study_id else ''}in {home()}. Make one: lion human-eval new --questions FILE --answers A B"
        )
    return HumanStudy.model_validate_json(files[-1].read_bytes())


def first_model(study: HumanStudy, item: str, voter: str) -> Literal["a", "b"]:
    """Whose answer this voter sees first."""
    return random.Random(f"{study.seed}/{item}/{voter}").choice(("a", "b"))


def shown(study: HumanStudy, item: Item, voter: str) -> dict[str, Any]:
    """An item as this voter sees it: nothing says which model is which."""
    first, second = (item.a, item.b) if first_model(study, item.item, voter) == "a" else (item.b, item.a)
    return {
        "item": item.item,
        "instruction": item.instruction,
        "input": item.input,
        "first": first,
        "second": second,
    }


def cast(study: HumanStudy, votes: Iterable[Vote]) -> None:
    """Append votes; they are on disk when this returns.

    Raises:
        HumanEvalError: an item is not of this study.
    """
    known = {item.item for item in study.items}
    lines = []
    for vote in votes:
        if vote.item not in known:
            raise HumanEvalError(f"{study.study_id} has no item {vote.item!r}")
        lines.append(vote.model_dump_json() + "\n")
    path = study.folder / "votes.jsonl"
    path.touch()
    with locked(study.study_id), path.open("r+b") as file:  # a page and a sheet may be at it at once
        file.seek(file.read().rfind(b"\n") + 1)  # a line torn by a power cut was never acknowledged
        file.truncate()
        file.write("".join(lines).encode())
        file.flush()
        os.fsync(file.fileno())


def votes_of(study: HumanStudy) -> dict[tuple[str, str, str], Vote]:
    """The votes that count, by item, voter and aspect.

    Raises:
        HumanEvalError: a line of the file is no vote.
    """
    path = study.folder / "votes.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    votes: dict[tuple[str, str, str], Vote] = {}
    for number, line in enumerate(text.split("\n")[:-1], 1):  # what follows the last end of a line is a torn one
        try:
            vote = Vote.model_validate_json(line)
        except ValueError as error:
            raise HumanEvalError(f"{path}, line {number}: no vote ({error}). Mend or remove the line.") from None
        votes[vote.item, vote.voter, vote.aspect] = vote
    return votes


def write_sheet(study: HumanStudy, voter: str, path: Path) -> None:
    """A CSV sheet for a voter: a row an item, a column an aspect to fill in with first, tie or second."""
    votes = votes_of(study)
    with path.open("w", newline="", encoding="utf-8-sig") as file:  # by the mark a spreadsheet knows that it is UTF-8
        writer = csv.DictWriter(file, fieldnames=SHEET)
        writer.writeheader()
        for item in study.items:
            given = {aspect: votes.get((item.item, voter, aspect)) for aspect in ASPECTS}
            texts = {name: text and _cell(text) for name, text in shown(study, item, voter).items()}
            writer.writerow(texts | {name: vote.choice if vote else "" for name, vote in given.items()})


def read_sheet(study: HumanStudy, voter: str, path: Path) -> int:
    """Cast the votes of a filled-in sheet, as `voter`, for whom it was written; how many. Empty cells are no votes.

    Raises:
        HumanEvalError: a cell holds something else, or the sheet's answers stand as another voter's do.
    """
    items = {item.item: item for item in study.items}
    votes = []
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise HumanEvalError(f"{path}: not UTF-8 ({error}). Save the sheet as CSV UTF-8.") from None
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)  # where numbers have a comma, spreadsheets write semicolons
    reader = read_csv(text, delimiter=delimiter, restval="")
    if missing := set(SHEET) - set(reader.fieldnames or ()):
        raise HumanEvalError(f"{path}: no column {', '.join(sorted(missing))}. Fill in the sheet as it was written.")
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        item = items.get(row["item"].removeprefix("'"))
        if item is None:
            raise HumanEvalError(f"{where}: {study.study_id} has no item {row['item']!r}.")
        seen = shown(study, item, voter)  # one of its answers is enough: of "7/10" a spreadsheet makes a date
        if not any(
            _words(row[place]) in (_words(_cell(seen[place])), _words(seen[place])) for place in ("first", "second")
        ):
            raise HumanEvalError(
                f"{where}: neither answer stands as {voter} saw it. Name the voter it was written for, or restore the row."
            )
        for aspect in ASPECTS:
            choice = row[aspect].strip().lower()
            if choice and choice not in CHOICES:
                raise HumanEvalError(f"{where}, column {aspect}: {choice!r}. Write first, tie or second, or nothing.")
            if choice:
                votes.append(Vote(item=item.item, voter=voter, aspect=aspect, choice=choice))
    cast(study, votes)
    return len(votes)


def _cell(text: str) -> str:
    """A text as a cell that a spreadsheet takes for no formula and no number: of the id 50189900011246e1 it would keep six
    digits, and in a study of the paper's size one in five has such an id."""
    return f"'{text}" if text.startswith(FORMULA) or _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _words(text: str) -> list[str]:
    """What is left of a text when a spreadsheet has been at its white space."""
    return text.split()


def results(study: HumanStudy) -> dict[str, AspectResult]:
    """Win/tie/lose of model a with intervals, and how far the voters agree, by aspect."""
    by_aspect: dict[str, dict[str, dict[str, str]]] = {aspect: defaultdict(dict) for aspect in ASPECTS}
    for (item, voter, aspect), vote in votes_of(study).items():
        first = first_model(study, item, voter)
        other = "b" if first == "a" else "a"
        by_aspect[aspect][item][voter] = {"first": first, "second": other, "tie": "tie"}[vote.choice]
    return {aspect: _result(items) for aspect, items in by_aspect.items()}


def _result(items: dict[str, dict[str, str]]) -> AspectResult:
    """Args: items: item -> voter -> a, b or tie."""
    counted = Counter(winner for votes in items.values() for winner in votes.values())
    keys = sorted(items)
    totals = [len(items[key]) for key in keys]

    def share(winner: str) -> Interval | None:
        return paired([list(items[key].values()).count(winner) for key in keys], totals)

    voters = sorted({voter for votes in items.values() for voter in votes})
    shared = [[items[key][voter] for voter in voters] for key in keys if len(items[key]) == len(voters)]
    two = len(voters) == 2
    return AspectResult(
        votes=counted.total(),
        items=len(items),
        voters=len(voters),
        wins=counted["a"],
        ties=counted["tie"],
        losses=counted["b"],
        win_share=share("a"),
        loss_share=share("b"),
        agreement=None if len(voters) < 2 else (cohens_kappa(shared) if two else fleiss_kappa(shared)),
        kappa="Cohen" if two else "Fleiss",
        shared_items=len(shared),
    )


def cohens_kappa(pairs: Sequence[Sequence[str]]) -> float | None:
    """Agreement of two voters beyond chance (Cohen 1960); null where chance alone would agree on everything.

    Args:
        pairs: what both said, an item each.
    """
    if not pairs:
        return None
    observed = sum(one == other for one, other in pairs) / len(pairs)
    first, second = (Counter(pair[at] for pair in pairs) for at in (0, 1))
    by_chance = sum(first[word] * second[word] for word in first) / len(pairs) ** 2
    return None if by_chance == 1 else (observed - by_chance) / (1 - by_chance)


def fleiss_kappa(rows: Sequence[Sequence[str]]) -> float | None:
    """Agreement of equally many voters an item beyond chance (Fleiss 1971); null where chance would agree on all."""
    if not rows:
        return None
    voters = len(rows[0])
    counts = [Counter(row) for row in rows]
    observed = sum(
        (sum(n * n for n in count.values()) - voters) / (voters * (voters - 1)) for count in counts
    ) / len(rows)  # fmt: skip
    overall = sum(counts, Counter[str]())
    by_chance = sum((n / overall.total()) ** 2 for n in overall.values())
    return None if by_chance == 1 else (observed - by_chance) / (1 - by_chance)


def items_as_json(study: HumanStudy, voter: str) -> list[dict[str, Any]]:
    """All items as a voter sees them, each with the votes already cast."""
    votes = votes_of(study)
    return [
        shown(study, item, voter)
        | {"votes": {a: votes[item.item, voter, a].choice for a in ASPECTS if (item.item, voter, a) in votes}}
        for item in study.items
    ]


def results_as_json(study: HumanStudy) -> str:
    """The results with the models' names."""
    found = {aspect: result.model_dump() for aspect, result in results(study).items()}
    return json.dumps({"study": study.study_id, "a": study.model_a, "b": study.model_b, "aspects": found}, indent=2)
