"""Inference alone, on a file: a model answers every row, without the loop."""

from typing import Any

from storage.files import Checkpoint, digest_of
from tasks.models.chat import TURNS, Request, Sampling, conversation, is_turn, opening
from tasks.models.local import LocalModel, answer_locally
from tasks.progress import progress
from tasks.seed import ACCEPTED, SeedError, read_records, read_row

FIGURES = ("status", "finish_reason", "prompt_tokens", "completion_tokens", "error")
Asked = tuple[dict[str, Any], list[dict[str, str]]]  # a record as it will be written, the conversation put to the model


def read_asked(data: str) -> list[Asked]:
    """The rows of a file.

    Raises:
        SeedError: the file cannot be used.
    """
    place, records = read_records(data)
    rows = [_asked(record, f"{place}, {where}") for where, record in records]
    if not rows:
        raise SeedError(f"{place}: no instruction in it. {ACCEPTED}.")
    return rows


def answer_rows(
    settings: LocalModel,
    checkpoint: Checkpoint,
    rows: list[Asked],
    sampling: Sampling,
    system_prompt: str | None,
    seed: int,
) -> list[dict[str, Any]]:
    """The rows, each with the model's answer as `output`, or as the last of its `messages`.

    Beside it `status`, `finish_reason`, `prompt_tokens`, `completion_tokens`, and `error` where there is no answer. Rows
    that ask the same get the same answer. Interrupted, the same call goes on.

    Args:
        system_prompt: said before each conversation that does not begin with one of its own.

    Raises:
        JobError: the process ended without a result.
    """
    said_before = opening(system_prompt)
    rows = [(row, said if said[0]["role"] == "system" else [*said_before, *said]) for row, said in rows]
    requests = {digest_of(messages): tuple(messages) for _, messages in rows}
    with progress("answers") as on_progress:
        replies = answer_locally(
            settings,
            checkpoint,
            [Request(id=key, messages=messages) for key, messages in requests.items()],
            sampling,
            seed=seed,
            on_progress=on_progress,
        )
    by_key = {reply.id: reply for reply in replies}
    answered = []
    for row, messages in rows:
        reply = by_key[digest_of(messages)]
        if row.get("instruction") is None:
            said = [] if reply.text is None else [{"role": "assistant", "content": reply.text}]
            given: dict[str, Any] = {"messages": [*messages, *said]}
        else:
            given = {"output": reply.text}
        answered.append(row | given | {name: getattr(reply, name) for name in FIGURES})
    return answered


def _asked(record: Any, where: str) -> Asked:
    row = read_row(record, where)
    # As `read_row` reads it: null in a table that has other rows of this form, and a column beside the instruction is no form.
    if isinstance(record, dict) and record.get("messages") and record.get("instruction") is None:
        messages = record["messages"]
        if not all(map(is_turn, messages)):
            raise SeedError(f"{where}: `messages` must be {TURNS}")
        asked = [{"role": said["role"], "content": said["content"]} for said in messages]
        while asked[-1]["role"] == "assistant":
            asked.pop()
        return record, asked
    kept = record if isinstance(record, dict) else {}
    shown = kept | {"instruction": row["instruction"], "input": row["input"] or ""}
    return shown, conversation(row["instruction"], row["input"])
