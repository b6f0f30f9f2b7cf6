"""The manifest of a run: what was asked, what each iteration made, where it is.

`runs/<run_id>/manifest.json` is written whole after every stage, so that a run killed at any moment can be
looked at. It is a record: what is done and what is not is decided by the cache keys of the stages. What it decides is
whether a *completed* run has anything left to do, where another run goes on from, and what nobody needs any more.
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from storage.files import Checkpoint, Pointer, Snapshot, StorageError, home, is_locked, write_atomic

RunState = Literal["running", "completed", "failed", "paused", "interrupted"]
Record = TypeVar("Record", bound=BaseModel)


class Interval(BaseModel):
    """A figure with its 95 % interval (paired bootstrap by question, `tasks.relative`)."""

    model_config = ConfigDict(frozen=True)

    value: float
    low: float
    high: float


class Comparison(BaseModel):
    """A new student on the held-out instructions: beside the teacher, and beside the student it came after."""

    against: int  # iteration of the student it is compared with; 0: before any training
    relative: Interval | None  # sum of its scores / sum of the teacher's; null: nothing to score
    loss_gain: Interval | None  # nats per token that it lost since; above 0 is better
    score_gain: Interval | None  # points of mean score that it gained since


class Evaluation(BaseModel):
    """How good a student is on the held-out instructions."""

    loss: float | None  # nats per token of the teacher's answers; null where it is no number, or no row was answered
    score: float | None  # mean reference score, 1..10 (10: the teacher's own words); null: nothing to score
    rows: int
    scored: int  # rows with a score
    without_loss: int = 0  # rows of the details whose prompt fills the context, or is refused by the template
    details: Snapshot  # table evaluations: a row an instruction
    reviews: Snapshot | None = None  # the referee's, of these answers beside the teacher's; null where it is a metric

    @property
    def is_judged(self) -> bool:
        """Whether a model scored the answers: its scores and a metric's do not go into one column, row or line."""
        return self.reviews is not None

    @property
    def measured(self) -> int:
        """How many rows the loss is of."""
        return self.details.rows - self.without_loss


class Generated(BaseModel):
    """What became of the candidates of one iteration."""

    accepted: int = 0
    rejected: dict[str, int] = Field(default_factory=dict)  # by reason
    wanted: int = 0
    notes: list[str] = Field(default_factory=list)  # shortfalls, empty sides


class JudgeHealth(BaseModel):
    """How far the referee of one iteration can be trusted. A share is null where there is nothing to take it of.

    For comparison: a referee that tosses a coin flips four pairs of ten, one that only sees the place flips all.
    """

    reviews: int  # asked for; rows without two answers are not
    unusable: dict[str, int] = Field(default_factory=dict)  # of those, by outcome, after all asking again
    unusable_share: float | None = None
    pairs: int  # instructions with a valid review in both orders
    flip_share: float | None = None  # of the pairs: the winner changes with the order
    tie_share: float | None = None  # of the pairs: both answers are scored alike over both orders
    position_bias: float | None = None  # points that the first place is worth, mean over the pairs
    vote_agreement: float | None = None  # of (instruction, order) with several valid votes: all name one winner


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
    judge: JudgeHealth | None = None  # null where no model is the referee
    generated: Generated = Field(default_factory=Generated)
    evaluation: Evaluation | None = None
    comparison: Comparison | None = None
    rolled_back: bool = False  # worse than an earlier student, which goes on in its place
    notes: list[str] = Field(default_factory=list)  # rolled back, stopped: and why
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
    models: list[Checkpoint] = Field(default_factory=list)  # all that were prepared, of whatever role
    snapshots: dict[str, Snapshot] = Field(default_factory=dict)  # seeds, heldout, heldout_answers
    seconds: dict[str, float] = Field(default_factory=dict)
    cached: dict[str, bool] = Field(default_factory=dict)


