"""The teacher answers a pool. A row it has answered before is copied, not asked again."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from storage.files import Snapshot
from storage.pools import by_id, read_rows, write_snapshot
from tasks.models.budget import Account
from tasks.models.chat import Request, Sampling, Status, conversation, response_row
from tasks.models.local import LocalModel
from tasks.models.ready import ModelSettings, ReadyModel, answer
from tasks.policies import OPERATIONAL, stage
from tasks.progress import progress

VERSION = 1


class TeacherConfig(BaseModel):
    """The model that is learned from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelSettings = Field(
        LocalModel(), description="A local model, or an OpenAI-compatible endpoint (kind: openai)."
    )
    sampling: Sampling = Field(Sampling(), description="The paper: temperature 0.7, at most 1,024 new tokens.")
    system_prompt: str | None = Field(None, description="Said before every instruction to the teacher.")
    license: str | None = Field(
        None,
        description="Terms under which the teacher's text may be used, as a licence's name; goes into exports and cards.",
        json_schema_extra=OPERATIONAL,
    )
    draw: int = Field(0, ge=0, description="Raise it to buy a new answer to everything, on purpose.")


@stage("teacher", version=VERSION)
def answer_with_teacher(
    config: TeacherConfig, model: ReadyModel, pool: Snapshot, known: Sequence[Snapshot], seed: int, account: Account
) -> Snapshot:
    """The teacher's responses to every row of a pool, in the pool's order.

    Args:
        known: responses of the same teacher from before. A row found there costs nothing.

    Raises:
        JobError, ModelError: as the model raises them.
    """
    answered = {
        key: row for snapshot in known for key, row in by_id(snapshot).items() if row["status"] != Status.FAILED
    }
    rows = read_rows(pool, ["instruction_id", "instruction", "input"])
    requests = [
        Request(
            id=row["instruction_id"],
            messages=tuple(conversation(row["instruction"], row["input"], config.system_prompt)),
            draw=config.draw,
        )
        for row in rows
        if row["instruction_id"] not in answered
    ]
    with progress("teacher answers") as on_progress:
        replies = answer(model, requests, config.sampling, seed=seed, account=account, on_progress=on_progress)
    answered |= {reply.id: response_row(reply, "teacher") for reply in replies}
    return write_snapshot(
        "responses",
        (answered[row["instruction_id"]] for row in rows),
        step="teacher",
        version=VERSION,
        inputs=[pool, *known],
    )
