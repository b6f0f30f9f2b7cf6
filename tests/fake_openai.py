"""An OpenAI-compatible server that can be made to misbehave, and that counts what it would have billed.

Answers are a function of the request, so a run against it can be repeated. Faults come from a script (the next
requests get them, in order) or at random with a seed. What is billed is counted under the request's
idempotency key; a reply that a fault cut off is counted apart, under `lost`.

    python -m tests.fake_openai --port 8000 --faults 0.05 --latency 0.01
    with FakeOpenAI(script=["429", "drop"]) as server: ...  # server.url, server.billed

Faults: 429 429-seconds 429-date 429-reset 429-ms 500 503 408 409 hang drop gone cut-json too-deep not-json html no-choices
        quota 401 403 404 400 too-long no-schema no-format no-max-tokens
Outcomes, which are billed: filter length refusal empty prompt-filter
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from email.utils import formatdate
from types import TracebackType
from typing import Any, Self

from aiohttp import web

RANDOM_FAULTS = ("429", "429-seconds", "500", "503", "408", "409", "drop", "cut-json", "not-json", "no-choices")
RANDOM_OUTCOMES = ("filter", "length", "refusal", "empty")
WAIT = 0.05  # what a 429 asks for, so that tests stay quick
WORDS = [
    "river",
    "copper",
    "lantern",
    "meadow",
    "harbour",
    "cipher",
    "orchard",
    "violin",
    "glacier",
    "saffron",
    "pendulum",
    "compass",
    "feather",
    "granite",
    "market",
    "sonnet",
    "turbine",
    "vineyard",
    "marble",
    "archive",
    "beacon",
    "thicket",
    "ledger",
    "canyon",
    "walnut",
    "prism",
    "furnace",
    "monsoon",
    "quilt",
    "satellite",
    "barley",
    "anchor",
    "mosaic",
    "tundra",
    "piston",
    "nectar",
    "summit",
    "lagoon",
    "trellis",
    "zephyr",
    "citadel",
    "ember",
    "willow",
    "chart",
]
Answer = Callable[[dict[str, Any]], str]


def default_answer(body: dict[str, Any]) -> str:
    """Something fitting: an object that follows the schema, a new task for who asks for one, else a paragraph."""
    chance = random.Random(_digest(body))
    prompt = body["messages"][-1]["content"]
    schema = body.get("response_format", {}).get("json_schema", {}).get("schema")
    if schema is None and "`first_score`" in prompt:
        schema = {"type": "object", "properties": {"evidence": {}, "first_score": {"type": "number"}, "second_score": {"type": "number"}}}  # fmt: skip
    if schema is None and "`instruction`" in prompt:
        schema = {"type": "object", "properties": {"instruction": {}, "input": {}}}
    if schema is not None:
        return json.dumps(_filled(schema, "", chance))
    return _sentence(chance, 30)


def _filled(schema: dict[str, Any], name: str, chance: random.Random) -> Any:
    """A value that follows a JSON schema."""
    kind = schema.get("type", "string")
    if "enum" in schema:
        return chance.choice(schema["enum"])
    if kind == "object":
        return {key: _filled(part, key, chance) for key, part in schema.get("properties", {}).items()}
    if kind == "array":
        return [_filled(schema.get("items", {}), name, chance)]
    if kind in {"number", "integer"}:
        return chance.randint(schema.get("minimum", 1), schema.get("maximum", 10))
    if kind == "boolean":
        return chance.random() < 0.5
    return "" if name == "input" else _sentence(chance, 14)


def _sentence(chance: random.Random, words: int) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(words)).capitalize() + "."


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:32]


class FakeOpenAI:
    """The server. As a context manager it runs in a thread of its own."""

    def __init__(
        self,
        *,
        answer: Answer = default_answer,
        script: Iterable[str] = (),
        faults: float = 0.0,
        outcomes: float = 0.0,
        seed: int = 0,
        latency: float = 0.0,
        key: str | None = None,
        models: tuple[str, ...] = (),
        always: str | None = None,
        quick: bool = False,
        moved: str | None = None,
        port: int = 0,
    ):
        """
        Args:
            script: what happens to the next requests: "ok", a fault or an outcome.
            faults: share of requests that meet a random fault.
            outcomes: share of *distinct* requests whose answer is cut, filtered, refused or empty.
            key: the only key that is accepted.
            models: the only models there are. Empty: any.
            always: a fault of every request that the script does not cover.
            quick: the same short answer to everybody, for measuring clients.
            moved: the host to which every request is sent on.
        """
        self.answer, self.script, self.faults, self.outcomes = answer, deque(script), faults, outcomes
        self.latency, self.key, self.models, self.always, self.quick = latency, key, models, always, quick
        self.chance = random.Random(seed)
        self.billed: Counter[str] = Counter()  # by idempotency key
        self.lost: Counter[str] = Counter()  # answered, and cut off on the way
        self.tokens: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []  # bodies, as they came
        self.received = 0
        self.active = self.most_active = 0
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.batch_room: int | None = None  # rows that may be in batches at a time; null: any number
        self.batch_script: deque[str] = deque()  # of the next: ok expire partly fail unheard; stuck slow late endless
        self.moved, self.port = moved, port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def application(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=300 * 1024**2, middlewares=[self._elsewhere])
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/billed", self._billed)
        app.router.add_post("/v1/files", self._upload)
        app.router.add_get("/v1/files/{id}/content", self._download)
        app.router.add_post("/v1/batches", self._create_batch)
        app.router.add_get("/v1/batches", self._list_batches)
        app.router.add_get("/v1/batches/{id}", self._batch)
        app.router.add_post("/v1/batches/{id}/cancel", self._cancel_batch)
        return app

    @web.middleware
    async def _elsewhere(self, request: web.Request, handler: Any) -> Any:
        if self.moved:
            raise web.HTTPPermanentRedirect(self.moved + request.path)
        return await handler(request)

    # --- running it -------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True)
        self._thread.start()
        ready.wait()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        runner = await self._start()
        ready.set()
        await self._over.wait()
        await runner.cleanup()

    async def _start(self) -> web.AppRunner:
        runner = web.AppRunner(self.application(), access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, backlog=4096)
        await site.start()
        self.port = runner.addresses[0][1]
        return runner

    async def serve_forever(self) -> None:
        """For the command line."""
        await self._start()
        print(self.url, flush=True)
        await asyncio.Event().wait()

    # --- chat -------------------------------------------------------------------------------------------------------

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.received += 1
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        try:
            body = await request.json()
            if self.quick:
                key = request.headers["Idempotency-Key"] if "Idempotency-Key" in request.headers else str(self.received)
                self.billed[key] += 1
                return web.Response(body=QUICK, content_type="application/json")
            self.requests.append(body)
            if self.latency:
                await asyncio.sleep(self.latency)
            if refused := self._refused(request, body):
                return refused
            return await self._reply(request, body)
        finally:
            self.active -= 1

    def _refused(self, request: web.Request, body: dict[str, Any]) -> web.Response | None:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            given = request.headers.get("api-key", request.headers.get("Authorization", "").removeprefix("Bearer "))
            return _error(401, f"Incorrect API key provided: {given}.", "invalid_api_key")
        if self.models and body["model"] not in self.models:
            return _error(404, f"The model `{body['model']}` does not exist", "model_not_found")
        return None

    async def _reply(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        key = request.headers.get("Idempotency-Key") or _digest(body)
        fate = self._fate(key)
        if rejected := await self._rejected(fate, body):
            return rejected
        payload = completion(body, self.answer(body), fate)
        if fate == "no-choices":
            payload["choices"] = []
        data = json.dumps(payload).encode()
        if fate in {"drop", "gone", "cut-json", "too-deep", "no-choices"}:
            self.lost[key] += 1
            return await _cut(request, data, fate)
        self._bill(key, payload["usage"])
        return web.Response(body=data, content_type="application/json", headers={"x-request-id": f"req_{key}"})

    def _fate(self, key: str) -> str:
        if self.script:
            return self.script.popleft()
        if self.always:
            return self.always
        if self.chance.random() < self.faults:
            return self.chance.choice(RANDOM_FAULTS)
        of_request = random.Random(key)  # an outcome belongs to the request: asked again, it is the same
        return of_request.choice(RANDOM_OUTCOMES) if of_request.random() < self.outcomes else "ok"

    async def _rejected(self, fate: str, body: dict[str, Any]) -> web.Response | None:
        """The reply to a request that got no answer, and is not billed."""
        hints = {
            "429": {},
            "429-now": {"Retry-After": "0"},
            "429-seconds": {"Retry-After": str(WAIT)},
            "429-ms": {"retry-after-ms": str(WAIT * 1000)},
            "429-date": {"Retry-After": formatdate(time.time() + 1, usegmt=True)},
            "429-reset": {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": f"{WAIT * 1000:g}ms"},
        }
        if fate in hints:
            return _error(429, "Rate limit reached", "rate_limit_exceeded", hints[fate])
        if fate in {"500", "503", "408", "409", "504"}:
            return _error(int(fate), "The server had an error", "server_error")
        if fate == "hang":
            await asyncio.sleep(3600)
        if fate == "not-json":
            return web.Response(text="<html>gateway</html>", content_type="application/json")
        if fate == "html":
            return web.Response(text="<html>gateway</html>", content_type="text/html")
        if fate == "quota":
            return _error(429, "You exceeded your current quota", "insufficient_quota")
        if fate in {"401", "403", "404", "400"}:
            return _error(int(fate), "No", "no")
        if fate == "too-long":
            return _error(400, "This model's maximum context length is 8192 tokens", "context_length_exceeded")
        if fate == "too-long-without-a-code":  # as vLLM says it
            message = "This model's maximum context length is 512 tokens. However, your request has 600 input tokens."
            return web.json_response(
                {"error": {"message": message, "type": "BadRequestError", "code": 400}}, status=400
            )
        if fate == "too-long-in-detail":  # as gateways built on FastAPI say it, without `error`
            return web.json_response({"detail": "This model's maximum context length is 512 tokens"}, status=400)
        if fate == "too-long-in-text":
            return web.Response(text="This model's maximum context length is 512 tokens", status=400)
        if fate == "no-temperature" and "temperature" in body:
            message = "Unsupported value: 'temperature' does not support 0.7 with this model. Only the default (1) value is supported."
            return _error(400, message, "unsupported_value")
        if fate == "type-is-no-word":
            error = {"message": "No", "type": {"number": 7}}
            return web.json_response({"error": error}, status=400)
        if fate == "prompt-filter-of-xai":
            error = {"code": "The caller does not have permission", "error": "Content violates usage guidelines."}
            return web.json_response(error, status=403)
        if fate == "prompt-filter-of-openrouter":
            message = 'm requires moderation on OpenRouter. Your input was flagged for "violence".'
            return web.json_response({"error": {"code": 403, "message": message}}, status=403)
        if fate == "prompt-filter":
            return _error(400, "The prompt was filtered", "content_filter")
        if fate == "no-max-tokens" and "max_tokens" in body:
            return _error(400, "Unsupported parameter: use 'max_completion_tokens' instead.", "unsupported_parameter")
        if fate == "no-schema" and body.get("response_format", {}).get("type") == "json_schema":
            return _error(400, "Invalid value for response_format.type: json_schema is not supported", "invalid_value")
        if fate == "no-format" and "response_format" in body:
            return _error(400, "response_format is not supported", "invalid_value")
        return None

    def _bill(self, key: str, usage: dict[str, Any]) -> None:
        self.billed[key] += 1
        self.tokens["prompt"] += usage["prompt_tokens"]
        self.tokens["completion"] += usage["completion_tokens"]

    # --- batches ----------------------------------------------------------------------------------------------------

    async def _upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        id = f"file-{len(self.files)}"
        self.files[id] = form["file"].file.read()  # type: ignore[union-attr]
        return web.json_response(
            {"id": id, "object": "file", "bytes": len(self.files[id]), "created_at": 0, "filename": "b.jsonl",
             "purpose": "batch", "status": "processed"}
        )  # fmt: skip

    async def _download(self, request: web.Request) -> web.Response:
        if not (data := self.files.get(request.match_info["id"])):
            return _error(404, "No such file", "not_found")
        return web.Response(body=data, content_type="application/octet-stream")

    async def _create_batch(self, request: web.Request) -> web.Response:
        asked = await request.json()
        id = f"batch_{len(self.batches)}"
        fate = self.batch_script.popleft() if self.batch_script else "ok"
        waiting = [other["input_file_id"] for other in self.batches.values() if other.get("status") == "in_progress"]
        rows = sum(len(self.files[file].splitlines()) for file in [*waiting, asked["input_file_id"]])
        fate = "full" if self.batch_room is not None and rows > self.batch_room else fate
        batch = {
            "id": id, "object": "batch", "endpoint": asked["endpoint"], "completion_window": "24h", "created_at": int(time.time()),
            "input_file_id": asked["input_file_id"], "metadata": asked.get("metadata"), "status": "in_progress",
            "output_file_id": None, "error_file_id": None, "fate": fate,
        }  # fmt: skip
        self.batches[id] = batch
        return _error(503, "The server had an error", "server_error") if fate == "unheard" else web.json_response(batch)

    async def _list_batches(self, request: web.Request) -> web.Response:
        data = list(reversed(self.batches.values()))
        return web.json_response({"object": "list", "data": data, "has_more": False})

    async def _batch(self, request: web.Request) -> web.Response:
        if request.match_info["id"] not in self.batches:
            return _error(404, "No batch found", "not_found")
        batch = self.batches[request.match_info["id"]]
        if batch["status"] == "in_progress" and batch["fate"] not in {"stuck", "slow", "late", "endless"}:
            self._work_off(batch)
        return web.json_response(batch)

    async def _cancel_batch(self, request: web.Request) -> web.Response:
        batch = self.batches[request.match_info["id"]]
        if batch["fate"] in {"slow", "late"}:  # half of it is done by then, or all
            self._work_off(batch)
        if batch["fate"] == "late":
            return _error(409, f"Cannot cancel a batch with status '{batch['status']}'.", "invalid_request_error")
        batch["status"] = "cancelling" if batch["fate"] == "endless" else "cancelled"
        return web.json_response(batch)

    def _work_off(self, batch: dict[str, Any]) -> None:
        lines = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        fate = batch["fate"]
        if fate in {"fail", "full"}:
            batch["status"] = "failed"
            if fate == "full":
                message = "Enqueued token limit reached for fake in organization org-a. Limit: 2,000 enqueued tokens. Please try again once some in_progress batches have been completed."
                error = {"code": "token_limit_exceeded", "line": None, "message": message, "param": None}
                batch["errors"] = {"object": "list", "data": [error]}
            return
        done = lines[: len(lines) // 2] if fate in {"expire", "partly", "slow"} else lines
        output, errors = [], []
        for line in lines:
            if fate == "no-max-tokens" and "max_tokens" in line["body"]:
                error = {"message": "Unsupported parameter: use 'max_completion_tokens' instead."}
                response = {"status_code": 400, "request_id": "r", "body": {"error": error}}
                errors.append({"id": "b", "custom_id": line["custom_id"], "response": response, "error": None})
            elif line in done:
                payload = completion(line["body"], self.answer(line["body"]), "ok")
                self._bill(line["custom_id"], payload["usage"])
                response = {"status_code": 200, "request_id": "r", "body": payload}
                output.append({"id": "b", "custom_id": line["custom_id"], "response": response, "error": None})
            elif fate in {"expire", "slow"}:
                error = {"code": "batch_expired", "message": "This request could not be executed in time."}
                errors.append({"id": "b", "custom_id": line["custom_id"], "response": None, "error": error})
            else:
                response = {"status_code": 500, "request_id": "r", "body": {"error": {"message": "server error"}}}
                errors.append({"id": "b", "custom_id": line["custom_id"], "response": response, "error": None})
        for name, rows in (("output", output), ("error", errors)):
            if rows:
                id = f"file-{len(self.files)}"
                self.files[id] = "\n".join(json.dumps(row) for row in rows).encode()
                batch[f"{name}_file_id"] = id
        batch["status"] = "expired" if fate == "expire" else "completed"

    # --- the rest ---------------------------------------------------------------------------------------------------

    async def _models(self, request: web.Request) -> web.Response:
        if refused := self._refused(request, {"model": self.models[0] if self.models else ""}):
            return refused
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "nobody"} for name in self.models or ("fake",)
        ]
        return web.json_response({"object": "list", "data": data})

    async def _billed(self, request: web.Request) -> web.Response:
        return web.json_response(self.bill())

    def bill(self) -> dict[str, Any]:
        """What was billed so far."""
        return {
            "requests": self.billed.total(),
            "distinct": len(self.billed),
            "twice": {key: count for key, count in self.billed.items() if count > 1},
            "lost": self.lost.total(),
            "prompt_tokens": self.tokens["prompt"],
            "completion_tokens": self.tokens["completion"],
            "received": self.received,
        }


def completion(body: dict[str, Any], text: str, fate: str = "ok") -> dict[str, Any]:
    """A Chat Completions object that says `text`, or what an outcome makes of it."""
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or 4096
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    finish_reason = "stop"
    if fate == "length" or len(text) // 4 + 1 > limit:
        message["content"], finish_reason = text[: min(len(text) // 2, limit * 4)], "length"
    elif fate == "filter":
        message["content"], finish_reason = "", "content_filter"
    elif fate == "refusal":
        message["content"], message["refusal"] = None, "I cannot help with that."
    elif fate == "empty":
        message["content"] = " \n"
    prompt = sum(len(part["content"]) // 4 + 4 for part in body["messages"])
    completed = min(limit, len(message["content"] or message["refusal"] or "") // 4 + 1)
    return {
        "id": f"chatcmpl-{_digest(body)[:12]}",
        "object": "chat.completion",
        "created": 0,
        "model": f"{body['model']}-2026-01-01",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completed, "total_tokens": prompt + completed},
    }


QUICK = json.dumps(
    completion({"model": "fake", "messages": [{"content": "x" * 80}]}, "the same short answer to everybody")
).encode()


def _error(status: int, message: str, code: str, headers: dict[str, str] | None = None) -> web.Response:
    error = {"error": {"message": message, "type": code, "param": None, "code": code}}
    return web.json_response(error, status=status, headers=headers)


async def _cut(request: web.Request, data: bytes, fate: str) -> web.StreamResponse:
    """A reply that does not arrive as it should."""
    if fate == "gone":  # as when the server dies, or a gateway loses patience: not even headers
        assert request.transport
        request.transport.abort()
    if fate == "too-deep":
        return web.Response(body=b"[" * 100_000, content_type="application/json")
    if fate != "drop":
        cut = data if fate == "no-choices" else data[: len(data) // 2]
        return web.Response(body=cut, content_type="application/json")
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(data))})
    await response.prepare(request)
    await response.write(data[: len(data) // 2])
    if request.transport:
        request.transport.close()
    return response


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--faults", type=float, default=0.0, help="share of requests with a random fault")
    parser.add_argument("--outcomes", type=float, default=0.0, help="share of requests cut, filtered, refused or empty")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--key", default=None, help="the only key that is accepted")
    parser.add_argument("--model", dest="models", nargs="*", default=(), help="the only models there are")
    parser.add_argument("--script", nargs="*", default=(), help="what happens to the first requests")
    parser.add_argument("--always", default=None, help="a fault of every other request")
    parser.add_argument("--quick", action="store_true", help="the same short answer to everybody")
    server = FakeOpenAI(**vars(parser.parse_args()))
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(server.serve_forever())


if __name__ == "__main__":
    main()