class Manifest(BaseModel):
    """Everything worth knowing of a run. `lion show --json` prints it."""

    run_id: str
    state: RunState = "running"
    error: str | None = None
    started: str = ""
    updated: str = ""
    config: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    seeds: dict[str, Any] = Field(default_factory=dict)  # path, rows, and how many are not used, by reason
    warnings: list[str] = Field(default_factory=list)  # of the settings: possible, and perhaps not meant
    baseline: Baseline = Field(default_factory=Baseline)
    iterations: list[IterationRecord] = Field(default_factory=list)
    next_pools: dict[str, Snapshot] = Field(default_factory=dict)  # what an iteration more would start from
    approvals: dict[int, dict[str, Any]] = Field(default_factory=dict)  # by iteration: what a person answered
    flow_runs: list[str] = Field(default_factory=list)  # Prefect's ids of all flow runs that were at it
    stage_keys: list[str] = Field(default_factory=list)  # cache keys of the stages, for --fresh and gc
    earlier: list[Pointer] = Field(default_factory=list)  # made by earlier attempts; none once completed

    _before: "Manifest | None" = PrivateAttr(None)

    @property
    def folder(self) -> Path:
        return folder_of(self.run_id)

    @property
    def start_from(self) -> str:
        """Where it went on from; a run of before one could go on began from the base."""
        return self.config.get("start_from", "base")

    @property
    def teachers(self) -> list[str]:
        """The teachers as the settings name them, the main one first."""
        teacher = self.config["teacher"]
        models = [teacher["model"], *(further["model"] for further in teacher.get("further", []))]
        return list(dict.fromkeys(model.get("model") or model["model_name_or_path"] for model in models))

    def begin_again(self, before: "Manifest") -> None:
        """Take over from an earlier attempt at this run: it shows what that one had made until it has made as much."""
        self._before = before
        self.started, self.approvals, self.flow_runs = before.started, before.approvals, before.flow_runs
        self.stage_keys, self.earlier = before.stage_keys, list(dict.fromkeys(before.pointers()))

    def save(self) -> None:
        """Write the manifest, whole or not at all."""
        self.updated = now()
        shown = self
        if self._before and self.state != "completed" and len(self.evaluations()) < len(self._before.evaluations()):
            own = ("state", "error", "updated", "stage_keys", "approvals", "flow_runs", "earlier")
            shown = self._before.model_copy(update={name: getattr(self, name) for name in own})
        write_atomic(self.folder / "manifest.json", shown.model_dump_json(indent=2))

    def students(self) -> list[tuple[int, Checkpoint]]:
        """Every student with its iteration, the one before training as 0."""
        numbered = [(0, self.baseline.student), *((record.iteration, record.student) for record in self.iterations)]
        return [(iteration, student) for iteration, student in numbered if student]

    def evaluations(self) -> dict[int, Evaluation]:
        """How good its students are, by iteration, the one before training as 0; without those not evaluated yet."""
        found = [(0, self.baseline.evaluation), *((record.iteration, record.evaluation) for record in self.iterations)]
        return {iteration: evaluation for iteration, evaluation in found if evaluation}

    def best(self) -> tuple[int, Checkpoint] | None:
        """Iteration and checkpoint of the student to use: the last one that was not rolled back."""
        gone = {record.iteration for record in self.iterations if record.rolled_back or not record.evaluation}
        standing = [(iteration, student) for iteration, student in self.students() if iteration not in gone]
        return standing[-1] if standing else None

    def loss(self) -> float | None:
        """Held-out loss, in nats per token, of the student to use; none where it was not measured."""
        best = self.best()
        measured = self.evaluations().get(best[0]) if best else None
        return measured.loss if measured else None

    def lineage(self, iteration: int) -> list[IterationRecord]:
        """The iterations whose answers made the student of an iteration what it is."""
        if self.config["student"]["init_from"] == "base":
            return [record for record in self.iterations if record.iteration == iteration]
        made = [record for record in self.iterations if record.iteration <= iteration]
        return [record for record in made if record.iteration == iteration or not record.rolled_back]

    def is_stopped_by_hand(self) -> bool:
        """Whether a person had it end before the iteration that would come next, and may think otherwise by now."""
        done = {record.iteration for record in self.iterations}
        return any(said["decision"] == "stop here" for number, said in self.approvals.items() if number not in done)

    def state_now(self) -> str:
        """The state, and whether a run that says it is running still is."""
        return "interrupted" if self.state == "running" and not is_locked(f"run-{self.run_id}") else self.state

    def pointers(self) -> list[Pointer]:
        """All that this run refers to."""
        return pointers_in(self)

    def is_whole(self) -> bool:
        """Whether everything the run made is still there and undamaged."""
        return are_whole(self.pointers()) and (self.folder / "report.html").is_file()


def folder_of(run_id: str) -> Path:
    return home() / "runs" / run_id


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def load_manifest(run_id: str) -> Manifest | None:
    """The manifest of a run, or None if there is none.

    Raises:
        StorageError: there is one, and it cannot be read.
    """
    way_out = "Move it away and run again: no work is lost."
    return load_record(Manifest, folder_of(run_id) / "manifest.json", way_out)


def load_record(kind: type[Record], path: Path, way_out: str) -> Record | None:
    """What a file of JSON tells of a run or a study, or None if it is not there.

    Raises:
        StorageError: it is there, and it cannot be read.
    """
    if not path.is_file():
        return None
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValueError as error:
        raise StorageError(f"{path} cannot be read ({error}). {way_out}") from error


def list_manifests() -> list[Manifest]:
    """All runs of this home, the one touched last coming first."""
    names = (path.parent.name for path in (home() / "runs").glob("*/manifest.json"))
    found = [manifest for name in names if (manifest := load_manifest(name))]
    return sorted(found, key=lambda manifest: (manifest.updated, manifest.run_id), reverse=True)


def named_start(start_from: str) -> tuple[str, int | None] | None:
    """The run that `run:ID` or `run:ID:ITERATION` goes on from, and after which iteration, if it says; None for the base."""
    if start_from == "base":
        return None
    run_id, _, iteration = start_from.removeprefix("run:").partition(":")
    return run_id, int(iteration) if iteration else None


def chains(manifests: Sequence[Manifest]) -> list[list[Manifest]]:
    """The runs by chain, the latest chain first: each from its last run back to its first."""
    by_id = {manifest.run_id: manifest for manifest in manifests}

    def before(manifest: Manifest) -> Manifest | None:
        named = named_start(manifest.start_from)
        return by_id.get(named[0]) if named else None

    gone_on_from = {earlier.run_id for manifest in manifests if (earlier := before(manifest))}
    found = []
    for last in manifests:
        if last.run_id not in gone_on_from:
            chain = [last]
            while earlier := before(chain[-1]):
                chain.append(earlier)
            found.append(chain)
    return found


def are_whole(pointers: Iterable[Pointer]) -> bool:
    """Whether all that is pointed to is there and undamaged."""
    try:
        for pointer in pointers:
            pointer.verify()
    except StorageError:
        return False
    return True


def pointers_in(value: Any) -> list[Pointer]:
    """The pointers inside a value: itself, or those in the fields of a model, a dict, a list."""
    if isinstance(value, Pointer):
        return [value]
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields}  # dict() trips over a field `keys`
    if isinstance(value, dict):
        value = list(value.values())
    return [pointer for item in value for pointer in pointers_in(item)] if isinstance(value, list | tuple) else []
