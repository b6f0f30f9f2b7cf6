"""Between our requests and replies and what goes over the wire. Sends nothing.

An endpoint's *dialect* is what it was found not to understand: some know no JSON schema, some no `max_tokens`. The
journal remembers it.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import openai

from storage.files import digest_of
from storage.journal import Answer, Journal, Wish, now
from tasks.models.chat import Reply, Request, Sampling, Status, is_withheld, status_of, storable
from tasks.models.endpoint import OpenAIModel, fatal
from tasks.models.errors import FatalEndpointError, RequestFailed, TransientError, scrubbed
from tasks.models.prices import Price

TRANSIENT_CODES = {408, 409, 425, 429}  # and all from 500 on
ELSEWHERE = range(300, 400)
GATEWAY_GAVE_UP = {408, 504, 524}  # on a model that may have gone on answering
QUOTA_CODES = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "insufficient_balance"}
QUOTA_OF_A_MINUTE = "Quota exceeded for metric"  # Google says that the quota is exceeded of requests a minute as well
FILTER_CODES = {"content_filter", "content_policy_violation", "invalid_prompt"}
FILTER_WORDS = ("violates usage guidelines", "input was flagged")  # xAI's and OpenRouter's, with 403 as for a wrong key
TOO_LONG_CODES = {"context_length_exceeded", "string_above_max_length"}
FORMAT_WORDS = ("response_format", "json_schema", "json_object", "structured output")
# Of servers that have no code for it.
TOO_LONG_WORDS = (
    "maximum context length",
    "context size",
    "context window",
    "prompt is too long",
    "longer than the model's context length",
    "maximum prompt length",
    "maximum number of tokens allowed",
)
TEMPERATURE_WORDS = ("unsupported", "not support", "only the default")
MOST_TOKENS_AROUND_A_MESSAGE = 16  # role and separators; real templates take 3 to 8


@dataclass(frozen=True, slots=True)
class Dialect:
    """What an endpoint understands."""

    response_format: str = "json_schema"  # then json_object, then text
    max_tokens: str = "max_tokens"  # or max_completion_tokens
    temperature: bool = True  # false: the model has one of its own, and takes no other


@dataclass(frozen=True, slots=True)
class Usage:
    """What one exchange used."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Said:
    """What an endpoint answered."""

    model: str
    text: str | None
    status: Status
    finish_reason: str | None
    usage: Usage


# Of a request that a filter withholds before the model sees it.
FILTERED = Said("", None, Status.FILTERED, "content_filter", Usage(0, 0, 0))


def keyer(model: OpenAIModel, sampling: Sampling) -> Callable[[Request], str]:
    """The function that gives a request's key in the journal: the digest of all that decides its answer."""
    common = {
        "endpoint": model.base_url,
        "model": model.model,
        "extra_body": model.extra_body,
        "sampling": sampling.model_dump(mode="json"),
    }

    def key_of_request(request: Request) -> str:
        if request.prompt is not None:
            raise ValueError(f"request {request.id} continues a plain text: an endpoint takes messages")
        return digest_of(
            common | {"messages": request.messages, "schema": request.response_schema, "draw": request.draw}
        )

    return key_of_request


