"""Answers many prompts with one causal language model, as fast as one machine allows, and scores given answers.

Rows share every step: waiting prompts take the places of finished rows, so no step computes a row that is done.
What a row answers depends on its prompt and its own seed alone, not on the rows that happen to share its steps:
see `Row.random` for the sampling and `PAD_ROWS` for the arithmetic.

Knows nothing of jobs, files of requests or progress: `tasks.jobs.infer` does.

    engine = Engine(Path("model"))
    for replies in engine.generate([{"id": "a", "messages": [...]}], Sampling(max_tokens=64)):
        ...
"""

import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from tasks.jobs.template import encode_example, encode_prompt, end_of_turn

# Matrix kernels may sum in another order for few rows than for many. Batches of a multiple of 8 rows, and keys
# padded to a multiple of 64, always meet the same kernels, so a row's numbers do not depend on its company.
PAD_ROWS = 8
PAD_KEYS = 64
REFILL_SHARE = 8  # prefill once this part (1/8) of the places is free: few large prefills, few empty places
TOP_P_CANDIDATES = 512  # the nucleus is looked for among these; a row that needs more is sorted whole


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn, and when an answer ends."""

    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    max_tokens: int = 1024
    stop: tuple[str, ...] = ()  # texts that end an answer and are left out of it
    seed: int = 0


@dataclass(slots=True)
class Row:
    """One prompt on its way: its tokens, the answer so far, and its own random numbers.

    `random` is seeded by the run's seed, the request's id and draw, and gives one number a token: the same
    row draws the same numbers in any batch, any shard and after any restart.
    """

    id: str
    prompt: list[int]
    random: random.Random
    answer: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens whose keys and values are in the cache: all but the newest, which is computed next."""
        return len(self.prompt) + len(self.answer) - 1


