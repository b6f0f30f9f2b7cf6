"""How fast the engine answers and scores, with the embedded SmolLM2-135M on this machine.

    python -m tests.benchmarks.inference

256 prompts are the bundled seeds, some twice, at most 128 new tokens, greedy, in the precision that `auto` picks here.
Rates are generated tokens (the end of turn counts) per second of generation, prefill included, loading excluded. The
engine is timed before the alternatives and after them, as a shared machine is not always equally fast; its rate is that
of both together. The alternatives, in fp32 and in bf16, which not every processor computes natively:

- *batch 1*: `model.generate`, one prompt after the other, which is what the original does. Timed on every 32nd prompt.
- *batch 32*: `model.generate` on prompts as they come, padded at the left. Timed on the first 64.
- *single forwards*: for scoring, one forward with labels for each answer. Timed on every 8th.
"""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tasks.jobs.convert import EMBEDDED, convert
from tasks.jobs.engine import Engine
from tasks.jobs.network import DTYPES
from tasks.jobs.sampling import Sampling
from tasks.jobs.template import encode_example, encode_prompt
from tests.benchmarks.run import figure

PROMPTS, MAX_TOKENS = 256, 128
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEEDS = Path(__file__).parents[2] / "tasks" / "data" / "seeds.jsonl"


def make_requests() -> list[dict[str, Any]]:
    """256 requests from the bundled seeds."""
    seeds = [json.loads(line) for line in SEEDS.read_bytes().splitlines()]
    texts = ["\n\n".join(filter(None, (seed["instruction"], seed["input"]))) for seed in seeds]
    return [{"id": str(i), "messages": [{"role": "user", "content": texts[i % len(texts)]}]} for i in range(PROMPTS)]


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """How long it takes, and what it gives."""
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


@torch.inference_mode()
def generate_plainly(model: Any, tokenizer: Any, requests: Sequence[dict[str, Any]], batch: int) -> int:
    """Answer with `model.generate`; the number of new tokens."""
    prompts = [encode_prompt(tokenizer, request["messages"]) for request in requests]
    tokens = 0
    for start in range(0, len(prompts), batch):
        rows = prompts[start : start + batch]
        width = max(map(len, rows))
        padded = [[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows]
        ids = torch.tensor(padded, device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
        output = model.generate(ids, attention_mask=mask, max_new_tokens=MAX_TOKENS, do_sample=False)[:, width:]
        for row in output.tolist():
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            tokens += end
    return tokens


@torch.inference_mode()
def score_plainly(model: Any, tokenizer: Any, items: Sequence[dict[str, Any]]) -> list[float]:
    """The loss of each answer by one forward each."""
    losses = []
    for item in items:
        example = encode_example(tokenizer, item["messages"], item["answer"], whole=True, max_length=8192)
        labels = [-100] * example.prompt_length + example.input_ids[example.prompt_length :]
        tokens, targets = (torch.tensor([ids], device=model.device) for ids in (example.input_ids, labels))
        losses.append(model(tokens, labels=targets).loss.item())
    return losses


def generate(engine: Engine, requests: Sequence[dict[str, Any]]) -> tuple[int, float, dict[str, dict[str, Any]]]:
    """Tokens, seconds, and the replies by their ids."""
    taken, batches = seconds(lambda: list(engine.generate(requests, Sampling(max_tokens=MAX_TOKENS))))
    replies = {reply["id"]: reply for batch in batches for reply in batch}
    return sum(reply["completion_tokens"] for reply in replies.values()), taken, replies


def score(engine: Engine, items: Sequence[dict[str, Any]]) -> tuple[float, dict[str, dict[str, Any]]]:
    """Seconds, and the scores by their ids."""
    taken, batches = seconds(lambda: list(engine.score(items)))
    return taken, {score["id"]: score for batch in batches for score in batch}


def run() -> list[dict[str, Any]]:
    requests = make_requests()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        convert(EMBEDDED, folder)
        start_up, engine = seconds(lambda: Engine(folder))
        list(engine.generate(requests[:8], Sampling(max_tokens=8)))  # warm up
        engine.statistics.positions = engine.statistics.padded_positions = 0
        tokens, taken, replies = generate(engine, requests)
        padded = engine.statistics.padded_share
        items = [{**request, "answer": replies[request["id"]]["text"], "whole": True} for request in requests]
        scoring_taken, scores = score(engine, items)

        plain: dict[str, float] = {}
        plain_scoring: dict[str, float] = {}
        for precision in ("fp32", "bf16"):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision]).eval().to(DEVICE)
            generate_plainly(model, engine.tokenizer, requests[:1], 1)  # warm up
            for batch, subset in ((1, requests[::32]), (32, requests[:64])):
                took, count = seconds(partial(generate_plainly, model, engine.tokenizer, subset, batch))
                plain[f"batch {batch}, {precision}"] = count / took
            score_plainly(model, engine.tokenizer, items[:1])  # warm up
            took, losses = seconds(partial(score_plainly, model, engine.tokenizer, items[::8]))
            plain_scoring[precision] = len(losses) / took
            # They must agree, or one of them computes something else.
            ours_by_token = [scores[item["id"]]["loss_sum"] / scores[item["id"]]["tokens"] for item in items[::8]]
            apart = max(abs(mine - theirs) for mine, theirs in zip(ours_by_token, losses, strict=True))
            if apart > (1e-3 if engine.precision == precision == "fp32" else 0.1):
                raise AssertionError(f"the engine ({engine.precision}) and single forwards in {precision} disagree")

        more_tokens, more_taken, _ = generate(engine, requests)
        ours = (tokens + more_tokens) / (taken + more_taken)
        scoring = 2 * len(items) / (scoring_taken + score(engine, items)[0])

    figures = []
    for label, theirs in plain.items():
        name = f"inference-vs-{label.split(',')[0].replace(' ', '')}"
        figures.append(figure(name, ours, "tokens/s", f"generate, {label} ({theirs:.3g}/s)", ours / theirs))
    for precision, theirs in plain_scoring.items():
        against = f"single forwards, {precision} ({theirs:.3g}/s)"
        figures.append(figure("scoring", scoring, "answers/s", against, scoring / theirs))
    return [
        *figures,
        figure("inference-padded", 100 * padded, "% of positions"),
        figure("inference-load", start_up, "s"),
    ]


if __name__ == "__main__":
    for row in run():
        print(json.dumps(row))
