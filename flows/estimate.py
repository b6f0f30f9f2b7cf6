"""What a run will ask and cost, reckoned before anything is sent.

The requests are counted from the settings and the seed instructions themselves. What nobody can know before,
how long answers will be and how many candidates will be new, is assumed; where this home's journal has answers of
the same role and model, their mean is taken. Left out, as they are rare or in the user's favour: requests tried
again, reviews asked again, the discount for cached prompts.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flows.chain import settled, start_of
from flows.config import ConfigError, DistillConfig
from storage.journal import answered_among, spend_of
from storage.pools import instruction_id, read_rows
from tasks.generate import EXPECTED_YIELD, PROMPTS
from tasks.models.endpoint import OpenAIModel
from tasks.models.prices import price_of
from tasks.models.wire import keyer
from tasks.referee import PROMPT, LLMReferee
from tasks.seed import usable_seeds

USUAL_TOKENS = {"teacher": 256, "referee": 160, "generator": 80}  # of an answer, where nothing better is known
CHARS_PER_TOKEN = 4.0  # of English prose under today's byte-pair vocabularies
TOKENS_AROUND_A_MESSAGE = 4  # role and separators
JSON_AROUND = len('{"instruction": "", "input": ""}')  # what a generator's answer has beside the new instruction


@dataclass(frozen=True, slots=True)
class Line:
    """What one role is asked in one iteration; iteration 0 is before the first."""

    iteration: int
    stage: str
    model: str
    requests: int  # to be sent
    answered: int  # found in the journal: free
    prompt_tokens: int
    completion_tokens: int
    usd: float | None  # null where the model is free


Assumptions = dict[str, tuple[float, str]]  # name -> value, and where it comes from


def estimate_run(config: DistillConfig, given: Sequence[str] = ()) -> tuple[list[Line], Assumptions]:
    """The paid part of a run, a line for each role, model and iteration, in the order of the run.

    Args:
        given: assumptions of the user, as `teacher_tokens=120`.

    Raises:
        ConfigError: an assumption has no such name, or no such value.
        SeedError: the instructions cannot be read.
        UnknownPrice: a model needs a price.
    """
    assumed = _assumptions(config, given)
    reckoning = _Reckoning(config, {name: value for name, (value, _) in assumed.items()})
    return list(reckoning.lines()), assumed


def total_usd(lines: Iterable[Line]) -> float:
    """Dollars of all lines together."""
    return math.fsum(line.usd or 0.0 for line in lines)


def _assumptions(config: DistillConfig, given: Sequence[str]) -> Assumptions:
    samplings = {"teacher": config.teacher.sampling, "generator": config.generate.sampling}
    if isinstance(config.referee, LLMReferee):
        samplings["referee"] = config.referee.sampling
    measured = _measured(config)
    found: Assumptions = {}
    for role, sampling in samplings.items():
        usual = min(USUAL_TOKENS[role], sampling.max_tokens)
        found[f"{role}_tokens"] = measured.get(role, (usual, "an answer's length, a guess"))
    teacher = found["teacher_tokens"][0]
    found["student_tokens"] = (min(teacher, config.student.sampling.max_tokens), "as the teacher's, up to its limit")
    found["new_share"] = (EXPECTED_YIELD, "of the generator's candidates, a guess")
    found["chars_per_token"] = (CHARS_PER_TOKEN, "of prompts; no tokenizer of a closed model is at hand")
    for text in given:
        name, _, value = text.partition("=")
        if name not in found:
            raise ConfigError(f"--assume {text}: no such assumption. There are: {', '.join(found)}.")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf or (name == "new_share" and number > 1):
            raise ConfigError(f"--assume {text}: give a number above 0{' and up to 1' if name == 'new_share' else ''}.")
        found[name] = (number, "given")
    return found


def _measured(config: DistillConfig) -> dict[str, tuple[float, str]]:
    """Mean answer lengths of the same role and model in this home's journal."""
    models = {(name.split()[0], model.model) for name, model in config.models().items() if model.kind == "openai"}
    tokens, requests = Counter[str](), Counter[str]()
    for row in spend_of():
        if (row.role, row.model) in models:
            tokens[row.role] += row.completion_tokens
            requests[row.role] += row.requests
    return {
        role: (round(tokens[role] / count, 1), f"mean of {count:,} answers in the journal")
        for role, count in requests.items()
        if tokens[role]
    }


