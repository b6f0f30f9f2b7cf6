"""Imitation: choose what is worth training on, then fine-tune the student in a process of its own."""

from collections import Counter
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from storage.files import Checkpoint, Snapshot
from storage.pools import by_id, read_rows, write_snapshot
from tasks.jobs.launch import make_checkpoint
from tasks.jobs.settings import SftSettings, launcher_command
from tasks.models.chat import Status, conversation
from tasks.policies import identity, stage
from tasks.progress import progress

VERSION = 1
TRAINER_VERSION = 1  # raise it when the trainer makes other weights from the same job


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
    left_out: dict[str, int]  # rows of the pool it was not trained on, by reason
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
    job = {
        "model": str(student.path),
        "data": str(data.path),
        "config": config.training.model_dump(mode="json"),
        "seed": seed,
    }
    made_from = {
        "version": TRAINER_VERSION,
        "student": student.digest,
        "data": data.digest,
        "config": identity(config.training),
        "seed": seed,
    }
    with progress("train the student") as on_progress:
        checkpoint, figures = make_checkpoint(
            "tasks.jobs.sft",
            job,
            made_from,
            launcher=launcher_command(config.training),
            on_progress=lambda report: on_progress(report.pop("done"), report.pop("total"), report),
        )
    return TrainedStudent(checkpoint=checkpoint, examples=data, left_out=dict(left_out), figures=figures)


class NothingToTrainOn(ValueError):
    """An imitation stage got no row to learn from."""