@dataclass(slots=True)
class Statistics:
    """What was computed so far. A position is one token of one row going through the network."""

    positions: int = 0
    useful_positions: int = 0
    generated_tokens: int = 0

    @property
    def padded_share(self) -> float:
        """Share of the positions that were padding."""
        return 1 - self.useful_positions / self.positions if self.positions else 0.0


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: one slot a row, written in place and read as a view, never concatenated."""

    is_sliding = False  # a sliding window is a matter of the mask here

    def __init__(self, cache: "SlotCache"):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        for name, states in (("keys", key_states), ("values", value_states)):
            shape = (self.cache.slots, states.shape[1], self.cache.capacity, states.shape[3])
            setattr(self, name, states.new_zeros(shape))  # zeros: a masked NaN would still poison a sum
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, positions, visible = self.cache.rows, self.cache.positions, self.cache.visible
        if positions is None:  # prefill: new rows see nothing but themselves
            self.keys[rows, :, : key_states.shape[2]] = key_states
            self.values[rows, :, : key_states.shape[2]] = value_states
            return key_states, value_states
        self.keys[rows, :, positions] = key_states[:, :, 0]
        self.values[rows, :, positions] = value_states[:, :, 0]
        return self.keys[: len(rows), :, :visible], self.values[: len(rows), :, :visible]

    def grow(self, capacity: int) -> None:
        """Make room for longer rows."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros((old.shape[0], old.shape[1], capacity, old.shape[3]))
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row to another slot."""
        self.keys[target, :, :length] = self.keys[source, :, :length]
        self.values[target, :, :length] = self.values[source, :, :length]

    def get_seq_length(self) -> int:
        return 0 if self.cache.positions is None else self.cache.visible - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length, 0) if self.cache.positions is None else (self.cache.visible, 0)

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """The keys and values of all layers, and where this step's tokens go."""

    def __init__(self, layers: int, slots: int):
        self.slots, self.capacity = slots, 0
        self.rows: Tensor = torch.empty(0)  # the slots of this step's rows
        self.positions: Tensor | None = None  # where each row's token goes; None in a prefill
        self.visible = 0  # how many keys a decoding row is shown, most of them masked for a short one
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])

    def reserve(self, length: int) -> None:
        """Make room for rows of `length` tokens."""
        if length > self.capacity:
            self.capacity = _round_up(length, PAD_KEYS)
            for layer in self.layers:
                if layer.is_initialized:
                    layer.grow(self.capacity)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row to another slot."""
        for layer in self.layers:
            layer.move(source, target, length)


class Engine:
    """A causal language model ready to answer.

    Args:
        path: folder of the model, with its tokenizer.
        precision: bf16, fp16, fp32, or auto: the best that this machine computes natively.
        max_batch_rows: rows computed together.
        max_batch_tokens: tokens, prompt and answer, held in the cache for all rows together.
    """

    def __init__(self, path: Path, precision: str = "auto", max_batch_rows: int = 64, max_batch_tokens: int = 65_536):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.precision = best_precision(self.device) if precision == "auto" else precision
        self.max_batch_rows, self.max_batch_tokens = max_batch_rows, max_batch_tokens
        self.statistics = Statistics()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=DTYPES[self.precision], attn_implementation="sdpa"
        )
        self.model.eval().to(self.device)
        self.config = self.model.config.get_text_config()
        self.stop_tokens = frozenset(stop_tokens_of(self.model, self.tokenizer))
        # Positions of one prefill or one scoring batch: enough to keep the cores busy, little enough for memory.
        self.block = 1024 if self.device.type == "cpu" else 16_384

    # ------------------------------------------------------------------ answering

    @torch.inference_mode()
    def generate(self, requests: Iterable[dict[str, Any]], sampling: Sampling) -> Iterator[list[dict[str, Any]]]:
        """Yield replies as rows finish, in no particular order.

        Args:
            requests: `{"id", "messages"}` or `{"id", "prompt"}`, and optionally `"draw"`.

        Yields:
            `{"id", "text", "finish_reason", "prompt_tokens", "completion_tokens", "error"}`.
        """
        rows = [self._row(request, sampling) for request in requests]
        room = self.config.max_position_embeddings - sampling.max_tokens
        refused = [_refusal(row, room) for row in rows if not 0 < len(row.prompt) <= room]
        if refused:
            yield refused
        # Longest first: rows of like length share a prefill, and too little memory shows at once.
        fitting = (row for row in rows if 0 < len(row.prompt) <= room)
        waiting = deque(sorted(fitting, key=lambda row: len(row.prompt), reverse=True))
        slots = min(self.max_batch_rows, len(waiting))
        cache = SlotCache(self.config.num_hidden_layers, _round_up(slots, PAD_ROWS))
        active: list[Row] = []  # the row in slot i

        while waiting or active:
            free = min(slots, self._rows_that_fit(active, waiting, sampling)) - len(active)
            if waiting and free > 0 and (not active or free * REFILL_SHARE >= slots):
                new = self._take(waiting, free)
                logits = self._prefill(cache, new, len(active))
                active += new
            else:
                new = active
                logits = self._decode(cache, active)
            for row, token in zip(new, draw_tokens(logits, new, sampling)):
                row.answer.append(token)
            self.statistics.generated_tokens += len(new)
            done = self._remove_finished(cache, active, sampling)
            if done:
                yield done

    def _row(self, request: dict[str, Any], sampling: Sampling) -> Row:
        if "prompt" in request:
            prompt = self.tokenizer(request["prompt"])["input_ids"]
        else:
            prompt = encode_prompt(self.tokenizer, request["messages"])
        return Row(request["id"], prompt, random.Random(f"{sampling.seed}/{request['id']}/{request.get('draw', 0)}"))

    def _rows_that_fit(self, active: Sequence[Row], waiting: Sequence[Row], sampling: Sampling) -> int:
        """How many rows the cache may hold, the longest of them deciding; always at least one."""
        prompts = [len(row.prompt) for row in active] + [len(row.prompt) for row in waiting][:1]
        return max(1, self.max_batch_tokens // (max(prompts) + sampling.max_tokens))

    def _take(self, waiting: deque[Row], free: int) -> list[Row]:
        """The next rows for one prefill: at most `free`, and at most a block of positions."""
        longest = len(waiting[0].prompt)
        count = min(free, len(waiting), max(1, self.block // longest))
        return [waiting.popleft() for _ in range(count)]

    def _prefill(self, cache: SlotCache, rows: Sequence[Row], first_slot: int) -> Tensor:
        """Logits of each row's first new token; keys and values go into the slots from `first_slot` on."""
        longest = max(len(row.prompt) for row in rows)
        cache.reserve(longest + 1)
        cache.rows, cache.positions = torch.arange(first_slot, first_slot + len(rows), device=self.device), None
        ids, last = self._padded([row.prompt for row in rows], [len(row.prompt) - 1 for row in rows])
        logits = self.model(
            input_ids=ids, attention_mask=self._prefill_mask(longest), past_key_values=cache, logits_to_keep=last
        ).logits
        self._count(ids.numel(), sum(len(row.prompt) for row in rows))
        return logits

    def _decode(self, cache: SlotCache, rows: Sequence[Row]) -> Tensor:
        """Logits of each row's next token."""
        computed = _round_up(len(rows), PAD_ROWS)
        idle = [0] * (computed - len(rows))  # rows that are computed only to fill up: they write to their first place
        lengths = torch.tensor([row.length for row in rows] + idle, device=self.device)
        ids = torch.tensor([row.answer[-1] for row in rows] + idle, device=self.device)[:, None]
        longest = max(row.length for row in rows) + 1
        cache.reserve(longest)
        cache.visible = _round_up(longest, PAD_KEYS)
        cache.rows, cache.positions = torch.arange(computed, device=self.device), lengths
        logits = self.model(
            input_ids=ids,
            position_ids=lengths[:, None],
            attention_mask=self._decode_mask(lengths, cache.visible),
            past_key_values=cache,
        ).logits[: len(rows), 0]
        self._count(computed, len(rows))
        return logits

    def _remove_finished(self, cache: SlotCache, active: list[Row], sampling: Sampling) -> list[dict[str, Any]]:
        """Take finished rows out of `active`, the last row moving into each gap; their replies."""
        done = []
        for slot in reversed(range(len(active))):
            row = active[slot]
            text, finish_reason = self._ending(row, sampling)
            if finish_reason is None:
                continue
            done.append(_reply(row, text, finish_reason))
            last = active.pop()
            if last is not row:
                cache.move(len(active), slot, last.length)
                active[slot] = last
        return done

    def _ending(self, row: Row, sampling: Sampling) -> tuple[str, str | None]:
        """Text and finish reason of a row that is finished, else no reason."""
        if row.answer[-1] in self.stop_tokens:
            return self._text(row.answer[:-1]), "stop"
        if sampling.stop:
            # A stop text is at most as many tokens long as it has bytes: enough to look at the newest few tokens.
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

    # ------------------------------------------------------------------ scoring

    @torch.inference_mode()
    def score(self, items: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        """Yield the loss of given answers under the model, in no particular order.

        Args:
            items: `{"id", "messages", "answer", "whole"}`; a whole answer is scored with its end of turn.

        Yields:
            `{"id", "loss_sum", "tokens"}`: nats, summed over the answer's tokens.
        """
        examples = []
        for item in items:
            example = encode_example(
                self.tokenizer,
                item["messages"],
                item["answer"],
                whole=item.get("whole", True),
                max_length=self.config.max_position_embeddings,
            )
            examples.append((item["id"], example))
        examples.sort(key=lambda pair: len(pair[1].input_ids), reverse=True)
        while examples:
            count = max(1, self.block // max(1, len(examples[0][1].input_ids)))
            batch, examples = examples[:count], examples[count:]
            yield self._score([name for name, _ in batch], [example for _, example in batch])

    def _score(self, names: Sequence[str], examples: Sequence[Any]) -> list[dict[str, Any]]:
        # The token at i is predicted at i - 1, so the answer is predicted from its prompt's last token on.
        ids, _ = self._padded([example.input_ids for example in examples], [0] * len(examples))
        predicting = torch.zeros(ids.shape, dtype=torch.bool)
        for row, example in enumerate(examples):
            predicting[row, example.prompt_length - 1 : len(example.input_ids) - 1] = True
        predicting = predicting.to(self.device)
        counts = [max(0, len(example.input_ids) - example.prompt_length) for example in examples]
        logits = self.model(
            input_ids=ids,
            attention_mask=self._prefill_mask(ids.shape[1]),
            use_cache=False,
            logits_to_keep=predicting,
        ).logits
        losses = nn.functional.cross_entropy(logits.float(), ids.roll(-1, 1)[predicting], reduction="none")
        self._count(ids.numel(), sum(len(example.input_ids) for example in examples))
        sums = [part.double().sum().item() for part in losses.split(counts)]
        return [{"id": name, "loss_sum": s, "tokens": n} for name, s, n in zip(names, sums, counts)]

    # ------------------------------------------------------------------ tensors of a step

    def _padded(self, rows: Sequence[list[int]], picked: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Token ids padded at the right, and a mask that picks one position of each row."""
        longest = max(map(len, rows))
        ids = torch.zeros((len(rows), longest), dtype=torch.long)
        mask = torch.zeros((len(rows), longest), dtype=torch.bool)
        for i, (row, position) in enumerate(zip(rows, picked)):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, position] = True
        return ids.to(self.device), mask.to(self.device)

    def _prefill_mask(self, length: int) -> Any:
        """None where causal is all there is to say: padding is at the right, where no token looks."""
        if not self._window:
            return None
        position = torch.arange(length, device=self.device)
        causal = position[:, None] >= position[None]
        near = position[:, None] - position[None] < self._window
        return self._masks(causal[None, None], (causal & near)[None, None])

    def _decode_mask(self, lengths: Tensor, visible: int) -> Any:
        """Each row sees the keys up to its own newest token."""
        keys = torch.arange(visible, device=self.device)
        seen = keys[None] <= lengths[:, None]
        near = seen if not self._window else seen & (keys[None] > lengths[:, None] - self._window)
        return self._masks(seen[:, None, None], near[:, None, None])

    def _masks(self, full: Tensor, sliding: Tensor) -> Any:
        """The mask as this model takes it: one, or one for each type of layer."""
        kinds = set(getattr(self.config, "layer_types", None) or ())
        if kinds == {"full_attention", "sliding_attention"}:
            return {"full_attention": full, "sliding_attention": sliding}
        return sliding if self._window else full

    @property
    def _window(self) -> int | None:
        """How far back a layer of sliding attention looks; None where the model has no such layer."""
        kinds = getattr(self.config, "layer_types", None) or ()
        if kinds and "sliding_attention" not in kinds:
            return None
        return getattr(self.config, "sliding_window", None)

    def _count(self, positions: int, useful: int) -> None:
        self.statistics.positions += positions
        self.statistics.useful_positions += useful


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def best_precision(device: torch.device) -> str:
    """The fastest type that the hardware itself computes in; emulated bf16 is slower than fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    able = torch.cpu.get_capabilities()
    return "bf16" if able.get("amx_bf16") or able.get("avx512_bf16") else "fp32"


def stop_tokens_of(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer: of the generation config, of the tokenizer, of the chat template."""
    configured = model.generation_config.eos_token_id
    tokens = configured if isinstance(configured, list) else [configured]
    return {t for t in (*tokens, tokenizer.eos_token_id, end_of_turn(tokenizer)) if t is not None}


def draw_tokens(logits: Tensor, rows: Sequence[Row], sampling: Sampling) -> list[int]:
    """The next token of each row, by the row's own random number: where it falls in the summed probabilities."""
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    probabilities = torch.softmax(logits.float() / sampling.temperature, -1)
    uniform = torch.tensor([row.random.random() for row in rows], device=logits.device)[:, None]
    if sampling.top_p >= 1:
        return _invert(probabilities, uniform).tolist()
    top, tokens = probabilities.topk(min(TOP_P_CANDIDATES, probabilities.shape[1]))
    if (top.sum(-1) < sampling.top_p).any():  # a flat distribution: its nucleus is larger
        top, tokens = probabilities.sort(descending=True, stable=True)
    before = top.cumsum(-1) - top
    nucleus = top.where(before < sampling.top_p, 0)
    return tokens.gather(1, _invert(nucleus, uniform)[:, None])[:, 0].tolist()


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The index in each row where the running sum of the weights passes `uniform` of the row's sum."""
    sums = weights.cumsum(-1)
    index = torch.searchsorted(sums, uniform * sums[:, -1:], right=True)[:, 0]
    # A number that rounds up to the whole sum would point behind the last token that has any weight.
    return index.minimum((sums < sums[:, -1:]).sum(-1))


def _reply(row: Row, text: str, finish_reason: str) -> dict[str, Any]:
    return {
        "id": row.id,
        "text": text,
        "finish_reason": finish_reason,
        "prompt_tokens": len(row.prompt),
        "completion_tokens": len(row.answer),
        "error": None,
    }


def _refusal(row: Row, room: int) -> dict[str, Any]:
    error = f"the prompt has {len(row.prompt)} tokens; between 1 and {room} fit into the context beside the answer"
    return {
        "id": row.id,
        "text": None,
        "finish_reason": None,
        "prompt_tokens": len(row.prompt),
        "completion_tokens": 0,
        "error": error,
    }


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
