"""Generation: new instructions from hard parents (more of the same) and from easy ones (rarer ones).

Each candidate passes the novelty filter, and every one is kept with the reason of its rejection. The stage ends
when enough are accepted or when the cap on attempts is reached; a shortfall is an outcome, not an error.
"""

import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from storage.files import Snapshot
from storage.pools import by_id, instruction_id, write_snapshot
from storage.runs import Generated
from tasks.contamination import Evaluated, whole_text
from tasks.models.budget import Account
from tasks.models.chat import JSON_OBJECT, Reply, Request, Sampling, Status, storable
from tasks.models.local import LocalModel
from tasks.models.prompts import load
from tasks.models.ready import ModelSettings, ReadyModel, answer
from tasks.novelty import NoveltyIndex, Rejection, check_text, leaks
from tasks.policies import stage
from tasks.progress import progress

VERSION = 2
SIDES = ("hard", "easy")
DRAWS = 100_000  # of a parent in one iteration, at most
PROMPTS = {
    ("prompt", "hard"): load("generate_hard.md"),
    ("prompt", "easy"): load("generate_easy.md"),
    ("continuation", "hard"): load("continue_hard.txt"),
    ("continuation", "easy"): load("continue_easy.txt"),
}
CANDIDATE_SCHEMA = {
    "type": "object",
    "properties": {"instruction": {"type": "string"}, "input": {"type": "string"}},
    "required": ["instruction", "input"],
    "additionalProperties": False,
}
EXPECTED_YIELD = 0.9  # of the first round, so that little is asked for and not needed; later rounds go by what came


