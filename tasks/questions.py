"""The questions of an evaluation: read from a file, asked turn by turn, answered by a model or from a file.

A question of several turns is a row a turn, each row's parent being the turn before. What a model answered to the
first turn stands in its conversation when the second is asked.
"""

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from storage.files import Snapshot
from storage.pools import instruction_id, read_rows, write_snapshot
from tasks.models.budget import Account
from tasks.models.chat import (
    NOT_STORABLE,
    Reply,
    Request,
    Sampling,
    Status,
    conversation,
    is_storable,
    response_row,
)
from tasks.models.ready import ReadyModel, answer
from tasks.policies import stage
from tasks.progress import progress
from tasks.seed import SeedError, read_records, read_seeds

VERSION = 1


class Questions(BaseModel):
    """The questions of one file."""

    model_config = ConfigDict(frozen=True)

    turns: Snapshot  # table instructions: a row a turn, in the file's order
    conversations: list[list[str]]  # for each question the instruction_ids of its turns
    source_ids: list[str | int]  # the file's own name of each question, else its number
    left_out: int  # questions that begin as an earlier one does


def read_questions(path: str, max_rows: int | None = None) -> Questions:
    """Read FastChat's question.jsonl, or instructions in any form that seeds may have; `bundled` is the held-out set.

    Raises:
        SeedError: the file cannot be used; names file, place and way out.
    """
    rows, conversations = [], []
    source_ids: dict[str, str | int] = {}  # as an answer may name it: a 1 or a "1"
    read = read_seeds(path, bundled="heldout.jsonl")
    for number, row in enumerate(read.rows[:max_rows], 1):
        ids: list[str] = []
        for text in (row["instruction"], *row["later_turns"]):
            if not isinstance(text, str):  # a message may also be null or a list, with a picture in it
                raise SeedError(f"{path}, question {number}: a later turn must be a text, not {text!r}.")
            before = ids[-1] if ids else None
            # A later turn means something only after those before it: so they are in its id.
            ids.append(instruction_id(text, before or row["input"]))
            rows.append(
                {
                    "instruction_id": ids[-1],
                    "instruction": text,
                    "input": None if before else row["input"],
                    "category": row["category"],
                    "origin": "question",
                    "parent_id": before,
                    "output": None if before else row["output"],
                }
            )
        conversations.append(ids)
        id = number if row["source_id"] in (None, "") else row["source_id"]  # an empty cell of a CSV is no id
        if not isinstance(id, str | int):
            raise SeedError(f"{path}, question {number}: its id must be a text or a whole number, not {id!r}.")
        if str(id) in source_ids:
            raise SeedError(
                f"{path}, question {number}: the id {id!r} is there twice; one without an id has its number. Rename one."
            )
        source_ids[str(id)] = id
    turns = write_snapshot("instructions", rows, step="questions", version=VERSION)
    named = list(source_ids.values())
    return Questions(turns=turns, conversations=conversations, source_ids=named, left_out=read.duplicates)


@stage("ask", version=VERSION)
def answer_questions(
    role: str,
    model: ReadyModel,
    questions: Snapshot,
    sampling: Sampling,
    system_prompt: str | None,
    seed: int,
    account: Account,
) -> Snapshot:
    """A model's responses to every turn, in the questions' order.

    Args:
        role: teacher or student, as the table `responses` names it.

    Raises:
        JobError, ModelError: as the model raises them.
    """
    waiting = read_rows(questions)
    so_far: dict[str, list[dict[str, str]]] = {}  # the conversation up to and with the answer to this turn
    rows: dict[str, dict[str, Any]] = {}
    while waiting:
        now = [row for row in waiting if row["parent_id"] is None or row["parent_id"] in rows]
        waiting = [row for row in waiting if row["parent_id"] is not None and row["parent_id"] not in rows]
        requests = []
        for row in now:
            if row["parent_id"] is None:
                said = conversation(row["instruction"], row["input"], system_prompt)
            elif row["parent_id"] in so_far:
                said = [*so_far[row["parent_id"]], *conversation(row["instruction"], None)]
            else:  # nothing came to the turn before, so this one cannot be asked
                lost = Reply(row["instruction_id"], Status.FAILED, None, error="the turn before has no answer")
                rows[row["instruction_id"]] = response_row(lost, role)
                continue
            requests.append(Request(id=row["instruction_id"], messages=tuple(said)))
        with progress(f"{role} answers") as on_progress:
            replies = answer(model, requests, sampling, seed=seed, account=account, on_progress=on_progress)
        for request, reply in zip(requests, replies, strict=True):
            rows[reply.id] = response_row(reply, role)
            if reply.text is not None:
                so_far[reply.id] = [*request.messages, {"role": "assistant", "content": reply.text}]
    order = [row["instruction_id"] for row in read_rows(questions, ["instruction_id"])]
    return write_snapshot("responses", (rows[key] for key in order), step="ask", version=VERSION, inputs=[questions])


