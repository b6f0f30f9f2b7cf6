"""Answers many prompts with one causal language model, as fast as one machine allows, and scores given answers.

    generate, score     make a *row* of each request; all of them wait in one queue
      │
      ├── lane, lane    are threads; each takes rows for whose *pages* it has room, and goes on until none is left:
      │
      │   tiles         fills a *step* with the next *run* of each of its rows, those with the shortest answers first
      │
      │                   │ row 9, new: 40 of its prompt │ row 2: 1 │ row 5: 1 │ row 7: 1 │ ... │ nobody's │
      │                   └──────────────────── as many tokens as a *tile* has ──────────────────────────────┘
      │
      │   network       takes the step through the layers of the model, in each of which
      │     linear        multiplies all tokens with weights at once,
      │     attention     puts their keys and values into pages, and lets each token look at those of its row,
      │     kernels       does what lies between, token by token
      │                 (on a GPU `gpu` does this, with `gpu_kernels` for the last two; pages are the same)
      │
      │   engine        gets the logits after each row's last token, and draws the next one (`sampling`), or notes the
      │                 losses where an answer is scored. The pages of a row that is done are for others
      ▼
    replies, scores     as rows are done, in no order

- A *row* is one text: its prompt, and what is known of its answer.
- A *step* is what goes through the network at once. It has as many tokens as one of a few *tiles* (`Network.tiles`). In
  any of these a product with weights gives each token the same numbers, and on a GPU each is recorded once.
- A *run* is tokens of one row that follow each other and are computed together: of a prompt up to 256, of an answer the
  one that was drawn last. A row is cut into the same runs in any company.
- A *page* has the keys and values of 64 tokens of one row, in all layers. Who begins gets as many as it may ever need, so
  that no row has to be moved or to wait. Those of what the chat template puts before every question are shared.
- A *lane* has rows, pages and steps of its own. On a CPU each core is one: operations this small lose more by waiting for
  each other than they win by two cores. On a GPU there are two, so that it computes one's step while the other's tokens
  are looked at.

What a row answers depends on its prompt and its own random numbers alone, not on the rows that are computed with it.
`tasks.jobs.tiles` says why.

Knows nothing of jobs, files of requests or progress: `tasks.jobs.infer` does. `network` and what is below it know nothing
of requests and answers.

    engine = Engine(Path("model"))
    for replies in engine.generate([{"id": "a", "messages": [...]}], Sampling(max_tokens=64)):
        ...
"""

import ctypes
import random
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
import transformers
from jinja2 import TemplateError
from torch import Tensor
from torch.nn import functional

from tasks.jobs import kernels
from tasks.jobs.network import best_precision, context_of, load, unsupported
from tasks.jobs.sampling import Sampling, aligned, draw_tokens
from tasks.jobs.template import Example, encode_example, encode_prompt, end_of_turn
from tasks.jobs.tiles import LANES_OF_A_GPU, Lane, Queue, Row, Settle, Statistics, Wanted

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of <malloc.h>
ROWS_OF_A_CORE, ROWS_OF_A_GPU = 128, 256
TOKENS_ON_A_CPU = 65_536
FEWEST_ROWS = 8  # of a lane on a CPU: another core is not worth its steps for less
FEWEST_ON_A_GPU = 384  # two lanes with fewer would leave much of their steps empty
SCORED_ROWS = 16  # at once: all their tokens are known, so a few rows fill a step
LOSSES_AT_ONCE = 128  # in fp32 they take twice the memory that logits do, or more
SHORTEST_PREFIX = 8  # tokens; computing fewer for each row costs less than looking them up
# An engine is held to what the model gives to these by itself. They are short, as each start pays for them.
PROBE = (
    "The river rises in the hills above the old town, and by the time it reaches the sea it has turned four mills, "
    "watered nine villages, and given its name to a bridge that nobody has crossed since the war.",
    "To bake bread you need flour, water, salt and time. Mix them until nothing is dry, let the dough rest overnight, "
    "fold it twice in the morning, and bake it in a hot oven until the crust sounds hollow when you knock.",
)
PROBE_RUN = 20  # tokens of a text that are computed together, twice
MOST_OFF = 0.2  # of how far the losses of a text lie apart. Rounding to bf16 takes a tenth of that


