"""The student answers a pool, in a process of its own."""

from pydantic import BaseModel, ConfigDict, Field

from storage.files import Snapshot
from storage.pools import read_rows, write_snapshot
from tasks.models.chat import Request, Sampling, conversation, response_row
from tasks.models.local import LocalModel
from tasks.models.ready import ReadyModel, answer
from tasks.policies import stage
from tasks.prepare import StudentInit
from tasks.progress import progress

VERSION = 1


class StudentConfig(BaseModel):
    """The compact model that learns."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: LocalModel = Field(LocalModel(), description="What the student starts from, and how it is run.")
    start: StudentInit = Field(StudentInit(), description="As the base model is, or pruned to fewer layers.")
    init_from: str = Field(
        "previous",
        pattern="^(previous|base)$",
        description="What an iteration trains: the student of the iteration before (the paper), or the base again.",
    )
    sampling: Sampling = Field(Sampling(), description="The paper: temperature 0.7, at most 1,024 new tokens.")
    system_prompt: str | None = Field(None, description="Said before every instruction, in training as well.")


@stage("student", version=VERSION)
def answer_with_student(config: StudentConfig, model: ReadyModel, pool: Snapshot, seed: int) -> Snapshot:
    """The student's responses to every row of a pool, in the pool's order.

    Raises:
        JobError: the process ended without a result.
    """
    requests = [
        Request(
            id=row["instruction_id"],
            messages=tuple(conversation(row["instruction"], row["input"], config.system_prompt)),
        )
        for row in read_rows(pool, ["instruction_id", "instruction", "input"])
    ]
    with progress("student answers") as on_progress:
        replies = answer(model, requests, config.sampling, seed=seed, on_progress=on_progress)
    rows = (response_row(reply, "student") for reply in replies)
    return write_snapshot("responses", rows, step="student", version=VERSION, inputs=[pool])