class _Reckoning:
    """Goes through the loop as the flow does, with numbers of rows in place of rows."""

    def __init__(self, config: DistillConfig, assumed: dict[str, float]):
        self.config, self.assumed = config, assumed
        usable = usable_seeds(config.seeds)
        start = start_of(settled(config))
        # Of a pool that is taken over the journal has most answers: they cost nothing.
        rows = read_rows(start.pools.cache) if start else usable.rows
        self.seeds, self.heldout = _with_ids(rows), _with_ids(usable.heldout)

    def lines(self) -> Iterable[Line]:
        config = self.config
        seed_chars = sum(_chars(row) for row in self.seeds)
        rows, chars = len(self.seeds), float(seed_chars)  # of the cache pool
        fresh = config.generate.hard_rows + config.generate.easy_rows
        per_fresh = max(self.assumed["generator_tokens"] * self.assumed["chars_per_token"] - JSON_AROUND, 1)
        yield from self._teachers(0, self.heldout)
        yield from self._evaluation(0)
        for iteration in range(1, config.iterations + 1):
            if iteration == 1:
                yield from self._teachers(iteration, self.seeds)
            else:
                yield from self._teachers_of_new(iteration, fresh, per_fresh)
            yield from self._evaluation(iteration)
            yield from self._referee(iteration, rows, chars)
            yield from self._generator(iteration, fresh, chars / rows)
            rows, chars = rows + fresh, chars + fresh * per_fresh

    def _teachers(self, iteration: int, rows: list[dict[str, Any]]) -> Iterable[Line]:
        """The teachers' answers to rows that are known: those in the journal are free."""
        teacher = self.config.teacher
        for number, model in enumerate(teacher.models):
            if not isinstance(model, OpenAIModel):
                continue
            requests = [teacher.request(row) for row in rows if teacher.chosen(row) == number]
            key_of_request = keyer(model, teacher.sampling)
            answered = answered_among(key_of_request(request) for request in requests)
            asked = [request for request in requests if key_of_request(request) not in answered]
            chars = sum(len(message["content"]) for request in asked for message in request.messages)
            messages = sum(len(request.messages) for request in asked)
            yield self._line(iteration, "teacher", model, len(asked), chars, messages=messages, answered=len(answered))

    def _teachers_of_new(self, iteration: int, fresh: int, per_fresh: float) -> Iterable[Line]:
        """The teachers' answers to generated rows: each gets the part that it has of the seeds."""
        teacher = self.config.teacher
        parts = Counter(teacher.chosen(row) for row in self.seeds)
        system = len(teacher.system_prompt or "")
        for number, model in enumerate(teacher.models):
            if isinstance(model, OpenAIModel):
                rows = round(fresh * parts[number] / len(self.seeds))
                messages = rows * (2 if system else 1)
                yield self._line(iteration, "teacher", model, rows, rows * (per_fresh + system), messages=messages)

    def _evaluation(self, iteration: int) -> Iterable[Line]:
        """The referee's reviews of the held-out answers."""
        if self.config.evaluation.by_referee:
            for line in self._referee(iteration, len(self.heldout), sum(_chars(row) for row in self.heldout)):
                yield replace(line, stage="referee, held out")

    def _referee(self, iteration: int, rows: int, chars: float) -> Iterable[Line]:
        referee = self.config.referee
        if isinstance(referee, LLMReferee) and isinstance(referee.model, OpenAIModel):
            times = referee.reviews_per_row
            said = (self.assumed["teacher_tokens"] + self.assumed["student_tokens"]) * self.assumed["chars_per_token"]
            frame = len(PROMPT.render(instruction="", input="", first="", second=""))
            yield self._line(iteration, "referee", referee.model, rows * times, times * (chars + rows * (said + frame)))

    def _generator(self, iteration: int, fresh: int, per_parent: float) -> Iterable[Line]:
        generate = self.config.generate
        if isinstance(generate.model, OpenAIModel) and fresh:
            requests = sum(
                min(math.ceil(rows / self.assumed["new_share"]), math.ceil(rows * generate.max_attempts))
                for rows in (generate.hard_rows, generate.easy_rows)
            )
            frames = [len(PROMPTS[generate.method, side].render(instruction="", input="")) for side in ("hard", "easy")]
            share = generate.hard_rows / fresh
            frame = share * frames[0] + (1 - share) * frames[1]
            yield self._line(iteration, "generator", generate.model, requests, requests * (frame + per_parent))

    def _line(
        self,
        iteration: int,
        role: str,
        model: OpenAIModel,
        requests: int,
        chars: float,
        *,
        messages: int | None = None,
        answered: int = 0,
    ) -> Line:
        """Args: chars, messages: of all prompts together, by default a message each; answered: found in the journal."""
        price = price_of(model.model, model.price)
        if price and model.mode == "batch":
            price = price.batched()
        around = TOKENS_AROUND_A_MESSAGE * (requests if messages is None else messages)
        prompt = round(chars / self.assumed["chars_per_token"]) + around
        completion = round(requests * self.assumed[f"{role}_tokens"])
        usd = price.cost(prompt, 0, completion) if price else None
        return Line(iteration, role, model.model, requests, answered, prompt, completion, usd)


def _with_ids(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"instruction_id": instruction_id(row["instruction"], row["input"]), **row} for row in rows]


def _chars(row: dict[str, Any]) -> int:
    return len(row["instruction"]) + (len(row["input"]) + 2 if row["input"] else 0)
