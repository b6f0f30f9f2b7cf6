"""Answers requests and scores answers with a local model: one process, one job.

    python -m tasks.jobs.infer <directory>/job.json

`job.json`: {"model", "engine", "serve", "tensor_parallel", "precision", "quantization", "max_batch_rows",
"max_batch_tokens", "seed", "sampling": {"temperature", "top_p", "max_tokens", "stop"}, "requests": file or null,
"score": file or null}, the files being JSON lines beside it. Replies are appended to `replies.jsonl` and scores to
`scores.jsonl` as they come, in no particular order, and made durable every few seconds. A job that was killed goes on
where it stopped and gives the same replies as one that was not, because a row's answer does not depend on the other
rows of its batch.
"""

import json
import os
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from tasks.jobs.engine import Engine, NoRoom
from tasks.jobs.launch import REFUSED, finish, report_progress
from tasks.jobs.network import UnsupportedModel
from tasks.jobs.process import free_port
from tasks.jobs.quantization import NotInstalled
from tasks.jobs.sampling import Sampling
from tasks.jobs.served import Served, ServerError, serve_command
from tasks.jobs.tiles import Statistics

DURABLE_SECONDS = 5  # what a power cut may cost at most, beside the rows in flight; a kill costs those alone
PROGRESS_SECONDS = 1
SERVED_ROWS = 256  # asked of a server at once


class Lines:
    """A file of JSON lines that grows: appended to, made durable now and then, read again after a kill."""

    def __init__(self, path: Path):
        whole = path.read_bytes() if path.exists() else b""
        whole = whole[: whole.rfind(b"\n") + 1]  # a line torn by a kill is dropped
        self.done = {json.loads(line)["id"] for line in whole.splitlines()}
        self._file = path.open("r+b" if path.exists() else "wb")
        self._file.truncate(len(whole))
        self._file.seek(len(whole))
        self._durable = time.monotonic()

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Hand rows to the system, which a kill of this process cannot undo; to disk when the last time is a while ago."""
        for row in rows:
            self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            self.done.add(row["id"])
        self._file.flush()
        if time.monotonic() - self._durable >= DURABLE_SECONDS:
            self.make_durable()

    def make_durable(self) -> None:
        """All that was appended is on disk when this returns: not even a power cut can undo it."""
        os.fsync(self._file.fileno())
        self._durable = time.monotonic()


class Progress:
    """Tells the parent how far the job is, at most once a second."""

    def __init__(self, total: int, statistics: Statistics):
        self._total, self._statistics = total, statistics
        self._begin = self._told = time.monotonic()

    def tell(self, done: int) -> None:
        """Report, unless that was done a moment ago."""
        now = time.monotonic()
        if now - self._told >= PROGRESS_SECONDS or done == self._total:
            rate = self._statistics.generated_tokens / max(now - self._begin, 1e-9)
            report_progress(done, self._total, **{"tokens/s": round(rate)})
            self._told = now


def run(job: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Do the job and return its result."""
    requests, to_score = _read(directory, job["requests"]), _read(directory, job["score"])
    replies, scores = Lines(directory / "replies.jsonl"), Lines(directory / "scores.jsonl")
    sampling = Sampling(**{**job["sampling"], "stop": tuple(job["sampling"]["stop"])}, seed=job["seed"])
    unanswered = [row for row in requests if row["id"] not in replies.done]
    unscored = [row for row in to_score if row["id"] not in scores.done]

    ours = job["engine"] == "transformers"
    # A server answers and cannot score; one that has nothing to answer is not started.
    engine = _load(job) if ours or not unanswered else None
    with nullcontext(engine) if engine else _serve(job) as answering:
        progress = Progress(len(requests) + len(to_score), answering.statistics)
        begin = time.monotonic()
        for batch in answering.generate(unanswered, sampling):
            replies.append(batch)
            progress.tell(len(replies.done))
        replies.make_durable()
        seconds = time.monotonic() - begin
    if unscored:
        engine = engine or _load(job)
        for batch in engine.score(unscored):
            scores.append(batch)
            progress.tell(len(replies.done) + len(scores.done))
        scores.make_durable()

    generated = answering.statistics.generated_tokens
    return {
        "replies": len(replies.done),
        "scores": len(scores.done),
        "generated_tokens": generated,  # of this run; one that goes on after a kill counts its own
        "seconds": round(seconds, 3),
        "tokens_per_second": round(generated / seconds, 1) if generated else 0.0,
        "engine": job["engine"],
        "precision": engine.precision if engine else job["precision"],
        "padded_share": round(answering.statistics.padded_share, 4),
    }


def _load(job: dict[str, Any]) -> Engine:
    return Engine(
        Path(job["model"]), job["precision"], job["max_batch_rows"], job["max_batch_tokens"], job["quantization"]
    )


def _serve(job: dict[str, Any]) -> Served:
    port = free_port()
    command = serve_command(job["model"], port, job["serve"], job["precision"], job["tensor_parallel"])
    return Served(command, port, job["model"], job["max_batch_rows"] or SERVED_ROWS)


def _read(directory: Path, name: str | None) -> list[dict[str, Any]]:
    # Not str.splitlines(): a text may hold U+2028, which ends no line here.
    return [json.loads(line) for line in (directory / name).read_bytes().splitlines()] if name else []


def main(job_file: Path) -> None:
    """Run one job: see the module's docstring."""
    try:
        result = run(json.loads(job_file.read_bytes()), job_file.parent)
    except (NoRoom, NotInstalled, UnsupportedModel) as error:
        sys.exit(f"{REFUSED}{error}")
    except ServerError as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError as error:
        told = str(error).split("\n")[0]
        sys.exit(f"error: out of memory ({told}); set max_batch_tokens or max_batch_rows lower, or quantization: 4bit")
    finish(job_file.parent, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
