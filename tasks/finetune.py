"""Imitation: choose what is worth training on, then fine-tune the student in a process of its own."""

import os
import shlex
import shutil
from collections import Counter
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from storage.files import Checkpoint, Snapshot
from storage.pools import by_id, read_rows, write_snapshot
from tasks.jobs.launch import checkpoint_folder, make_checkpoint
from tasks.jobs.settings import SftSettings, launcher_command
from tasks.models.chat import NOT_STORABLE, TURNS, Status, conversation, is_storable, is_turn
from tasks.policies import identity, stage
from tasks.progress import progress, tell

VERSION = 6  # raise it, too, when the trainer makes other weights from the same rows
TRAINER = "tasks.jobs.sft"


class FinetuneConfig(BaseModel):
    """How the student is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train_on_truncated: bool = Field(
        False,
        description="Train on answers that were cut at the teacher's own token limit too. They teach no end of turn.",
    )
    training: SftSettings = Field(SftSettings(), description="The trainer's own settings; the paper's by default.")


class TrainedStudent(BaseModel):
    """A student after one imitation stage."""

    checkpoint: Checkpoint
    examples: Snapshot  # what it was trained on
    rows: int  # of these, how many were trained on
    left_out: dict[str, int]  # rows it was not trained on, by reason
    figures: dict[str, Any]  # the trainer's own: losses, tokens, padding, speed


@stage("finetune", version=VERSION)
def finetune_student(
    config: FinetuneConfig,
    student: Checkpoint,
    pool: Snapshot,
    responses: Snapshot,
    system_prompt: str | None,
    seed: int,
) -> TrainedStudent:
    """Fine-tune a student on the teacher's responses to a pool. The loss counts the responses' tokens alone.

    Args:
        responses: the teacher's, to at least the rows of the pool.

    Raises:
        NothingToTrainOn: no row of the pool has a response worth training on.
        JobError: the trainer ended without a result; its last lines are in the message.
    """
    wanted = {Status.OK, Status.TRUNCATED} if config.train_on_truncated else {Status.OK}
    answers = by_id(responses, ["status", "response"])
    examples, left_out = [], Counter[str]()
    for row in read_rows(pool, ["instruction_id", "instruction", "input"]):
        answer = answers.get(row["instruction_id"])
        if answer is None or answer["status"] not in wanted:
            left_out[answer["status"] if answer else "unanswered"] += 1
            continue
        examples.append(
            {
                "instruction_id": row["instruction_id"],
                "messages": conversation(row["instruction"], row["input"], system_prompt),
                "response": answer["response"],
                "whole": answer["status"] == Status.OK,
            }
        )
    if not examples:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "the pool is empty"
        raise NothingToTrainOn(f"no row of the train pool has a response worth training on: {reasons}")
    data = write_snapshot("examples", examples, step="finetune", version=VERSION, inputs=[pool, responses])
    trained = train_student(config.training, student, data, seed)
    return trained.model_copy(update={"left_out": dict(left_out + Counter(trained.left_out))})


def train_student(settings: SftSettings, student: Checkpoint, data: Snapshot, seed: int) -> TrainedStudent:
    """Train on a table of examples. The same student, rows and settings are trained once, and found again.

    Raises:
        JobError: the trainer ended without a result; its last lines are in the message.
    """
    job = {
        "model": str(student.path),
        "data": str(data.path),
        "config": settings.model_dump(mode="json"),
        "seed": seed,
    }
    made_from = {
        "version": VERSION,
        "student": student.digest,
        "data": data.digest,
        "config": identity(settings),
        "seed": seed,
    }
    launcher = launcher_command(settings)
    environment = {}
    if launcher and "OMP_NUM_THREADS" not in os.environ:  # torchrun would leave each process a single thread
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // settings.processes_per_node))
    if settings.rdzv_endpoint:
        job_file = str(checkpoint_folder(TRAINER, made_from) / "job.json")
        command = shlex.join([*launcher, "-m", TRAINER, job_file])
        tell(f"Waiting for {settings.nodes} machines that share this home. On each of the others: {command}")
    with progress("train the student") as on_progress:
        checkpoint, figures = make_checkpoint(
            TRAINER,
            job,
            made_from,
            launcher=launcher,
            environment=environment,
            on_progress=lambda report: on_progress(report.pop("done"), report.pop("total"), report),
        )
    # The trainer's own last deed; one killed in it leaves the weights and the optimizer there, several times the model.
    shutil.rmtree(checkpoint.path / "trainer", ignore_errors=True)
    left_out = {reason: len(ids) for reason, ids in figures["left_out"].items() if ids}
    if figures["validation_rows"]:
        left_out["validation"] = figures["validation_rows"]
    return TrainedStudent(
        checkpoint=checkpoint, examples=data, rows=figures["rows"], left_out=left_out, figures=figures
    )


def examples_of(records: Iterable[tuple[str, Any]], system_prompt: str | None) -> list[dict[str, Any]]:
    """Rows to train on from a file's records: Alpaca (`instruction`, `input`, `output`), `messages` that end with the
    assistant's, or the columns of the table `examples`. A row without an id of its own is named by its place.

    Raises:
        NothingToTrainOn: a record holds no question, no answer, or no text that can be kept; the message names its place.
    """
    rows = []
    for where, record in records:
        known = record if isinstance(record, dict) else {}
        match known:
            case {"messages": [*asked], "response": str(answer)}:
                pass
            case {"messages": [*asked, {"role": "assistant", "content": str(answer)}]} if asked:
                pass
            case {"instruction": str(instruction), "output": str(answer)}:
                asked = conversation(instruction, known.get("input"), system_prompt)
            case _:
                found = ", ".join(str(key) for key in known if known[key] is not None) or type(record).__name__
                raise NothingToTrainOn(
                    f"{where}: no answer to train on (found: {found}). Wanted: `instruction` and `output`, or "
                    "`messages` whose last is the assistant's."
                )
        if not isinstance(known.get("input"), str | None) or not asked or not all(map(is_turn, asked)):
            raise NothingToTrainOn(
                f"{where}: `input` must be a text, and `messages` {TURNS}, at least one before the answer"
            )
        whole = known.get("whole")  # null in a table is what is not there
        if not isinstance(whole, bool | None):
            raise NothingToTrainOn(f"{where}: `whole` must be true, or false of an answer that was cut")
        if whole is None and known.get("status") == Status.TRUNCATED:  # so `lion answer` says it
            whole = False
        if not is_storable([asked, answer]):
            raise NothingToTrainOn(f"{where}: {NOT_STORABLE}")
        named = next((str(known[key]) for key in ("instruction_id", "id") if known.get(key) is not None), where)
        rows.append({"instruction_id": named, "messages": asked, "response": answer, "whole": whole is not False})
    return rows


class NothingToTrainOn(ValueError):
    """There is no row, or no answer in a row, to learn from."""
