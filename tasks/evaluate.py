"""Did it help? The student on instructions that no pool holds, against the teacher's answers to them."""

import math
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from storage.files import Snapshot
from storage.pools import by_id, read_rows, write_snapshot
from storage.runs import Evaluation
from tasks.models.chat import Reply, Request, Sampling, Status, conversation
from tasks.models.local import LocalModel, infer
from tasks.models.ready import ReadyModel
from tasks.policies import stage
from tasks.progress import progress
from tasks.scores import reference_score

VERSION = 2


class EvaluationConfig(BaseModel):
    """How the student is evaluated after each iteration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sampling: Sampling = Field(
        Sampling(temperature=0.0, max_tokens=1024), description="Of the student's held-out answers; greedy by default."
    )
    by_referee: bool = Field(
        True,
        description="Where the referee is a model, it compares the held-out answers with the teacher's, too: the "
        "relative score is then its, as in the paper's tables. Costs two reviews a question and vote.",
    )


@stage("evaluate", version=VERSION)
def evaluate_student(
    config: EvaluationConfig,
    student: ReadyModel,
    heldout: Snapshot,
    teacher_answers: Snapshot,
    system_prompt: str | None,
    seed: int,
) -> Evaluation:
    """Loss per token of the teacher's held-out answers, and mean reference score of the student's own.

    Rows that the teacher did not answer are left out of both; `rows` says how many there were.

    Raises:
        JobError: the process ended without a result.
    """
    assert isinstance(student.settings, LocalModel) and student.checkpoint, "a student is a model of this machine"
    reference = {
        key: row
        for key, row in by_id(teacher_answers, ["status", "response"]).items()
        if row["status"] in {Status.OK, Status.TRUNCATED}
    }
    messages = {
        row["instruction_id"]: conversation(row["instruction"], row["input"], system_prompt)
        for row in read_rows(heldout)
        if row["instruction_id"] in reference
    }
    requests = [Request(id=key, messages=tuple(said)) for key, said in messages.items()]
    answers = [
        {"id": key, "messages": said, "answer": reference[key]["response"], "whole": reference[key]["status"] == "ok"}
        for key, said in messages.items()
    ]
    with progress("evaluate the student") as on_progress:
        replies, losses = infer(
            student.settings, student.checkpoint, requests, answers, config.sampling, seed=seed, on_progress=on_progress
        )
    rows = [_row(reply, reference[reply.id]["response"], *losses[reply.id]) for reply in replies]
    scores = [row["score"] for row in rows if row["score"] is not None]
    tokens = sum(row["tokens"] for row in rows)
    loss = sum(row["loss_sum"] for row in rows if row["tokens"]) / tokens if tokens else math.nan
    return Evaluation(
        loss=loss if math.isfinite(loss) else None,
        score=sum(scores) / len(scores) if scores else None,
        rows=heldout.rows,
        scored=len(scores),
        without_loss=sum(not row["tokens"] for row in rows),
        details=write_snapshot(
            "evaluations", rows, step="evaluate", version=VERSION, inputs=[heldout, teacher_answers]
        ),
    )


def _row(reply: Reply, wanted: str, loss_sum: float | None, tokens: int) -> dict[str, Any]:
    """A row of the table `evaluations`; `wanted` is the teacher's answer."""
    return {
        "instruction_id": reply.id,
        "response": reply.text,
        "status": reply.status,
        "loss_sum": loss_sum,
        "tokens": tokens,
        "score": None if reply.status is Status.FAILED else reference_score(reply.text or "", wanted),
    }
