"""The two web pages, human evaluation and demo: one HTML file each and a few lines of FastAPI, which Prefect brings.

Nothing is fetched from elsewhere, and a page may not even try: its content policy allows this server alone.
"""

import contextlib
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import HTMLResponse, StreamingResponse
from pydantic import BaseModel

from flows.terminal import Refusal
from tasks.human import HumanEvalError, HumanStudy, Vote, cast, items_as_json
from tasks.models.session import SessionError

PAGES = Path(__file__).parent / "pages"
POLICY = "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
Answer = Callable[[Sequence[dict[str, str]]], Iterator[str]]  # a conversation -> the words of the answer as they come


class Talk(BaseModel):
    """A conversation, the last turn being the user's."""

    messages: list[dict[str, str]]


def human_app(study: HumanStudy) -> FastAPI:
    """The page on which people vote."""
    app = _app("human.html")

    @app.get("/api/items")
    def items(voter: str) -> list[dict[str, Any]]:
        return items_as_json(study, voter)

    @app.post("/api/vote", status_code=204)
    def vote(vote: Vote) -> None:
        try:
            cast(study, [vote])
        except HumanEvalError as error:
            raise HTTPException(404, str(error)) from None

    return app


def demo_app(answers: Mapping[str, Answer], names: dict[str, str]) -> FastAPI:
    """The page on which student and teacher answer side by side. Args: answers, names: by `student`, `teacher`."""
    app = _app("demo.html")

    @app.get("/api/names")
    def who() -> dict[str, str]:
        return names

    @app.post("/api/answer/{who}")
    def answer(who: Literal["student", "teacher"], talk: Talk) -> StreamingResponse:
        pieces = answers[who](talk.messages)
        try:
            first = next(pieces, "")  # an answer that begins is no longer a refusal
        except SessionError as error:
            raise HTTPException(409, str(error)) from None
        return StreamingResponse(chain([first], pieces), media_type="text/plain; charset=utf-8")

    return app


def serve(app: FastAPI, port: int) -> None:
    """Serve a page to this machine alone until Ctrl-C.

    Raises:
        Refusal: another program has the port.
    """
    try:
        here = socket.create_server(("127.0.0.1", port))
    except OSError as error:  # uvicorn would end with code 3, which says here that a cap is reached
        raise Refusal(f"the page cannot be served: {error.strerror}. Name another port with --port.") from None
    with here, contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[here])


def _app(page: str) -> FastAPI:
    app = FastAPI(openapi_url=None)
    # A stranger's page may have its own name lead to this machine, and would then speak for whoever looks at it.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    text = (PAGES / page).read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse)
    def read() -> str:
        return text

    @app.middleware("http")
    async def only_from_here(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    return app
