"""What one says to a model and what it says back: `Request`, `Sampling`, `Reply`.

Every model, a local checkpoint or an endpoint far away, takes requests and gives replies of these types.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

# Finish reasons of an answer that was cut: OpenAI's; Mistral's at the end of the context; those of gateways that pass a
# provider's own on; DeepSeek's where it had no room to go on.
CUT = ("length", "model_length", "max_tokens", "insufficient_system_resource")
ROLES = ("system", "user", "assistant")
TURNS = f"a list of a `role` ({', '.join(ROLES)}) and a text as `content` each"  # see `is_turn`
JSON_OBJECT = re.compile(r"\{\s*[\"}]")  # a brace by itself begins none, and json's errors count all lines before it


class Status(StrEnum):
    """What became of one request. Only `ok` is a whole answer."""

    OK = "ok"
    TRUNCATED = "truncated"  # cut, most often at max_tokens
    FILTERED = "filtered"  # withheld by a content filter
    REFUSED = "refused"  # the model declined, and said so in the protocol
    EMPTY = "empty"  # nothing but white space
    FAILED = "failed"  # no answer within the deadline


class Sampling(BaseModel):
    """How a model draws its tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(0.7, ge=0, le=2, description="0 is greedy. The paper samples answers at 0.7.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling: the share of probability kept.")
    max_tokens: int = Field(1024, ge=1, le=32768, description="New tokens at most; a longer answer is cut and marked.")
    stop: tuple[str, ...] = Field((), max_length=4, description="Texts that end an answer and are left out of it.")


@dataclass(frozen=True, slots=True)
class Request:
    """One thing asked of a model: a conversation, or for a local model a plain text to continue.

    `id` is unique within a call and says which row the reply belongs to. `draw` asks for another sample of
    the same request: draw 0 and draw 1 are two answers, draw 0 twice is one.
    """

    id: str
    messages: tuple[dict[str, str], ...] = ()  # [{"role": "user", "content": "..."}]
    prompt: str | None = None  # continued as it stands, without a chat template
    draw: int = 0
    response_schema: dict[str, Any] | None = None  # a JSON schema the answer should follow, where supported


@dataclass(frozen=True, slots=True)
class Reply:
    """A model's answer to the request of the same `id`. `text` is null where there is no answer."""

    id: str
    status: Status
    text: str | None
    finish_reason: str | None = None
    model: str = ""  # as the endpoint names it, or the checkpoint's digest
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


OnProgress = Callable[[int, int, dict[str, Any]], None]  # done, total, figures worth showing ({"tokens/s": 310})


def is_withheld(finish_reason: Any) -> bool:
    """Whether a filter withheld an answer, or cut it: Google adds why, as in `content_filter: RECITATION`."""
    return str(finish_reason).startswith("content_filter")


def status_of(text: str | None, finish_reason: str | None) -> Status:
    """The status of an answer that arrived."""
    if is_withheld(finish_reason):
        return Status.FILTERED
    if not (text or "").strip():
        return Status.EMPTY
    return Status.TRUNCATED if str(finish_reason).lower() in CUT else Status.OK


NOT_STORABLE = "half of a character is in it (a lone surrogate). Write it whole, or remove it."


def is_storable(said: Any) -> bool:
    """Whether every file can hold all texts of something JSON-like, as it is: see `storable`."""
    text = json.dumps(said, ensure_ascii=False, default=str)
    return storable(text) == text


def storable(text: str) -> str:
    """A model's words as every file can hold them: half of a character (a lone surrogate, which JSON can say) becomes "?"."""
    return text.encode(errors="replace").decode()


def opening(system_prompt: str | None) -> list[dict[str, str]]:
    """What is said before the first question."""
    return [{"role": "system", "content": system_prompt}] if system_prompt else []


def conversation(instruction: str, input: str | None, system_prompt: str | None = None) -> list[dict[str, str]]:
    """The messages that put an instruction to a model: teacher and student, in training and in inference."""
    return [*opening(system_prompt), {"role": "user", "content": f"{instruction}\n\n{input}" if input else instruction}]


def is_turn(said: Any) -> bool:
    """Whether this is a message of a conversation: a role that every chat template knows, and a text."""
    return isinstance(said, dict) and said.get("role") in ROLES and isinstance(said.get("content"), str)


def response_row(reply: Reply, role: str) -> dict[str, Any]:
    """A reply as a row of the table `responses`."""
    return {
        "instruction_id": reply.id,
        "role": role,
        "model": reply.model,
        "status": reply.status,
        "finish_reason": reply.finish_reason,
        "response": reply.text,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "error": reply.error,
    }
