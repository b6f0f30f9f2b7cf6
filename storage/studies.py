"""Studies: a student against a reference on a file of questions, kept apart from the runs that made the student.

`evaluations/<study_id>/study.json` is written last; the files beside it are for other programs to read.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from storage.files import Checkpoint, Pointer, Snapshot, home, write_atomic
from storage.runs import Interval, Manifest, are_whole, load_record, now, pointers_in


class Figures(BaseModel):
    """How the student does on some questions. All shares and intervals are null where there is no question."""

    model_config = ConfigDict(frozen=True)

    questions: int  # each turn of a conversation counts as one
    drawn: int | None = None  # of so many the intervals are: a conversation is one; null in studies of before
    by_order: dict[str, Interval]  # sum of student scores / sum of reference scores, in this order of the answers
    mean: Interval | None  # of the orders, as the paper reports it
    pooled: Interval | None  # both orders' scores in one sum: swapping the models gives exactly its inverse
    wins: int  # questions on which the student's mean score is higher by more than the tie margin
    ties: int
    losses: int
    position_effect: Interval | None  # points that an answer gains by standing first; null where order is no matter


class Relative(BaseModel):
    """A student against its reference."""

    model_config = ConfigDict(frozen=True)

    overall: Figures
    by_category: dict[str, Figures]
    left_out: int  # questions without a valid review in every order
    tie_margin: float  # points


class Study(BaseModel):
    """One evaluation: who, on what, judged how, and what came out."""

    study_id: str
    created: str = ""
    student: str  # as it was named
    checkpoint: Checkpoint
    run_id: str | None = None  # the run that made the student, where one of this home did
    iteration: int | None = None
    reference: str  # teacher, or the file or checkpoint that was named; of a suite lm-eval
    questions: str  # the file, or the suites
    rows: int  # questions, each of one turn or more
    settings: dict[str, Any] = Field(default_factory=dict)  # referee, sampling, tie margin, seed
    snapshots: dict[str, Snapshot] = Field(default_factory=dict)  # questions, student, reference, reviews
    relative: Relative | None = None  # null for a suite
    suite: dict[str, Any] = Field(default_factory=dict)  # lm-eval's own results, by task
    notes: list[str] = Field(default_factory=list)
    stage_keys: list[str] = Field(default_factory=list)

    @property
    def folder(self) -> Path:
        return home() / "evaluations" / self.study_id

    def save(self) -> None:
        """Write the study; this completes it."""
        self.created = now()
        write_atomic(self.folder / "study.json", self.model_dump_json(indent=2))

    def pointers(self) -> list[Pointer]:
        """All that this study refers to."""
        return pointers_in(self)

    def is_whole(self) -> bool:
        """Whether everything the study made is still there and undamaged."""
        return are_whole(self.snapshots.values())


def load_study(study_id: str) -> Study | None:
    """A study that was completed, or None.

    Raises:
        StorageError: there is one, and it cannot be read.
    """
    path = home() / "evaluations" / study_id / "study.json"
    return load_record(Study, path, "Move it away and evaluate again.")


def list_studies() -> list[Study]:
    """All studies of this home; the latest first."""
    names = (path.parent.name for path in (home() / "evaluations").glob("*/study.json"))
    found = [study for name in names if (study := load_study(name))]
    return sorted(found, key=lambda study: (study.created, study.study_id), reverse=True)


def studies_of(manifest: Manifest) -> list[Study]:
    """Those of one run's students, by its own iterations: runs that begin alike, or go on from each other, share students,
    and a study knows the one that was named; the latest first."""
    made = {student.digest: {"iteration": iteration} for iteration, student in manifest.students()}
    return [
        study if study.run_id == manifest.run_id else study.model_copy(update=made[study.checkpoint.digest])
        for study in list_studies()
        if study.run_id == manifest.run_id or study.checkpoint.digest in made
    ]
