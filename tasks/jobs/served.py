"""Answers with a model that a server runs: vLLM, or any command that speaks OpenAI's protocol, started for one job.

The server is started with the checkpoint, asked for many rows at once, and ended with the job. It renders the prompt
by the chat template that the checkpoint carries, which is the one that training used.

    with Served(["vllm", "serve", "model", "--port", "8001"], 8001, "model", rows=64) as engine:
        for replies in engine.generate(requests, Sampling(max_tokens=64)):
            ...
"""

import hashlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import httpx
import tenacity

from tasks.jobs.process import die_with_parent, stop
from tasks.jobs.sampling import Sampling
from tasks.jobs.tiles import Statistics

START_SECONDS = 1800  # a large model is loaded from a slow disk, and its kernels are compiled
ANSWER_SECONDS = 3600  # of one row, behind all those that the server has taken on
STOP_SECONDS = 30
TRIES = 5
UNUSABLE = {400, 413, 422}  # what a server says of a row that it cannot answer, such as a prompt too long
NO_ANSWER = {"text": None, "finish_reason": None, "prompt_tokens": 0, "completion_tokens": 0}
DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class ServerError(RuntimeError):
    """The server ended, or cannot be used."""


class Busy(ServerError):
    """The server could not answer just now."""


def serve_command(model: str, port: int, command: str | None, precision: str, tensor_parallel: int) -> list[str]:
    """What starts the server: `command` with `{model}` and `{port}` put in, or vLLM."""
    if command is not None:
        return [part.replace("{model}", model).replace("{port}", str(port)) for part in shlex.split(command)]
    options = {"--host": "127.0.0.1", "--port": port, "--dtype": DTYPES[precision]}
    # A checkpoint's own top_k or penalty would be laid upon every request; its stop tokens count all the same.
    options |= {"--generation-config": "vllm", "--tensor-parallel-size": tensor_parallel}
    return ["vllm", "serve", model, *(str(part) for option in options.items() for part in option)]


class Served:
    """A server for one model, from its start to its end.

    Args:
        command: what starts it. What it prints goes where this process prints.
        port: where it listens, on this machine.
        model: how it calls the model.
        rows: how many are asked for at once.

    Raises:
        ServerError: it ends, or does not answer within half an hour.
    """

    def __init__(self, command: Sequence[str], port: int, model: str, rows: int):
        self.model, self.rows, self.statistics = model, rows, Statistics()
        try:
            self._server = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_parent
            )
        except OSError as error:
            raise ServerError(f"the server cannot be started: {command[0]}: {error.strerror}") from None
        limits = httpx.Limits(max_connections=rows, max_keepalive_connections=rows)
        self._http = httpx.Client(  # without the environment: this machine is not behind a proxy
            base_url=f"http://127.0.0.1:{port}", timeout=ANSWER_SECONDS, limits=limits, trust_env=False
        )
        try:
            self._wait(command)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the server and whatever it started; the memory of its devices is free then."""
        self._http.close()
        stop(self._server, STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)

    def generate(self, requests: Iterable[dict[str, Any]], sampling: Sampling) -> Iterator[list[dict[str, Any]]]:
        """Yield replies as they come, in no particular order; see `Engine.generate`.

        Raises:
            ServerError: the server ended, or refuses what is no fault of a row.
        """
        with ThreadPoolExecutor(self.rows) as pool:
            asked = [pool.submit(self._answer, request, sampling) for request in requests]
            try:
                for future in as_completed(asked):
                    reply = future.result()
                    self.statistics.generated_tokens += reply["completion_tokens"]
                    yield [reply]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.close()  # so that nobody waits for what it still computes
                raise

    def _wait(self, command: Sequence[str]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._server.poll() is not None:
                raise ServerError(f"the server ended with exit code {self._server.returncode}: {shlex.join(command)}")
            try:
                if self._http.get("/health", timeout=5).status_code != 503:  # not every server has this page
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise ServerError(f"the server does not answer after {START_SECONDS} seconds: {shlex.join(command)}")

    @tenacity.retry(
        retry=tenacity.retry_if_exception_type((Busy, httpx.TransportError)),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=10),
        stop=tenacity.stop_after_attempt(TRIES),
        reraise=True,
    )
    def _answer(self, request: dict[str, Any], sampling: Sampling) -> dict[str, Any]:
        if self._server.poll() is not None:
            raise ServerError(f"the server ended with exit code {self._server.returncode}")
        plain = request.get("prompt") is not None
        route, key = ("completions", "prompt") if plain else ("chat/completions", "messages")
        body = {
            "model": self.model,
            key: request[key],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": _number(sampling.seed_of(request)),
            **({"stop": list(sampling.stop)} if sampling.stop else {}),
        }
        reply = self._http.post(f"/v1/{route}", json=body)
        if reply.status_code in UNUSABLE:
            error = f"the server refuses it ({reply.status_code}): {reply.text[:300]}"
            return {**NO_ANSWER, "id": request["id"], "error": error}
        if reply.status_code in {408, 409, 429} or reply.status_code >= 500:
            raise Busy(f"the server answers {reply.status_code}: {reply.text[:300]}")
        if not reply.is_success:
            raise ServerError(f"the server answers {reply.status_code}: {reply.text[:300]}")
        try:
            answer = reply.json()
            choice, usage = answer["choices"][0], answer["usage"]
            text = choice["text"] if plain else choice["message"]["content"] or ""
            return {
                "id": request["id"],
                "text": text,
                "finish_reason": choice["finish_reason"],
                "prompt_tokens": usage["prompt_tokens"],
                "completion_tokens": usage["completion_tokens"],
                "error": None,
            }
        except (ValueError, LookupError, TypeError) as error:
            raise Busy(f"the server's answer cannot be read ({error!r}): {reply.text[:300]}") from None


def _number(seed: str) -> int:
    """A seed as every server takes it: of 31 bits."""
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4]) >> 1
