"""The referee compares the student's response with the teacher's, row by row.

`reference` is a metric: ROUGE-L to the teacher's words. `llm` is a model that reads both responses, in both
orders, since the mere order moves the paper's own scores by up to 3.6 points of a hundred.
"""

from collections.abc import Iterator
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from storage.files import Snapshot
from storage.pools import by_id, write_snapshot
from tasks.models.budget import Account
from tasks.models.chat import Request, Sampling, Status
from tasks.models.prompts import load
from tasks.models.ready import ModelSettings, ReadyModel, answer
from tasks.models.reviews import BEST_SCORE, Outcome, parse_review
from tasks.policies import stage
from tasks.progress import progress
from tasks.scores import reference_score

VERSION = 2
PROMPT = load("referee.md")
ORDERS = ("teacher_first", "student_first")
REVIEW_SCHEMA = {
    "type": "object",
    "properties": {
        "evidence": {"type": "string"},
        "first_score": {"type": "number"},
        "second_score": {"type": "number"},
    },
    "required": ["evidence", "first_score", "second_score"],
    "additionalProperties": False,
}


class ReferenceReferee(BaseModel):
    """No model: the student's score is 1 + 9 x ROUGE-L F to the teacher's response, the teacher's is 10."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["reference"] = "reference"


class LLMReferee(BaseModel):
    """A model reads both responses in both orders and scores each from 1 to 10."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["llm"] = "llm"
    model: ModelSettings = Field(description="A local model, or an OpenAI-compatible endpoint (kind: openai).")
    sampling: Sampling = Field(
        Sampling(temperature=0.2, max_tokens=512), description="The paper: temperature 0.2, at most 512 new tokens."
    )
    votes: int = Field(1, ge=1, le=9, description="Draws of each order; their scores are averaged.")
    max_asks: int = Field(3, ge=1, le=10, description="How often a review that cannot be used is asked for in all.")

    @property
    def reviews_per_row(self) -> int:
        """Requests for one row, if none is asked again."""
        return len(ORDERS) * self.votes


RefereeConfig = Annotated[ReferenceReferee | LLMReferee, Field(discriminator="kind")]


@stage("referee", version=VERSION, prompts=[PROMPT.text])
def review_responses(
    config: RefereeConfig,
    model: ReadyModel | None,
    pool: Snapshot,
    teacher_responses: Snapshot,
    student_responses: Snapshot,
    seed: int,
    account: Account,
) -> Snapshot:
    """Reviews of every row of the pool. A row without two responses gets a review with the outcome `missing`.

    Args:
        model: the referee's; null for the kind `reference`.

    Raises:
        JobError, ModelError: as the model raises them.
    """
    teacher, student = (by_id(snapshot, ["status", "response"]) for snapshot in (teacher_responses, student_responses))
    pairs = [
        (row, _said(teacher.get(key)), _said(student.get(key)))
        for key, row in by_id(pool, ["instruction", "input"]).items()
    ]
    if isinstance(config, LLMReferee):
        assert model is not None, "an llm referee has a model"
        reviews = _review_with_model(config, model, pairs, seed, account)
    else:
        reviews = list(_review_by_reference(pairs))
    return write_snapshot(
        "reviews", reviews, step="referee", version=VERSION, inputs=[pool, teacher_responses, student_responses]
    )


Pair = tuple[dict[str, Any], str | None, str | None]  # the instruction, the teacher's words, the student's


def _said(response: dict[str, Any] | None) -> str | None:
    """The words of a response that can be compared; null where there is none. An empty answer is an answer."""
    if response is None or response["status"] in {Status.FAILED, Status.FILTERED}:
        return None
    return response["response"] or ""


def _row(pair: Pair, order: str, vote: int, outcome: Outcome, **scores: Any) -> dict[str, Any]:
    return {"instruction_id": pair[0]["instruction_id"], "order": order, "vote": vote, "outcome": outcome, **scores}


def _review_by_reference(pairs: list[Pair]) -> Iterator[dict[str, Any]]:
    for pair in pairs:
        _, reference, response = pair
        if not reference or not reference.strip() or response is None:
            yield _row(pair, "unordered", 0, Outcome.MISSING)
        else:
            score = reference_score(response, reference)
            yield _row(pair, "unordered", 0, Outcome.OK, teacher_score=BEST_SCORE, student_score=score)


def _review_with_model(
    config: LLMReferee, model: ReadyModel, pairs: list[Pair], seed: int, account: Account
) -> list[dict[str, Any]]:
    """Ask for every order and vote; ask again, as a new draw, for those that came back unusable."""
    rows: dict[str, dict[str, Any]] = {}
    asked: dict[str, tuple[Pair, str, int]] = {}
    for pair, order, vote in product(pairs, ORDERS, range(config.votes)):
        key = f"{pair[0]['instruction_id']}/{order}/{vote}"
        if pair[1] is None or pair[2] is None:
            rows[key] = _row(pair, order, vote, Outcome.MISSING)
        else:
            rows[key], asked[key] = {}, (pair, order, vote)
    for ask in range(config.max_asks):
        requests = [_request(key, *question, draw=question[2] + ask * config.votes) for key, question in asked.items()]
        with progress("referee reviews" if ask == 0 else f"referee reviews, ask {ask + 1}") as on_progress:
            replies = answer(model, requests, config.sampling, seed=seed, account=account, on_progress=on_progress)
        for reply in replies:
            pair, order, vote = asked[reply.id]
            rows[reply.id] = _parsed(pair, order, vote, reply.status, reply.text)
            if rows[reply.id]["outcome"] in {Outcome.OK, Outcome.FAILED}:  # a failure was tried again by itself
                del asked[reply.id]
        if not asked:
            break
    return list(rows.values())


def _request(key: str, pair: Pair, order: str, vote: int, *, draw: int) -> Request:
    row, teacher, student = pair
    first, second = (teacher, student) if order == "teacher_first" else (student, teacher)
    text = PROMPT.render(instruction=row["instruction"], input=row["input"], first=first, second=second)
    messages = ({"role": "user", "content": text},)
    return Request(id=key, messages=messages, draw=draw, response_schema=REVIEW_SCHEMA)


def _parsed(pair: Pair, order: str, vote: int, status: Status, text: str | None) -> dict[str, Any]:
    unusable = {
        Status.TRUNCATED: Outcome.TRUNCATED,
        Status.REFUSED: Outcome.REFUSED,
        Status.FILTERED: Outcome.REFUSED,
        Status.FAILED: Outcome.FAILED,
    }
    if status in unusable:
        return _row(pair, order, vote, unusable[status], evidence=text)
    parsed = parse_review(text or "")
    if parsed.outcome != Outcome.OK:
        return _row(pair, order, vote, parsed.outcome, evidence=text)
    first, second = parsed.first_score, parsed.second_score
    teacher, student = (first, second) if order == "teacher_first" else (second, first)
    return _row(pair, order, vote, Outcome.OK, teacher_score=teacher, student_score=student, evidence=parsed.evidence)
