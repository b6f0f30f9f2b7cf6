"""A local model one can talk to: its process stays, and its words are given out as they come."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from storage.files import Checkpoint
from tasks.jobs.process import ENVIRONMENT, die_with_parent, stop
from tasks.models.chat import Sampling
from tasks.models.local import LocalModel


class SessionError(RuntimeError):
    """The model's process ended, or could not answer."""


class ConversationTooLong(SessionError):
    """More was said than the model's context holds; a shorter conversation can be answered."""


class Session:
    """A model in a process of its own that answers one conversation at a time. Start it in the main thread: it
    dies with the thread that started it."""

    def __init__(self, settings: LocalModel, checkpoint: Checkpoint):
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 closed with the session
        self._turn = threading.Lock()
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tasks.jobs.chat", str(checkpoint.path), settings.precision, settings.quantization],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
            env={**os.environ, **ENVIRONMENT},
            preexec_fn=die_with_parent,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def answer(self, messages: Sequence[dict[str, str]], sampling: Sampling) -> Iterator[str]:
        """The answer, a few words at a time. Whoever comes while another answer is being given waits.

        Raises:
            ConversationTooLong: before a word of the answer.
            SessionError: the process ended.
        """
        assert self._child.stdin is not None
        asked = {"messages": list(messages), **sampling.model_dump(include={"temperature", "top_p", "max_tokens"})}
        with self._turn:
            try:
                self._child.stdin.write(json.dumps(asked) + "\n")
                self._child.stdin.flush()
            except BrokenPipeError:
                raise SessionError(self._last_words()) from None
            finished = False
            try:
                for said in self._lines():
                    finished = "finish_reason" in said or "error" in said
                    if "error" in said:
                        raise ConversationTooLong(said["error"])
                    if finished:
                        return
                    if "text" in said:
                        yield said["text"]
                raise SessionError(self._last_words())
            finally:
                if not finished:  # whoever listened went away: the rest of this answer is not the next one's
                    for said in self._lines():
                        if "finish_reason" in said or "error" in said:
                            break

    def close(self) -> None:
        """End the process."""
        assert self._child.stdin is not None
        with suppress(BrokenPipeError):  # what could not be said to a process that has ended
            self._child.stdin.close()
        stop(self._child)
        self._log.close()

    def _lines(self) -> Iterator[dict[str, Any]]:
        """What the process says; anything that is not JSON is a library's remark."""
        assert self._child.stdout is not None
        while line := self._child.stdout.readline():
            if line.startswith("{"):
                yield json.loads(line)

    def _last_words(self) -> str:
        self._child.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().split("\n")
        return f"the model's process ended: {lines[-1]}"
