"""Settings of a model behind an OpenAI-compatible endpoint.

A field marked *operational* does not change what an answer may be, so it is in no key of cache or journal.
"""

import json
import os
import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

from storage.files import OPERATIONAL, expanded
from tasks.models.errors import FatalEndpointError
from tasks.models.prices import Price

OURS = {
    "model",
    "messages",
    "temperature",
    "top_p",
    "max_tokens",
    "max_completion_tokens",
    "stop",
    "response_format",
    "n",
    "stream",
}
SHORTEST_SECRET = 6  # of headers: a region, `eu`, is none, and stands in many words
HEADER_NAME = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)  # as HTTP has it
SECRET_HEADER = re.compile(r"key|token|auth|secret|cookie", re.IGNORECASE)


class OpenAIModel(BaseModel):
    """A model behind Chat Completions: OpenAI itself, vLLM, Ollama, llama.cpp, a gateway."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["openai"] = "openai"
    model: str = Field(min_length=1, description="The model's name, as the endpoint spells it.")
    base_url: str = Field(
        "https://api.openai.com/v1", pattern=r"^https?://", description="Where the API is, with its version: `.../v1`."
    )
    extra_body: dict[str, Any] = Field(
        {}, description="Further fields of a request, as the endpoint knows them: `{reasoning_effort: low}`."
    )
    api_key_env: str | None = Field(
        "OPENAI_API_KEY",
        description="Name of the environment variable that holds the key, on the machine that runs the stage. "
        "Null where the endpoint needs none.",
        json_schema_extra=OPERATIONAL,
    )
    api_key_file: str | None = Field(
        None, description="A file that holds the key (a mounted secret). Goes before `api_key_env`.",
        json_schema_extra=OPERATIONAL,
    )  # fmt: skip
    headers: dict[str, str] = Field(
        {}, description="Further headers. A secret is named, not written: `{api-key: $AZURE_KEY}`.",
        json_schema_extra=OPERATIONAL,
    )  # fmt: skip
    price: Price | Literal["free"] | None = Field(
        None, description="Dollars per million tokens, or `free`. Null: from the table in `prices.yaml`.",
        json_schema_extra=OPERATIONAL,
    )  # fmt: skip
    mode: Literal["online", "batch"] = Field(
        "online", description="batch: the Batch API, cheaper and within a day.", json_schema_extra=OPERATIONAL
    )
    batch_deadline: float = Field(
        86_400, ge=0, le=14 * 86_400, json_schema_extra=OPERATIONAL,
        description="Seconds to wait for batches; what is not done then goes by ordinary requests.",
    )  # fmt: skip
    batch_poll: float = Field(
        30, gt=0, le=3600, description="Seconds between two looks at a batch.", json_schema_extra=OPERATIONAL
    )
    give_up_batches: bool = Field(
        False, description="Ask again what was in a batch that the endpoint does not know any more. It counts as lost.",
        json_schema_extra=OPERATIONAL,
    )  # fmt: skip
    max_concurrency: int = Field(
        32, ge=1, le=2048, description="Requests under way at most. Halves when the endpoint says it is too much.",
        json_schema_extra=OPERATIONAL,
    )  # fmt: skip
    requests_per_minute: int | None = Field(None, ge=1, description="Null: no limit.", json_schema_extra=OPERATIONAL)
    tokens_per_minute: int | None = Field(None, ge=1, description="Null: no limit.", json_schema_extra=OPERATIONAL)
    timeout: float = Field(
        120, gt=0, le=3600, description="Seconds for one attempt, answer included.", json_schema_extra=OPERATIONAL
    )
    deadline: float = Field(
        600, ge=0, le=86_400, description="Seconds in which a request is tried again. 0: one attempt.",
        json_schema_extra=OPERATIONAL,
    )  # fmt: skip
    max_failed_share: float = Field(
        0.01, ge=0, le=1, description="Share of a call's requests that may stay without an answer. Above it, it fails.",
        json_schema_extra=OPERATIONAL,
    )  # fmt: skip

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, base_url: str) -> str:
        parts = urlsplit(base_url)
        if parts.username is not None:
            raise ValueError(
                "base_url holds a name or a password: put that into the environment, see api_key_env and headers"
            )
        if not parts.hostname or parts.port == 0 or parts.query or parts.fragment or not base_url.isprintable():
            raise ValueError(
                "base_url must be an address that a path can be added to, as in https://llm.example.com/v1"
            )
        return base_url.rstrip("/")

    @field_validator("extra_body")
    @classmethod
    def _not_ours(cls, extra_body: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(extra_body.keys() & OURS):
            raise ValueError(
                f"extra_body has {', '.join(taken)}: set that by the model's and the sampling's own fields"
            )
        try:
            json.dumps(extra_body, allow_nan=False)
        except (ValueError, TypeError) as error:  # a date, as YAML reads 2026-01-31, or .nan
            raise ValueError(f"extra_body cannot be sent as JSON ({error}): a date is a text in quotes") from None
        return extra_body

    @field_validator("headers")
    @classmethod
    def _secrets_are_named(cls, headers: dict[str, str]) -> dict[str, str]:
        for name, value in headers.items():
            if not HEADER_NAME.fullmatch(name):
                raise ValueError(f"no header can be called {name!r}: a name has letters, digits and hyphens")
            if SECRET_HEADER.search(name) and not value.startswith("$"):
                raise ValueError(
                    f"the header {name} looks like a secret: put it into the environment and write ${name}"
                )
        return headers


def fatal(model: OpenAIModel, reason: str, way_out: str) -> FatalEndpointError:
    """The error that says why this endpoint will not answer, and what to do."""
    return FatalEndpointError(model.base_url, model.model, reason, way_out)


def key_of(model: OpenAIModel) -> str:
    """The key, read where and when it is used. "none" for an endpoint that wants none: the SDK wants some.

    Raises:
        FatalEndpointError: it is not there.
    """
    if model.api_key_file:
        try:
            key = expanded(model.api_key_file).read_text(encoding="utf-8", errors="replace").strip()
        except OSError as error:
            reason = f"the key file {model.api_key_file} cannot be read ({error.strerror})"
            raise fatal(model, reason, "Mount it, or correct api_key_file") from None
        if not key:
            raise fatal(model, f"the key file {model.api_key_file} is empty", "Write the key into it")
        return _sendable(model, key, f"the key in {model.api_key_file}")
    if model.api_key_env is None:
        return "none"
    if not (key := os.environ.get(model.api_key_env, "").strip()):
        reason = f"there is no API key: the environment variable {model.api_key_env} is not set"
        way_out = f"Set it where the stage runs (export {model.api_key_env}=...), or name another one in api_key_env (null: none is needed)"
        raise fatal(model, reason, way_out)
    return _sendable(model, key, f"the key in ${model.api_key_env}")


def headers_of(model: OpenAIModel) -> dict[str, str]:
    """The further headers, with `$NAME` replaced by the environment's NAME.

    Raises:
        FatalEndpointError: the environment has no such name.
    """
    headers = {}
    for name, value in model.headers.items():
        if value.startswith("$") and value[1:] not in os.environ:
            reason = f"the header {name} names the environment variable {value[1:]}, which is not set"
            raise fatal(model, reason, "Set it where the stage runs")
        sent = os.environ[value[1:]] if value.startswith("$") else value
        headers[name] = _sendable(model, sent, f"the header {name}")
    return headers


def secrets_of(model: OpenAIModel) -> list[str]:
    """What no message may tell, whatever an endpoint says: the key, and what headers have from the environment.

    Raises:
        FatalEndpointError: one of them is not there.
    """
    named = [value for name, value in headers_of(model).items() if model.headers[name].startswith("$")]
    key = [key_of(model)] if model.api_key_file or model.api_key_env else []
    return key + [value for value in named if len(value) >= SHORTEST_SECRET]


def _sendable(model: OpenAIModel, text: str, what: str) -> str:
    """A text that a header can hold. The SDK would say of another one only that a codec failed."""
    if not (text.isascii() and text.isprintable()):
        reason = f"{what} holds a line break or a character that no header can hold"
        raise fatal(model, reason, "Copy it again, without what stands around it")
    return text
