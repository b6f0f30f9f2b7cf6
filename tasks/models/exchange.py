"""One request to an OpenAI-compatible endpoint, and what came back of it in our terms.

Knows nothing of retries, budgets or the journal. Requests go through the SDK's `post`, which keeps its transport, its
authentication and its errors, and spares the building of response objects that nobody looks at.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import httpx2
import openai

from storage.journal import Wish
from tasks.models.chat import Request, Sampling
from tasks.models.endpoint import OpenAIModel, headers_of, key_of, secrets_of
from tasks.models.errors import ModelError, TransientError
from tasks.models.pacing import asked_wait
from tasks.models.wire import (
    ELSEWHERE,
    FILTERED,
    Dialect,
    Said,
    body_of,
    code_of,
    failure,
    is_filtered,
    narrower,
    said,
    words_of,
)

CONNECT_SECONDS = 10
MAY_LIST = "api.model.read"  # what OpenAI says a key lacks that may ask models, and not list them

# The SDK tells the endpoint about this machine in each request; to leave that out also saves a tenth of the time.
NO_TELEMETRY: Any = {
    f"X-Stainless-{name}": openai.Omit()
    for name in ("Lang", "Package-Version", "OS", "Arch", "Runtime", "Runtime-Version", "Async")
}

# Before a request could be sent. The SDK's transport names every lost connection a ConnectTimeout, one that was cut while
# the model answered as well: only aiohttp's own errors tell them apart.
NOT_CONNECTED = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)

Remember = Callable[[Dialect], Awaitable[None]]


def client_of(model: OpenAIModel, timeout: float) -> openai.OpenAI:
    """The SDK's client for one call after the other; `timeout` in seconds.

    Raises:
        FatalEndpointError: the key is not there.
    """
    return openai.OpenAI(
        api_key=key_of(model),
        base_url=model.base_url,
        default_headers=headers_of(model),
        max_retries=0,
        http_client=openai.DefaultHttpxClient(timeout=timeout, follow_redirects=False),
    )


def check_access(model: OpenAIModel) -> None:
    """Ask for the list of models, which costs nothing: a key that is rejected is found before any work is done.

    Raises:
        FatalEndpointError: the key is not there, or the endpoint does not take it, or is elsewhere.

    An endpoint that has no such list, or not for this key, or that is not reached just now, is given the benefit of the
    doubt: the requests themselves are tried for as long as its `deadline` says.
    """
    secrets = secrets_of(model)
    with client_of(model, CONNECT_SECONDS) as client:
        try:
            client.models.list()
        except openai.APIStatusError as error:
            status, words = error.status_code, words_of(error, secrets)
            if status not in {401, 403, *ELSEWHERE} or MAY_LIST in words:
                return
            rejected = failure(model, status, "", words, None)
        except openai.OpenAIError:
            return
        else:
            return
    raise rejected  # outside of the handler: the SDK's errors know the key


class Connection:
    """To one endpoint, for requests that are sampled alike. See `connected`."""

    def __init__(
        self, client: openai.AsyncOpenAI, model: OpenAIModel, sampling: Sampling, dialect: Dialect, remember: Remember
    ):
        self.client, self.model, self.sampling = client, model, sampling
        self.dialect, self.remember = dialect, remember
        self.secrets = secrets_of(model)
        self.url = f"{model.base_url}/chat/completions"

    async def send(self, request: Request, wish: Wish) -> Said:
        """Send a request once.

        Raises:
            TransientError: it may work at another time, or in another dialect.
            RequestFailed: this request never will.
            FatalEndpointError: no request will.
        """
        dialect = self.dialect
        body = body_of(self.model, self.sampling, request, dialect)
        options: Any = {
            # A gateway that knows how can recognise a repetition by the key, and we can find a request in its log.
            "headers": {"Idempotency-Key": wish.key},
            "idempotency_key": wish.key,
            "params": {},
            "max_retries": 0,
        }
        trouble: ModelError | None = None  # raised outside of the handlers: the SDK's errors know the key
        try:
            async with asyncio.timeout(self.model.timeout):
                response = await self.client.post(self.url, cast_to=httpx2.Response, body=body, options=options)
            return said(_parsed(response.content), wish, self.sampling)
        except openai.APIStatusError as error:
            status = error.status_code
            message = words_of(error, self.secrets)
            code, wait = code_of(error), asked_wait(error.response.headers)
        except TimeoutError:
            trouble = TransientError(f"no answer within {self.model.timeout:g} s", maybe_billed=True)
        except (openai.APIConnectionError, aiohttp.ClientError, httpx2.HTTPError, OSError) as error:
            trouble = _broken(error)
        if trouble:
            raise trouble
        if status in {400, 403} and is_filtered(code, message):
            return FILTERED
        if found := narrower(dialect, status, message, body):
            await self._speak(dialect, found)
            raise TransientError(message, reworded=True)
        raise failure(self.model, status, code, message, wait)

    async def _speak(self, used: Dialect, found: Dialect) -> None:
        """Go on in the dialect found, unless somebody changed it while this request was under way."""
        if self.dialect == used:
            self.dialect = found
            await self.remember(found)


@contextlib.asynccontextmanager
async def connected(
    model: OpenAIModel, sampling: Sampling, dialect: Dialect, remember: Remember
) -> AsyncIterator[Connection]:
    """A connection while the block lasts.

    Args:
        dialect: what the endpoint was found to understand so far.
        remember: told whenever that proves to be less.

    Raises:
        FatalEndpointError: the key is not there.
    """
    limits = httpx2.Limits(max_connections=model.max_concurrency + 1)
    timeout = httpx2.Timeout(model.timeout, connect=CONNECT_SECONDS)
    async with openai.AsyncOpenAI(
        api_key=key_of(model),
        base_url=model.base_url,
        default_headers=NO_TELEMETRY | headers_of(model),
        timeout=timeout,
        max_retries=0,
        http_client=openai.DefaultAioHttpClient(limits=limits, timeout=timeout, follow_redirects=False),
    ) as client:
        yield Connection(client, model, sampling, dialect, remember)


def _parsed(body: bytes) -> Any:
    """What a reply says as JSON. Python also gives up on one that is nested too deep, or on a number without end."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise TransientError("a body that is not JSON", maybe_billed=True) from None


def _broken(error: BaseException) -> TransientError:
    """A connection that broke. Before the request could be sent nothing was billed; after it, who knows."""
    sent = not isinstance(error, NOT_CONNECTED)
    while error.__cause__ is not None:
        error = error.__cause__
        sent = sent and not isinstance(error, NOT_CONNECTED)
    reason = f"{'the connection broke' if sent else 'no connection'} ({type(error).__name__})"
    return TransientError(reason, maybe_billed=sent)