class GenerateConfig(BaseModel):
    """Who writes new instructions, and how many."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelSettings = Field(
        LocalModel(), description="A local model, or an OpenAI-compatible endpoint (kind: openai)."
    )
    method: Literal["prompt", "continuation"] = Field(
        "prompt",
        description="prompt: a chat model is told what to write. continuation: a small local model continues a list.",
    )
    sampling: Sampling = Field(
        Sampling(temperature=1.0, max_tokens=1024), description="The paper: temperature 1.0, top-p 1.0."
    )
    hard_rows: int = Field(3000, ge=0, description="New instructions wanted from hard parents (the paper: 3,000).")
    easy_rows: int = Field(3000, ge=0, description="New instructions wanted from easy parents (the paper: 3,000).")
    parents: Literal["difficulty", "random"] = Field(
        "difficulty",
        description="difficulty: a side's parents are what the referee found hard or easy. random: as many, drawn by "
        "lot (for ablation: what the referee is worth).",
    )
    max_attempts: float = Field(
        3.0, ge=1, le=20, description="Requests at most, as a multiple of the rows wanted. Then the stage ends short."
    )
    max_similarity: float = Field(
        0.7, gt=0, le=1, description="A candidate with a higher ROUGE-L F to any known instruction is dropped (paper)."
    )


class Generation(BaseModel):
    """The outcome of a generation stage."""

    candidates: Snapshot
    generated: Generated


@stage("generate", version=VERSION, prompts=[prompt.text for prompt in PROMPTS.values()])
def generate_instructions(
    config: GenerateConfig,
    model: ReadyModel,
    cache_pool: Snapshot,
    verdicts: Snapshot,
    heldout: Snapshot,
    seed: int,
    account: Account,
) -> Generation:
    """Write candidates from hard and easy parents until enough are new, or the cap on attempts is reached.

    Args:
        cache_pool: all instructions so far; the parents are among them, and no candidate may be near one.
        heldout: what the student is evaluated on; no candidate may be near one of these either.

    Raises:
        JobError, ModelError: as the model raises them.
    """
    pool = by_id(cache_pool)
    parents = _parents(config, pool, verdicts, seed)
    wanted, notes = _shares(config, parents)
    sieve = _Sieve(config, pool, by_id(heldout), wanted)
    first_draw = DRAWS * max(account.iteration - 1, 0)  # what an earlier iteration was answered would be no news
    queue = {side: _coverage(parents[side], first_draw, random.Random(f"{seed}/{side}")) for side in SIDES}
    left = {side: math.ceil(wanted[side] * config.max_attempts) for side in SIDES}
    while any(sieve.missing(side) and left[side] for side in SIDES):
        asked: dict[str, tuple[str, str, int]] = {}
        for side in SIDES:
            for _ in range(min(sieve.requests_for(side), left[side])):
                parent, draw = next(queue[side])
                asked[f"{side}/{parent}/{draw}"] = (side, parent, draw)
                left[side] -= 1
        requests = [
            _request(key, config.method, side, pool[parent], draw) for key, (side, parent, draw) in asked.items()
        ]
        with progress("new instructions") as on_progress:
            replies = answer(model, requests, config.sampling, seed=seed, account=account, on_progress=on_progress)
        for reply in replies:
            side, parent, draw = asked[reply.id]
            sieve.take(side, pool[parent], draw, reply)
    for side in SIDES:
        if sieve.missing(side):
            accepted = wanted[side] - sieve.missing(side)
            notes.append(f"{side}: {accepted:,} of {wanted[side]:,} accepted, cap on attempts reached")
    candidates = write_snapshot(
        "candidates", sieve.candidates, step="generate", version=VERSION, inputs=[cache_pool, verdicts, heldout]
    )
    rejected = Counter(row["rejection"] for row in sieve.candidates if row["rejection"])
    return Generation(
        candidates=candidates,
        generated=Generated(
            accepted=len(sieve.candidates) - rejected.total(),
            rejected=dict(rejected),
            wanted=sum(wanted.values()),
            notes=notes,
        ),
    )


def _parents(config: GenerateConfig, pool: Iterable[str], verdicts: Snapshot, seed: int) -> dict[str, list[str]]:
    """The ids of each side's parents, in the pool's order."""
    difficulty = {key: row["difficulty"] for key, row in by_id(verdicts, ["difficulty"]).items()}
    if config.parents == "random":  # the same verdicts, dealt out anew
        rng = random.Random(f"{seed}/lot")
        difficulty = dict(zip(difficulty, rng.sample(list(difficulty.values()), len(difficulty)), strict=True))
    return {side: [key for key in pool if difficulty.get(key) == side] for side in SIDES}


def _shares(config: GenerateConfig, parents: dict[str, list[str]]) -> tuple[dict[str, int], list[str]]:
    """How many rows are wanted of each side. A side without parents gives its share to the other, and says so."""
    wanted = {"hard": config.hard_rows, "easy": config.easy_rows}
    notes = []
    if any(wanted.values()) and not any(parents.values()):
        return dict.fromkeys(SIDES, 0), [f"no parents: none of the {sum(wanted.values()):,} rows is asked for"]
    for side, other in (SIDES, SIDES[::-1]):
        if wanted[side] and not parents[side]:
            notes.append(f"no {side} parents: their {wanted[side]:,} rows are asked of the {other} side")
            wanted = {side: 0, other: wanted[other] + wanted[side]}
    return wanted, notes


def _coverage(parents: list[str], draw: int, rng: random.Random) -> Iterator[tuple[str, int]]:
    """Parents in a random order without end, each once before any comes twice; with the number of the round."""
    while parents:
        for parent in rng.sample(parents, len(parents)):
            yield parent, draw
        draw += 1


def _request(key: str, method: str, side: str, parent: dict[str, Any], draw: int) -> Request:
    text = PROMPTS[method, side].render(instruction=parent["instruction"], input=parent["input"])
    if method == "continuation":
        return Request(id=key, prompt=text, draw=draw)
    return Request(id=key, messages=({"role": "user", "content": text},), draw=draw, response_schema=CANDIDATE_SCHEMA)


class _Sieve:
    """Takes replies one by one, in the order of their requests, and decides which are new."""

    def __init__(
        self,
        config: GenerateConfig,
        pool: dict[str, dict[str, Any]],
        heldout: dict[str, dict[str, Any]],
        wanted: dict[str, int],
    ):
        self.candidates: list[dict[str, Any]] = []
        self._read = _candidate_in_json if config.method == "prompt" else _candidate
        self._wanted = wanted
        self._accepted: Counter[str] = Counter()
        self._seen: Counter[str] = Counter()
        self._known = {*pool, *heldout}
        self._heldout = Evaluated(heldout.items(), config.max_similarity)
        self._index = NoveltyIndex(config.max_similarity)
        self._index.add_many((key, whole_text(row)) for key, row in pool.items())

    def missing(self, side: str) -> int:
        return self._wanted[side] - self._accepted[side]

    def requests_for(self, side: str) -> int:
        """How many requests should bring what is missing, by the share accepted so far."""
        share = self._accepted[side] / self._seen[side] if self._seen[side] else EXPECTED_YIELD
        return math.ceil(self.missing(side) / max(share, 0.1))

    def take(self, side: str, parent: dict[str, Any], draw: int, reply: Reply) -> None:
        self._seen[side] += 1
        row: dict[str, Any] = {"parent_id": parent["instruction_id"], "side": side, "draw": draw}
        unusable = None if reply.status is Status.OK else Rejection(reply.status)  # of the same names
        row |= {"category": parent["category"], "rejection": unusable}
        if row["rejection"] is None:
            row |= self._read(reply.text or "")
            row["instruction_id"] = instruction_id(row["instruction"], row["input"])
            row["rejection"] = row["rejection"] or check_text(row["instruction"])
            if not row["rejection"] and leaks(row["input"] or ""):  # data may be of any other kind
                row["rejection"] = Rejection.TEMPLATE_LEAK
            row |= {} if row["rejection"] else self._compared(side, row)
        self.candidates.append(row)
        self._accepted[side] += row["rejection"] is None

    def _compared(self, side: str, row: dict[str, Any]) -> dict[str, Any]:
        key, text = row["instruction_id"], whole_text(row)
        if near := self._heldout.nearest(row) or self._index.nearest(text):
            return {"rejection": Rejection.NEAR_DUPLICATE, "near_id": near.key, "similarity": near.similarity}
        if key in self._known:  # nothing is above a max_similarity of 1
            return {"rejection": Rejection.NEAR_DUPLICATE, "near_id": key, "similarity": 1.0}
        if not self.missing(side):
            return {"rejection": Rejection.SURPLUS}
        self._known.add(key)
        self._index.add(key, text)
        return {"rejection": None}


_JSON = json.JSONDecoder(strict=False)  # models put line breaks into strings


def _candidate(text: str) -> dict[str, Any]:
    """The instruction that a model wrote on."""
    return {"instruction": text.strip(), "input": None, "rejection": None}


def _candidate_in_json(text: str) -> dict[str, Any]:
    """Instruction and input of the first JSON object that has them, whatever stands around it; the whole text where the
    model gave none, as long as it did not try to."""
    with suppress(RecursionError):  # nested a thousand deep: what is inside is not looked for, brace by brace
        for brace in JSON_OBJECT.finditer(text):
            try:
                said = _JSON.raw_decode(text, brace.start())[0]
            except ValueError:  # also a number of thousands of digits
                continue
            if isinstance(said.get("instruction"), str):
                given = said.get("input")
                if given not in (None, [], {}) and not isinstance(given, str):
                    given = json.dumps(given, ensure_ascii=False)  # a list to sort
                input = (given or "").strip() or None
                instruction = said["instruction"].strip()
                return {"instruction": storable(instruction), "input": input and storable(input), "rejection": None}
    tried = text.lstrip().startswith(("{", "```")) or '"instruction"' in text
    return _candidate(text) | {"rejection": Rejection.MALFORMED if tried else None}