def read_answers(path: Path, questions: Questions) -> tuple[Snapshot, int]:
    """Reference answers from a file, and how many turns have none in it.

    Accepted: FastChat's answer files (`question_id`, `choices[0].turns`), and instructions with an `output`, joined
    by their words.

    Raises:
        SeedError: the file cannot be read, or answers none of the questions.
    """
    turns = {row["instruction_id"]: row for row in read_rows(questions.turns)}
    by_source = dict(zip(map(str, questions.source_ids), questions.conversations, strict=True))
    found: dict[str, str] = {}
    name, fastchat = path.stem, False
    place, records = read_records(str(path))
    for where, record in records:
        if isinstance(record, dict) and "choices" in record:
            name, fastchat = str(record.get("model_id") or name), True
            said = zip(by_source.get(str(record.get("question_id")), []), _choice(record, f"{place}, {where}"))
            found |= {key: text for key, text in said if text is not None}
    if not fastchat:
        for row in read_seeds(str(path)).rows:
            key = instruction_id(row["instruction"], row["input"])
            if row["output"] and key in turns:
                found[key] = row["output"]
    if not found:
        raise SeedError(
            f"{path}: answers none of the questions. Expected FastChat's answer lines (question_id, choices), or the "
            "questions' own instructions with an `output`."
        )
    rows = (response_row(_given(key, found.get(key), name), "teacher") for key in turns)
    answers = write_snapshot("responses", rows, step="questions", version=VERSION, inputs=[questions.turns])
    return answers, len(turns) - len(found)


def _choice(record: dict[str, Any], where: str) -> list[str | None]:
    """The answers of a line; null where `lion evaluate` wrote a text for none, whose status says so."""
    try:
        turns, status = record["choices"][0]["turns"], record["choices"][0].get("status")
    except (TypeError, KeyError, IndexError):
        turns = status = None
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise SeedError(f"{where}: expected the answers as `choices[0].turns`, a list of texts.")
    if not is_storable(turns):
        raise SeedError(f"{where}: {NOT_STORABLE}")
    named = status[: len(turns)] if isinstance(status, list) else []
    lost = (Status.FAILED, Status.FILTERED)
    return [None if state in lost else text for text, state in zip_longest(turns, named)]


def _given(key: str, text: str | None, model: str) -> Reply:
    if text is None:
        return Reply(key, Status.FAILED, None, model=model, error="not in the file of answers")
    return Reply(key, Status.OK if text.strip() else Status.EMPTY, text, finish_reason="stop", model=model)


def transcripts(questions: Snapshot, *responses: Snapshot) -> list[Snapshot]:
    """Questions and responses as a referee reads them: a later turn with all that was said before it.

    Returns:
        The questions, then the responses, with the instruction_ids they had. Unchanged where there is one turn.
    """
    turns = read_rows(questions)
    if all(row["parent_id"] is None for row in turns):
        return [questions, *responses]
    by_key = {row["instruction_id"]: row for row in turns}
    chains = {key: list(_chain(row, by_key)) for key, row in by_key.items()}
    asked = [
        row | {"instruction": _numbered([turn["instruction"] for turn in chains[row["instruction_id"]]])}
        for row in turns
    ]
    shown = [write_snapshot("instructions", asked, step="transcripts", version=VERSION, inputs=[questions])]
    for snapshot in responses:
        said = {row["instruction_id"]: row for row in read_rows(snapshot)}
        rows = []
        for key, row in said.items():
            texts = [said[turn["instruction_id"]]["response"] or "" for turn in chains[key]]
            rows.append(row if row["response"] is None else row | {"response": _numbered(texts)})
        shown.append(
            write_snapshot("responses", rows, step="transcripts", version=VERSION, inputs=[questions, snapshot])
        )
    return shown


def _chain(row: dict[str, Any], turns: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    if row["parent_id"] is not None:
        yield from _chain(turns[row["parent_id"]], turns)
    yield row


def _numbered(texts: list[str]) -> str:
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"[Turn {number}]\n{text}" for number, text in enumerate(texts, 1))