def body_of(model: OpenAIModel, sampling: Sampling, request: Request, dialect: Dialect) -> dict[str, Any]:
    """The body of a Chat Completions request. What equals the API's own default is left out."""
    body: dict[str, Any] = {
        "model": model.model,
        "messages": request.messages,
        dialect.max_tokens: sampling.max_tokens,
    }
    if dialect.temperature:
        body["temperature"] = sampling.temperature
        if sampling.top_p != 1:
            body["top_p"] = sampling.top_p
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if request.response_schema is not None:
        if dialect.response_format == "json_schema":
            schema = {"name": "answer", "strict": True, "schema": request.response_schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif dialect.response_format == "json_object":
            body["response_format"] = {"type": "json_object"}
    return body | model.extra_body


def wish_of(key: str, request: Request, sampling: Sampling, price: Price | None) -> Wish:
    """A request with the most that it can use.

    No tokenizer is at hand, and none is needed: a byte-level BPE token stands for at least one byte, so the
    bytes of a text bound its tokens from above. The bound is about four times too high for English prose,
    which only matters for the moment until the real usage is known.
    """
    prompt = sum(
        MOST_TOKENS_AROUND_A_MESSAGE + sum(len(text.encode()) for text in message.values())
        for message in request.messages
    )
    if request.response_schema is not None:
        prompt += len(json.dumps(request.response_schema)) + MOST_TOKENS_AROUND_A_MESSAGE
    usd = price.worst(prompt, sampling.max_tokens) if price else 0.0
    return Wish(key, prompt + sampling.max_tokens, usd)


def said(payload: Any, wish: Wish, sampling: Sampling) -> Said:
    """What an answered request says.

    Raises:
        TransientError: it is not an answer: no choices, an error in place of one.
    """
    try:
        choice = payload["choices"][0]
        finish_reason = choice.get("finish_reason")
        message = (choice.get("message") or {}) if is_withheld(finish_reason) else choice["message"]
        text = _words(message.get("content"))
        if finish_reason == "error" or not isinstance(text, str | None):
            raise TypeError
        refusal = message.get("refusal")
        status = Status.REFUSED if refusal else status_of(text, finish_reason)
        words = text or (refusal if isinstance(refusal, str) else None)
        seen = None if status == Status.FILTERED else words or ""
        usage = _usage(payload.get("usage"), seen, wish, sampling)
    except (KeyError, IndexError, TypeError, AttributeError):
        raise TransientError("a reply without an answer in it", maybe_billed=True) from None
    model = storable(str(payload.get("model") or ""))
    reason = None if finish_reason is None else storable(str(finish_reason))
    return Said(model, words if words is None else storable(words), status, reason, usage)


def _words(content: Any) -> Any:
    """The text of a message that comes in parts, as from Mistral's models that reason, without what they thought."""
    if not isinstance(content, list):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def _usage(usage: Any, seen: str | None, wish: Wish, sampling: Sampling) -> Usage:
    """Tokens as the endpoint counts them; what it does not count, or cannot have counted, gets its upper bound.

    Some count what a model thought in `total_tokens` alone, and bill it.

    Args:
        seen: all that the model said; null where some of it may have been withheld.
    """
    counted = usage if isinstance(usage, dict) else {}
    details = counted.get("prompt_tokens_details")
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else 0
    prompt = _count(counted.get("prompt_tokens")) or wish.tokens - sampling.max_tokens
    most = sampling.max_tokens if seen is None else min(len(seen.encode(errors="replace")), sampling.max_tokens)
    if counted.get("completion_tokens") == 0 and not seen:  # a filter may act before the model does
        most = 0
    completion = _count(counted.get("completion_tokens")) or most
    return Usage(prompt, min(cached, prompt), max(completion, _count(counted.get("total_tokens")) - prompt))


def _count(value: Any) -> int:
    """A number of tokens; 0 where it is none."""
    return int(value) if isinstance(value, int | float) and 0 <= value < 2**53 else 0


def answer_of(
    heard: Said,
    *,
    key: str,
    run_id: str,
    role: str,
    iteration: int,
    model: OpenAIModel,
    price: Price | None,
    latency_seconds: float,
    attempts: int,
) -> Answer:
    """What was heard, as it goes into the journal."""
    usage = heard.usage
    return Answer(
        key=key,
        run_id=run_id,
        role=role,
        iteration=iteration,
        endpoint=model.base_url,
        model=model.model,
        model_returned=heard.model,
        text=heard.text,
        status=heard.status.value,
        finish_reason=heard.finish_reason,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        cost_usd=price.cost(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) if price else None,
        price=price.as_row() if price else None,
        latency_seconds=latency_seconds,
        attempts=attempts,
        created=now(),
    )


def reply_of(id: str, answer: Answer) -> Reply:
    """An answer of the journal as the reply to the request `id`."""
    return Reply(
        id=id,
        status=Status(answer.status),
        text=answer.text,
        finish_reason=answer.finish_reason,
        model=answer.model_returned or answer.model,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
    )


def narrower(dialect: Dialect, status: int, message: str, body: Mapping[str, Any]) -> Dialect | None:
    """The dialect to go on with where a rejection says that the endpoint does not know a field that we sent."""
    message = message.lower()
    if status not in {400, 422}:
        return None
    if "max_completion_tokens" in message and "max_tokens" in body:
        return replace(dialect, max_tokens="max_completion_tokens")
    names_temperature = any(f"'{name}'" in message for name in ("temperature", "top_p"))
    if "temperature" in body and names_temperature and any(words in message for words in TEMPERATURE_WORDS):
        return replace(dialect, temperature=False)
    if "response_format" in body and any(word in message for word in FORMAT_WORDS) and "invalid schema" not in message:
        steps = {"json_schema": "json_object", "json_object": "text"}
        sent = body["response_format"]["type"]
        return replace(dialect, response_format=steps[sent])
    return None


def code_of(error: openai.APIStatusError) -> str:
    """What a rejection calls itself. Some servers put numbers or objects where the API has a word."""
    return str(error.code or error.type or "")


def is_filtered(code: Any, message: Any) -> bool:
    """Whether a rejection is of a prompt that a filter withholds from the model."""
    return str(code) in FILTER_CODES or any(words in str(message).lower() for words in FILTER_WORDS)


def words_of(error: openai.APIStatusError, secrets: Iterable[str]) -> str:
    """What a rejection says, without the secrets.

    The SDK's `message` has only what stands in `error.message`: not FastAPI's `detail`, no text, not where an endpoint is.
    """
    status, body = error.status_code, error.body
    if status in ELSEWHERE:
        return scrubbed(error.response.headers.get("location", "it does not say where"), *secrets)
    words = error.message.removeprefix(f"Error code: {status}").removeprefix(" - ")
    if words or not body or (isinstance(body, str) and body.startswith("<")):  # a gateway's page says no more
        return scrubbed(words or error.message, *secrets)
    return scrubbed(body if isinstance(body, str) else json.dumps(body), *secrets)


def failure(
    model: OpenAIModel, status: int, code: str, message: str, wait: float | None
) -> FatalEndpointError | TransientError | RequestFailed:
    """What a rejection means. `message` holds no secrets any more."""
    no_quota = "exceeded your current quota" in message and QUOTA_OF_A_MINUTE not in message
    if status == 402 or code in QUOTA_CODES or no_quota:
        return fatal(model, f"no quota left ({message})", "Top up or raise the limit of the account")
    if status in TRANSIENT_CODES or status >= 500:
        gave_up, reason = status in GATEWAY_GAVE_UP, _named(status, message)
        if wait is not None and wait > model.deadline:
            reason += f" (asks for a pause of {math.ceil(wait / 60)} min, more than `deadline` allows)"
        return TransientError(reason, wait=wait, hurried=status == 429, maybe_billed=gave_up)
    if status in ELSEWHERE:  # not followed: it may be another host, which shall not have what headers hold
        return fatal(model, f"the endpoint is elsewhere (HTTP {status}: {message})", "Set base_url to where it is")
    if status in {401, 403}:
        where = model.api_key_file or (model.api_key_env and f"${model.api_key_env}")
        none = "api_key_env is null: name the key's variable there, or check those that headers name"
        way_out = f"Check the key in {where}, and its rights" if where else none
        return fatal(model, f"the key was rejected ({status} {message})", way_out)
    if status == 404:
        return fatal(model, f"not found ({message})", "Check the model's name and base_url")
    if code in TOO_LONG_CODES or status == 413 or any(words in message.lower() for words in TOO_LONG_WORDS):
        return RequestFailed(_named(status, "the prompt is too long for the model"))
    return fatal(model, f"the request was rejected ({status} {message})", "Change the setting that it names")


def _named(status: int, message: str) -> str:
    return f"HTTP {status}: {' '.join(message.split())[:100]}"


def known_dialect(journal: Journal, model: OpenAIModel) -> Dialect:
    """What the journal remembers of an endpoint and its model, or what everybody ought to understand."""
    text = journal.recall(_dialect_name(model))
    return Dialect(**json.loads(text)) if text else Dialect()


def remember_dialect(journal: Journal, model: OpenAIModel, dialect: Dialect) -> None:
    """Have the journal remember what an endpoint and its model understand."""
    journal.remember(_dialect_name(model), json.dumps(asdict(dialect)))


def _dialect_name(model: OpenAIModel) -> str:
    return f"dialect {model.base_url} {model.model}"
