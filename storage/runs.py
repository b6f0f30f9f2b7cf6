"""The manifest of a run: what was asked, what each iteration made, where it is.

`runs/<run_id>/manifest.json` is written whole after every stage, so that a run killed at any moment can be
looked at. It is a record and never a decision: what is done and what is not is decided by the cache keys of the
stages. The one exception is the question whether a *completed* run has anything left to do.
"""

import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from storage.files import Checkpoint, Pointer, Snapshot, StorageError, home, is_locked, write_atomic

State = Literal["running", "completed", "failed", "paused", "interrupted"]


class Evaluation(BaseModel):
    """How good a student is on the held-out instructions."""

    loss: float | None  # nats per token of the teacher's answers; null for a student whose logits cannot be had
    score: float | None  # mean reference score, 1..10 (10: the teacher's own words); null: nothing to score
    rows: int
    scored: int  # rows with a score
    details: Snapshot  # table evaluations: a row an instruction


class Generated(BaseModel):
    """What became of the candidates of one iteration."""

    accepted: int = 0
    rejected: dict[str, int] = Field(default_factory=dict)  # by reason
    wanted: int = 0
    notes: list[str] = Field(default_factory=list)  # shortfalls, empty sides


class IterationRecord(BaseModel):
    """One iteration, as far as it has come."""

    iteration: int
    train_rows: int = 0
    cache_rows: int = 0
    trained_rows: int = 0  # of the train pool: those with an answer worth training on
    left_out: dict[str, int] = Field(default_factory=dict)  # of the train pool, by reason
    hard: int = 0
    easy: int = 0
    undecided: int = 0
    threshold: float | None = None
    generated: Generated = Field(default_factory=Generated)
    evaluation: Evaluation | None = None
    student: Checkpoint | None = None
    snapshots: dict[str, Snapshot] = Field(default_factory=dict)  # by view: train_pool, cache_pool, reviews, ...
    training: dict[str, Any] = Field(default_factory=dict)  # the trainer's result: losses, tokens, padding
    seconds: dict[str, float] = Field(default_factory=dict)  # by stage, as spent in the latest attempt
    cached: dict[str, bool] = Field(default_factory=dict)  # by stage: nothing was done, the result was there


class Baseline(BaseModel):
    """The student before any training, and what has to be there before the first iteration."""

    evaluation: Evaluation | None = None
    student: Checkpoint | None = None
    teacher: Checkpoint | None = None  # null where the teacher is an endpoint
    snapshots: dict[str, Snapshot] = Field(default_factory=dict)  # seeds, heldout, heldout_answers
    seconds: dict[str, float] = Field(default_factory=dict)
    cached: dict[str, bool] = Field(default_factory=dict)


class Manifest(BaseModel):
    """Everything worth knowing of a run. `lion show --json` prints it."""

    run_id: str
    state: State = "running"
    error: str | None = None
    started: str = ""
    updated: str = ""
    config: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    seeds: dict[str, Any] = Field(default_factory=dict)  # file, rows, duplicates removed
    baseline: Baseline = Field(default_factory=Baseline)
    iterations: list[IterationRecord] = Field(default_factory=list)
    next_pools: dict[str, Snapshot] = Field(default_factory=dict)  # what an iteration more would start from
    approvals: dict[int, dict[str, Any]] = Field(default_factory=dict)  # by iteration: what a person answered
    stage_keys: list[str] = Field(default_factory=list)  # cache keys of the stages, for --fresh and gc

    @property
    def folder(self) -> Path:
        return folder_of(self.run_id)

    def save(self) -> None:
        self.updated = now()
        write_atomic(self.folder / "manifest.json", self.model_dump_json(indent=2))

    def state_now(self) -> str:
        """The state, and whether a run that says it is running still is."""
        return "interrupted" if self.state == "running" and not is_locked(f"run-{self.run_id}") else self.state

    def pointers(self) -> list[Pointer]:
        """All that this run refers to."""
        return pointers_in(self)

    def is_whole(self) -> bool:
        """Whether everything the run made is still there and undamaged."""
        try:
            for pointer in self.pointers():
                pointer.verify()
        except StorageError:
            return False
        return (self.folder / "report.html").is_file()


def folder_of(run_id: str) -> Path:
    return home() / "runs" / run_id


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def load_manifest(run_id: str) -> Manifest | None:
    """The manifest of a run, or None if there is none.

    Raises:
        StorageError: there is one, and it cannot be read.
    """
    path = folder_of(run_id) / "manifest.json"
    if not path.is_file():
        return None
    try:
        return Manifest.model_validate_json(path.read_text())
    except ValueError as error:
        raise StorageError(f"{path} cannot be read ({error}). Move it away and run again: no work is lost.") from error


def forget(manifest: Manifest) -> None:
    """Take away what makes a run's stages count as done: their records, and the models they trained."""
    for key in manifest.stage_keys:
        (home() / "results" / key).unlink(missing_ok=True)
    for pointer in manifest.pointers():
        if isinstance(pointer, Checkpoint):
            shutil.rmtree(pointer.path, ignore_errors=True)


def list_manifests() -> list[Manifest]:
    """All runs of this home, the one touched last coming first."""
    names = (path.parent.name for path in (home() / "runs").glob("*/manifest.json"))
    found = [manifest for name in names if (manifest := load_manifest(name))]
    return sorted(found, key=lambda manifest: (manifest.updated, manifest.run_id), reverse=True)


def chains(manifests: Sequence[Manifest]) -> list[list[Manifest]]:
    """The runs by chain, the latest chain first: each from its last run back to its first."""
    by_id = {manifest.run_id: manifest for manifest in manifests}

    def before(manifest: Manifest) -> Manifest | None:
        start: str = manifest.config.get("start_from", "base")
        return by_id.get(start.removeprefix("run:").partition(":")[0])

    gone_on_from = {earlier.run_id for manifest in manifests if (earlier := before(manifest))}
    found = []
    for last in manifests:
        if last.run_id not in gone_on_from:
            chain = [last]
            while earlier := before(chain[-1]):
                chain.append(earlier)
            found.append(chain)
    return found


def pointers_in(value: Any) -> list[Pointer]:
    """The pointers inside a value: itself, or those in the fields of a model, a dict, a list."""
    if isinstance(value, Pointer):
        return [value]
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields}  # dict() trips over a field `keys`
    if isinstance(value, dict):
        value = list(value.values())
    return [pointer for item in value for pointer in pointers_in(item)] if isinstance(value, list | tuple) else []
