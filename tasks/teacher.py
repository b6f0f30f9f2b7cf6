"""The teacher, or several, each for its part, answer a pool. A row answered before is copied, not asked again."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from storage.files import OPERATIONAL, Snapshot, digest_of
from storage.pools import by_id, read_rows, write_snapshot
from tasks.models.budget import Account
from tasks.models.chat import Request, Sampling, Status, conversation, response_row
from tasks.models.local import LocalModel
from tasks.models.ready import ModelSettings, ReadyModel, answer
from tasks.policies import stage
from tasks.progress import progress

VERSION = 2


class FurtherTeacher(BaseModel):
    """Another teacher, for a part of the instructions: a category, or a share of those in no teacher's category."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelSettings = Field(description="A local model, or an OpenAI-compatible endpoint (kind: openai).")
    share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the instructions in no further teacher's category, drawn by their digest.",
    )
    category: str | None = Field(None, min_length=1, description="All instructions of this category.")

    @model_validator(mode="after")
    def _has_one_part(self) -> "FurtherTeacher":
        if (self.share is None) == (self.category is None):
            raise ValueError("a further teacher has either a `share` or a `category`")
        return self


class TeacherConfig(BaseModel):
    """The model that is learned from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelSettings = Field(
        LocalModel(), description="A local model, or an OpenAI-compatible endpoint (kind: openai)."
    )
    further: tuple[FurtherTeacher, ...] = Field(
        (), max_length=8, description="More teachers, each for a share or a category; `model` answers the rest."
    )
    sampling: Sampling = Field(Sampling(), description="The paper: temperature 0.7, at most 1,024 new tokens.")
    system_prompt: str | None = Field(None, description="Said before every instruction to the teacher.")
    license: str | None = Field(
        None,
        description="Terms under which the teacher's text may be used, as a licence's name; goes into exports and cards.",
        json_schema_extra=OPERATIONAL,
    )
    draw: int = Field(0, ge=0, description="Raise it to buy a new answer to everything, on purpose.")

    @model_validator(mode="after")
    def _parts_fit(self) -> "TeacherConfig":
        if (total := sum(teacher.share or 0 for teacher in self.further)) > 1 + 1e-9:
            raise ValueError(f"the shares of the further teachers add up to {total:g}, more than 1")
        named = [teacher.category for teacher in self.further if teacher.category]
        if len(named) != len(set(named)):
            raise ValueError(f"a category has one teacher, not several: {', '.join(named)}")
        return self

    @property
    def models(self) -> list[ModelSettings]:
        """All teachers' models, the main one first."""
        return [self.model, *(teacher.model for teacher in self.further)]

    def chosen(self, row: dict[str, Any]) -> int:
        """Which of `models` answers an instruction: by its category, else by its digest, which is as good as chance."""
        for number, teacher in enumerate(self.further, 1):
            if teacher.category and teacher.category == row["category"]:
                return number
        point, reached = int(digest_of(row["instruction_id"])[:8], 16) / 16**8, 0.0
        for number, teacher in enumerate(self.further, 1):
            reached += teacher.share or 0
            if point < reached:
                return number
        return 0

    def request(self, row: dict[str, Any]) -> Request:
        """How an instruction is put to a teacher."""
        messages = conversation(row["instruction"], row["input"], self.system_prompt)
        return Request(id=row["instruction_id"], messages=tuple(messages), draw=self.draw)


@stage("teacher", version=VERSION)
def answer_with_teacher(
    config: TeacherConfig,
    models: Sequence[ReadyModel],
    pool: Snapshot,
    known: Sequence[Snapshot],
    seed: int,
    account: Account,
) -> Snapshot:
    """The teachers' responses to every row of a pool, in the pool's order.

    Args:
        models: as many as `config.models`, in that order.
        known: responses of the same teachers from before. A row found there costs nothing.

    Raises:
        JobError, ModelError: as the model raises them.
    """
    answered = {
        key: row for snapshot in known for key, row in by_id(snapshot).items() if row["status"] != Status.FAILED
    }
    rows = read_rows(pool, ["instruction_id", "instruction", "input", "category"])
    for number, model in enumerate(models):
        mine = [row for row in rows if row["instruction_id"] not in answered and config.chosen(row) == number]
        requests = [config.request(row) for row in mine]
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