class NoRoom(Exception):
    """The answers may be as long as the model's whole context."""


class Engine:
    """A causal language model ready to answer.

    Args:
        path: folder of the model, with its tokenizer.
        precision: bf16, fp16, fp32, or auto: the fastest that this machine itself computes in.
        max_batch_rows: rows held in the cache together by each of a GPU's two lanes (256 by default), or by a core of the
            processor (128).
        max_batch_tokens: tokens, prompt and answer, held in the cache for all rows together; by default 65,536, and on a
            GPU what its free memory holds.
        quantization: none, or how the weights of linear layers are held: 8bit or 4bit (bitsandbytes).

    Raises:
        NotInstalled: the weights are to be quantized, and there is no bitsandbytes.
        UnsupportedModel: it is of a kind that this engine does not compute, or not on this machine.
    """

    def __init__(
        self,
        path: Path,
        precision: str = "auto",
        max_batch_rows: int | None = None,
        max_batch_tokens: int | None = None,
        quantization: str = "none",
    ):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.on_cpu = device.type == "cpu"
        if self.on_cpu:
            keep_freed_memory()
        self.precision = best_precision(device) if precision == "auto" else precision
        self.lanes, self.fewest_rows = (
            (torch.get_num_threads(), FEWEST_ROWS) if self.on_cpu else (LANES_OF_A_GPU, FEWEST_ON_A_GPU)
        )
        self.statistics = Statistics()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        texts = [self.tokenizer(text)["input_ids"][: 2 * PROBE_RUN + 1] for text in PROBE]
        self.network, losses = load(path, self.precision, device, quantization, texts)
        self.max_batch_rows = max_batch_rows or (ROWS_OF_A_CORE if self.on_cpu else ROWS_OF_A_GPU)
        self.max_batch_tokens = max_batch_tokens or (TOKENS_ON_A_CPU if self.on_cpu else self.network.tokens_that_fit())
        self.context = context_of(self.network.config)
        self.stop_tokens = stop_tokens_of(self.network, self.tokenizer)
        self.prefix: list[int] = []
        self._check(texts, losses)
        self.prefix, self.statistics = self._template_prefix(), Statistics()

    def _check(self, texts: Sequence[list[int]], expected: Sequence[Tensor]) -> None:
        """See that texts get the losses here that the model gives them by itself.

        A model may look at other tokens in a way that `check_can_run` has not heard of, and a processor or a GPU be of a
        kind that no kernel was tried on. Either would come out as bad answers, and nothing else.

        Raises:
            UnsupportedModel: they get others.
        """
        rows = [Row(str(place), text[:PROBE_RUN], room=len(text)) for place, text in enumerate(texts)]
        for row, text in zip(rows, texts):
            row.targets = text[1 : PROBE_RUN + 1]

        def in_two_runs(wanted: Wanted, logits: Tensor) -> list[tuple[Row, dict[str, Any]]]:
            """The second run of a text looks back at the pages of the first."""
            done = self._add_losses(wanted, logits)
            for row, _ in done:
                row.given, row.targets = texts[int(row.id)][:-1], texts[int(row.id)][1:]
            return [(row, score) for row, score in done if not row.pending]

        for _ in self._share(rows, in_two_runs, len(rows)):
            pass
        for row, losses in zip(rows, expected):
            off = (torch.tensor(row.losses) - losses)[PROBE_RUN:].abs().median()
            if off > MOST_OFF * (losses - losses.mean()).abs().median():
                raise unsupported(self.network.config, f"texts get other losses here, by {off:.2g} nats a token")

    # ---- answering

    def generate(self, requests: Sequence[dict[str, Any]], sampling: Sampling) -> Iterator[list[dict[str, Any]]]:
        """Yield replies as rows finish, in no particular order.

        Args:
            requests: `{"id", "messages"}` or `{"id", "prompt"}`, and optionally `"draw"`.

        Yields:
            `{"id", "text", "finish_reason", "prompt_tokens", "completion_tokens", "error"}`.

        Raises:
            NoRoom: no prompt fits beside an answer of `max_tokens`, so that all would be refused.
        """
        room = self.context - sampling.max_tokens
        if requests and room < 1:
            raise NoRoom(
                f"max_tokens {sampling.max_tokens} leaves no room for a prompt: this model's context is "
                f"{self.context} tokens. Set max_tokens lower"
            )
        fitting, refused = [], []
        for request in requests:
            try:
                row = self._row(request, sampling)
            except TemplateError as error:
                refused.append(_reply(request["id"], 0, error=f"the chat template refuses it: {error}"))
                continue
            if 0 < len(row.given) <= room:
                fitting.append(row)
            else:
                why = f"the prompt has {len(row.given)} tokens; 1 to {room} fit into the context beside the answer"
                refused.append(_reply(row.id, len(row.given), error=why))
        if refused:
            yield refused
        yield from self._share(fitting, partial(self._draw, sampling), self.max_batch_rows)

    def _row(self, request: dict[str, Any], sampling: Sampling) -> Row:
        if request.get("prompt") is not None:
            prompt = self.tokenizer(request["prompt"])["input_ids"]
        else:
            prompt = encode_prompt(self.tokenizer, request["messages"])
        return Row(request["id"], prompt, random.Random(sampling.seed_of(request)), room=sampling.max_tokens)

    def _draw(self, sampling: Sampling, wanted: Wanted, logits: Tensor) -> list[tuple[Row, dict[str, Any]]]:
        """Give each row its next token; the rows that end with it, and their replies."""
        self.statistics.add(generated=len(wanted))
        done = []
        chances = [row.chances.random() for row, _ in wanted] if sampling.temperature else []
        for (row, _), token in zip(wanted, draw_tokens(logits, chances, sampling)):
            row.answer.append(token)
            text, finish_reason = self._ending(row, sampling)
            if finish_reason is not None:
                done.append((row, _reply(row.id, len(row.given), text, finish_reason, len(row.answer))))
        return done

    def _ending(self, row: Row, sampling: Sampling) -> tuple[str, str | None]:
        """Text and finish reason of a row that is finished, else no reason."""
        if row.answer[-1] in self.stop_tokens:
            return self._text(row.answer[:-1]), "stop"
        if sampling.stop:
            # A stop text has at most as many tokens as bytes, so the newest few tokens hold it if it is there.
            tail = max(len(stop.encode()) for stop in sampling.stop) + 4
            newest = self._text(row.answer[-tail:])
            if any(stop in newest for stop in sampling.stop):
                text = self._text(row.answer)
                ends = [text.index(stop) for stop in sampling.stop if stop in text]
                if ends:
                    return text[: min(ends)], "stop"
        if len(row.answer) >= sampling.max_tokens:
            return self._text(row.answer), "length"
        return "", None

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    # ---- scoring

    def score(self, items: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        """Yield the loss of given answers under the model, in no particular order.

        Args:
            items: `{"id", "messages", "answer", "whole"}`; a whole answer is scored with its end of turn.

        Yields:
            `{"id", "loss_sum", "tokens"}`: nats, summed over the answer's tokens, as far as it fits into the context; null
            where none does, or there is none.
        """
        rows, unscored = [], []
        for item in items:
            try:
                example = self._example(item)
            except TemplateError:
                unscored.append(item["id"])
                continue
            answer = example.input_ids[example.prompt_length :]
            if answer and len(example.input_ids) <= self.context:
                rows.append(Row(item["id"], example.input_ids[:-1], targets=answer))
            else:
                unscored.append(item["id"])
        if unscored:
            yield [{"id": id, "loss_sum": None, "tokens": 0} for id in unscored]
        yield from self._share(rows, self._add_losses, min(self.max_batch_rows, SCORED_ROWS))

    def _example(self, item: dict[str, Any]) -> Example:
        return encode_example(
            self.tokenizer, item["messages"], item["answer"], whole=item["whole"], max_length=self.context
        )

    def _add_losses(self, wanted: Wanted, logits: Tensor) -> list[tuple[Row, dict[str, Any]]]:
        """Give each row the losses of its targets; the rows that have them all, and their scores."""
        losses = losses_of(logits, [row.targets[place - row.first_wanted] for row, place in wanted])
        done = []
        for (row, _), loss in zip(wanted, losses):
            row.losses.append(loss)
            if len(row.losses) == len(row.targets):
                done.append((row, {"id": row.id, "loss_sum": sum(row.losses), "tokens": len(row.losses)}))
        return done

    # ---- through the network

    def _share(self, rows: Sequence[Row], settle: Settle, most: int) -> Iterator[list[dict[str, Any]]]:
        """Have lanes take rows, each `most` of them at once, until none waits, and yield what is done."""
        if not rows:
            return
        # Longest first: too little memory shows at once.
        waiting = Queue(sorted(rows, key=lambda row: len(row.given), reverse=True))
        longest = max(len(row.given) + row.room for row in rows)
        count = min(self.lanes, -(-len(rows) // self.fewest_rows))
        at_once = min(most, -(-len(rows) // count))
        at_once_tokens = self.max_batch_tokens // count
        done: SimpleQueue[list[dict[str, Any]] | BaseException | None] = SimpleQueue()
        ended = threading.Event()

        def run(place: int) -> None:
            try:
                if self.on_cpu:
                    torch.set_num_threads(1)  # of this lane
                lane = Lane(
                    self.network,
                    self.statistics,
                    prefix=self.prefix,
                    rows=at_once,
                    tokens=at_once_tokens,
                    longest=longest,
                )
                with nullcontext() if self.on_cpu else torch.cuda.stream(stream_of_lane(place)):
                    for replies in lane.run(waiting, settle):
                        if ended.is_set():
                            return
                        if replies:
                            done.put(replies)
            except BaseException as error:
                done.put(error)
            finally:
                done.put(None)

        threads = [threading.Thread(target=run, args=[place], daemon=True) for place in range(count)]
        for thread in threads:
            thread.start()
        try:
            while count:
                replies = done.get()
                if isinstance(replies, BaseException):
                    raise replies
                if replies is None:
                    count -= 1
                else:
                    yield replies
        finally:
            ended.set()
            for thread in threads:
                thread.join()

    def _template_prefix(self) -> list[int]:
        """What the chat template puts before every question, often a system prompt, computed once for all rows.

        It is the template's own and not what the rows at hand have in common, which would change with the rows.
        """
        a, b = (encode_prompt(self.tokenizer, [{"role": "user", "content": text}]) for text in ("a", "b"))
        length = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), 0)
        return a[:length] if length >= SHORTEST_PREFIX else []


@cache
def stream_of_lane(place: int) -> Any:
    """Its own on a GPU. Torch deals out 32 again and again, and a lane shall not get the one in which another records."""
    return torch.cuda.Stream()


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: to be asked for memory at each operation, the kernel lets one thread in at a time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, size in ((M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26), (M_MMAP_THRESHOLD, 2**30)):
            mallopt(parameter, size)


def losses_of(logits: Tensor, targets: list[int]) -> list[float]:
    """The cross entropy of each target, in nats."""
    if logits.device.type == "cpu" and logits.dtype in kernels.DTYPES:
        return kernels.losses(kernels.bits(logits), np.array(targets)).tolist()
    wanted = torch.tensor(targets, device=logits.device)
    parts = zip(logits.split(LOSSES_AT_ONCE), wanted.split(LOSSES_AT_ONCE))
    return torch.cat([functional.cross_entropy(aligned(x), y, reduction="none") for x, y in parts]).tolist()


def stop_tokens_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: of the generation config, of the tokenizer, of the chat template."""
    configured = model.generation_config.eos_token_id
    tokens = configured if isinstance(configured, list) else [configured]
    return frozenset(t for t in (*tokens, tokenizer.eos_token_id, end_of_turn(tokenizer)) if t is not None)


def _reply(
    id: str,
    prompt_tokens: int,
    text: str | None = None,
    finish_reason: str | None = None,
    completion_tokens: int = 0,
    error: str | None = None,
) -> dict[str, Any]:
    return {
        "id": id,
        "text": text,
        "finish_reason": finish_reason,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "error": error,
    }
