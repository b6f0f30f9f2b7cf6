"""Answers requests and scores given answers with a local model: `python -m tasks.jobs.infer FOLDER/job.json`.

Reads `requests.jsonl` and `score.jsonl` in the job's folder, as far as job.json names them, and appends to
`replies.jsonl` and `scores.jsonl`. A batch is on disk before the next one starts; a job that was killed goes on
after the last whole one, with the same batches, and so with the same answers.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.jobs.engine import Engine
from tasks.jobs.launch import finish, report_progress


def main(job_file: Path) -> None:
    directory = job_file.parent
    job = json.loads(job_file.read_text())
    requests = _lines(directory / job["requests"]) if job["requests"] else []
    to_score = _lines(directory / job["score"]) if job["score"] else []
    total = len(requests) + len(to_score)
    engine = Engine(job["model"], job["precision"], job["max_batch_rows"], job["max_batch_tokens"])
    sampling, started = job["sampling"], time.perf_counter()
    replies, scores = _Output(directory / "replies.jsonl"), _Output(directory / "scores.jsonl")
    generated = 0

    def progress() -> None:
        rate = generated / (time.perf_counter() - started)
        report_progress(len(replies.done) + len(scores.done), total, **{"tokens/s": round(rate)} if generated else {})

    progress()
    prompts = [engine.encode(request) for request in requests]
    refused = {prompt.id: refusal for prompt in prompts if (refusal := engine.refusal(prompt, sampling["max_tokens"]))}
    replies.add([refusal for key, refusal in refused.items() if key not in replies.done])
    for batch in engine.plan([prompt for prompt in prompts if prompt.id not in refused], sampling["max_tokens"]):
        if not replies.done.issuperset(prompt.id for prompt in batch):
            answers = engine.generate(batch, sampling, job["seed"])
            generated += sum(answer["completion_tokens"] for answer in answers)
            replies.add(answers)
            progress()
    seconds = time.perf_counter() - started
    for scored in engine.score([item for item in to_score if item["id"] not in scores.done]):
        scores.add(scored)
        progress()
    finish(
        directory,
        {
            "replies": len(replies.done),
            "scores": len(scores.done),
            "generated_tokens": generated,
            "seconds": round(seconds, 2),
            "tokens_per_second": round(generated / seconds, 1),
            "idle_share": round(1 - engine.useful / engine.computed, 4) if engine.computed else 0.0,
            "device": engine.device,
            "dtype": str(engine.dtype).removeprefix("torch."),
        },
    )


class _Output:
    """A file of JSON lines that grows by whole batches. A batch that a kill tore apart is taken off at the start."""

    def __init__(self, path: Path):
        self._marks = path.with_suffix(".size")  # the size up to the last whole batch, renamed into place
        size = int(self._marks.read_text()) if self._marks.exists() else 0
        self._file = path.open("ab")
        self._file.truncate(size)
        self.done = {line["id"] for line in _lines(path)}

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        if not rows:
            return
        self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        fresh = self._marks.with_suffix(".new")
        fresh.write_text(str(self._file.tell()))
        os.replace(fresh, self._marks)
        self.done |= {row["id"] for row in rows}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
