"""Answers many prompts with one causal language model, as fast as one machine allows, and scores given answers.

Waiting prompts take the places of finished rows, so no step computes a row that is done. All tokens of a step go
through the network as one flat sequence, without padding: linear layers do not care whose token is whose. Only
attention does, and it is computed here: `Prefill` for the prompts of new rows, `Decode` for one token of each row.

What a row answers depends on its prompt and its own random numbers alone, not on the rows that happen to share its
steps. In fp32 on CPU that holds to the last bit, as every kernel used here gives a row the same numbers in any
company: oneDNN's linear layers, matmul of a fixed layout for decoding, each prompt's attention by itself.

Works with any model that lets its attention be chosen (transformers' `AttentionInterface`) and attends fully or in
a sliding window. Knows nothing of jobs, files of requests or progress: `tasks.jobs.infer` does.

    engine = Engine(Path("model"))
    for replies in engine.generate([{"id": "a", "messages": [...]}], Sampling(max_tokens=64)):
        ...
"""

import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import BitsAndBytesConfig
from transformers.modeling_utils import AttentionInterface
from transformers.utils import is_bitsandbytes_available

from tasks.jobs.template import Example, encode_example, encode_prompt, end_of_turn

ATTENTION = "lion"  # our attention's name in transformers
PAD_TOKENS = 8  # without packed layers tokens come in multiples of this: other kernels treat a few rows differently
PAD_KEYS = 64  # the keys that a decoding row is shown come in multiples of this, so its sums are split alike
REFILL_SHARE = 8  # prefill once this part (1/8) of the places is free: few large prefills, few empty places
SHORTEST_PREFIX = 8  # tokens; computing fewer for each row costs less than looking them up
TOP_P_CANDIDATES = 512  # the nucleus is looked for among these; a row that needs more is sorted whole
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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
    def cached(self) -> int:
        """Tokens whose keys and values are in the row's slot: all but the newest, which is computed next."""
        return len(self.prompt) + len(self.answer) - 1


@dataclass(slots=True)
class Statistics:
    """What was computed so far. A position is one token going through the network."""

    positions: int = 0
    padded_positions: int = 0
    generated_tokens: int = 0

    @property
    def padded_share(self) -> float:
        """Share of the positions that were computed for no row."""
        return self.padded_positions / self.positions if self.positions else 0.0


class Slots:
    """The cache: for each layer, keys and values of every row in a slot of its own, written in place.

    The rows in use are the first ones, so a step reads them as a view; nothing is ever concatenated.
    """

    def __init__(self, slots: int):
        self.slots, self.capacity = slots, 0
        self.keys: dict[int, Tensor] = {}  # layer -> (slots, kv heads, capacity, size)
        self.values: dict[int, Tensor] = {}

    def reserve(self, length: int) -> None:
        """Make room for rows of `length` tokens."""
        if length > self.capacity:
            self.capacity = _round_up(length, PAD_KEYS)
            for store in (self.keys, self.values):
                for layer, old in store.items():
                    store[layer] = functional.pad(old, (0, 0, 0, self.capacity - old.shape[2]))

    def of_layer(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, made at first use from the shape (kv heads, tokens, size) of `like`."""
        if layer not in self.keys:
            shape = (self.slots, like.shape[0], self.capacity, like.shape[2])
            # Zeros, as what is masked must still be a number: 0 x NaN is NaN.
            self.keys[layer], self.values[layer] = like.new_zeros(shape), like.new_zeros(shape)
        return self.keys[layer], self.values[layer]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row of `length` tokens to another slot."""
        for store in (self.keys, self.values):
            for tensor in store.values():
                tensor[target, :, :length] = tensor[source, :, :length]


@dataclass(frozen=True, slots=True)
class Prefix:
    """What every prompt of a chat template begins with, computed once: layer -> (kv heads, tokens, size)."""

    tokens: list[int]
    keys: dict[int, Tensor]
    values: dict[int, Tensor]


class Step(Protocol):
    """What one pass through the network does for attention."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int) -> Tensor:
        """The output (tokens, heads, size) for a query (heads, tokens, size). A window of 0 is no window."""
        ...


class Prefill:
    """New rows: each token sees the earlier ones of its own row, and the prefix if the row begins with it.

    Row by row, since a row by itself meets the same kernels whatever the lengths of the others.
    """

    def __init__(self, lengths: Sequence[int], prefixes: Sequence[Prefix | None], slots: Slots | None, first_slot: int):
        self.slots, self.first_slot = slots, first_slot
        ends = torch.tensor(lengths).cumsum(0).tolist()
        self.parts = list(zip([0, *ends], ends, prefixes))
        self.masks: dict[tuple[int, int, int], Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int) -> Tensor:
        group = query.shape[0] // key.shape[0]
        outputs = []
        for row, (begin, end, prefix) in enumerate(self.parts):
            k, v = key[:, begin:end], value[:, begin:end]
            if prefix:
                k, v = torch.cat([prefix.keys[layer], k], 1), torch.cat([prefix.values[layer], v], 1)
            if self.slots:
                keys, values = self.slots.of_layer(layer, key)
                keys[self.first_slot + row, :, : k.shape[1]] = k
                values[self.first_slot + row, :, : k.shape[1]] = v
            mask = self._mask(end - begin, k.shape[1], window, key.device)
            output = functional.scaled_dot_product_attention(
                query[None, :, begin:end],
                k.repeat_interleave(group, 0)[None],
                v.repeat_interleave(group, 0)[None],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
            )
            outputs.append(output[0].transpose(0, 1))
        return torch.cat(outputs)

    def _mask(self, queries: int, keys: int, window: int, device: torch.device) -> Tensor | None:
        """Which key each query sees; None where that is the causal triangle and nothing else."""
        if queries == keys and not 0 < window < keys:
            return None
        if (queries, keys, window) not in self.masks:
            position = torch.arange(keys, device=device)
            back = position[keys - queries :, None] - position[None]
            self.masks[queries, keys, window] = (back >= 0) & (back < (window or keys))
        return self.masks[queries, keys, window]


class Decode:
    """One token of each row: it goes into the row's slot and sees all that is there."""

    def __init__(self, cached: Sequence[int], slots: Slots, device: torch.device):
        self.slots = slots
        self.rows = torch.arange(len(cached), device=device)
        self.cached = torch.tensor(cached, device=device)  # tokens already in each row's slot
        self.visible = _round_up(max(cached) + 1, PAD_KEYS)
        self.masks: dict[int, Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int) -> Tensor:
        keys, values = self.slots.of_layer(layer, key)
        rows, (heads, _, size), kv_heads = len(self.rows), query.shape, key.shape[0]
        keys[self.rows, :, self.cached] = key[:, :rows].transpose(0, 1)
        values[self.rows, :, self.cached] = value[:, :rows].transpose(0, 1)
        # Not scaled_dot_product_attention: on CPU it is slower here, and its sums depend on the number of rows.
        q = (query[:, :rows] * scaling).view(kv_heads, heads // kv_heads, rows, size).permute(2, 0, 1, 3)
        scores = torch.matmul(q, keys[:rows, :, : self.visible].transpose(2, 3))  # (rows, kv heads, group, keys)
        scores += self._mask(window, scores.dtype)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
        return torch.matmul(weights, values[:rows, :, : self.visible]).reshape(rows, heads, size)

    def _mask(self, window: int, dtype: torch.dtype) -> Tensor:
        """(rows, 1, 1, keys): 0 for a key that the row sees, else -inf."""
        if window not in self.masks:
            back = self.cached[:, None] - torch.arange(self.visible, device=self.cached.device)
            seen = (back >= 0) & (back < (window or self.visible))
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)
            self.masks[window] = mask[:, None, None]
        return self.masks[window]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    step: Step,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer; `step` reaches it through the arguments of the model's forward."""
    if softcap or s_aux is not None:
        raise NotImplementedError(f"{type(module).__name__}: attention with a soft cap or with sinks is not supported")
    output = step.attend(module.layer_idx, query[0], key[0], value[0], scaling, sliding_window or 0)
    padding = query.shape[2] - output.shape[0]
    return functional.pad(output, (0, 0, 0, 0, 0, padding))[None], None


AttentionInterface.register(ATTENTION, attend)


class PackedLinear(nn.Module):
    """A linear layer on CPU whose weight is laid out once for oneDNN, and not again at every call.

    Half as fast again as `nn.Linear` on a few dozen rows. And a row's result is the same, to the last bit, for any
    number of rows, which MKL does not promise.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Engine:
    """A causal language model ready to answer.

    Args:
        path: folder of the model, with its tokenizer.
        precision: bf16, fp16, fp32, or auto: the fastest that this machine itself computes in.
        max_batch_rows: rows computed together.
        max_batch_tokens: tokens, prompt and answer, held in the cache for all rows together.
        quantization: none, or how the weights of linear layers are held on a CUDA GPU: 8bit or 4bit (bitsandbytes).

    Raises:
        RuntimeError: the weights are to be quantized, and there is no CUDA GPU, or no bitsandbytes.
    """

    def __init__(
        self,
        path: Path,
        precision: str = "auto",
        max_batch_rows: int = 64,
        max_batch_tokens: int = 65_536,
        quantization: str = "none",
    ):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.precision = best_precision(self.device) if precision == "auto" else precision
        self.max_batch_rows, self.max_batch_tokens = max_batch_rows, max_batch_tokens
        self.statistics = Statistics()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=DTYPES[self.precision],
            attn_implementation=ATTENTION,
            **quantized(quantization, self.precision, self.device),
        )
        self.model.eval()
        if quantization == "none":
            self.model.to(self.device)
        packed = self.device.type == "cpu" and can_pack(self.precision)
        if packed:
            pack_linear_layers(self.model)
        self.pad_tokens = 1 if packed else PAD_TOKENS
        self.context = self.model.config.get_text_config().max_position_embeddings
        self.stop_tokens = stop_tokens_of(self.model, self.tokenizer)
        # Tokens of one prefill or scoring step: enough to keep the cores busy, few enough for memory.
        self.block = 1024 if self.device.type == "cpu" else 16_384
        self.prefix = self._template_prefix()

    # ---- answering

    @torch.inference_mode()
    def generate(self, requests: Iterable[dict[str, Any]], sampling: Sampling) -> Iterator[list[dict[str, Any]]]:
        """Yield replies as rows finish, in no particular order.

        Args:
            requests: `{"id", "messages"}` or `{"id", "prompt"}`, and optionally `"draw"`.

        Yields:
            `{"id", "text", "finish_reason", "prompt_tokens", "completion_tokens", "error"}`.
        """
        room = self.context - sampling.max_tokens
        fitting, refused = [], []
        for request in requests:
            row = self._row(request, sampling)
            fits = 0 < len(row.prompt) <= room
            (fitting if fits else refused).append(row)
        if refused:
            yield [_refusal(row, room) for row in refused]
        # Longest first: rows of like length are neighbours, and too little memory shows at once.
        waiting = deque(sorted(fitting, key=lambda row: len(row.prompt), reverse=True))
        places = min(self.max_batch_rows, len(waiting))
        slots = Slots(places)
        active: list[Row] = []  # the row in slot i

        while waiting or active:
            free = min(places, self._rows_that_fit(active, waiting, sampling)) - len(active)
            if waiting and free > 0 and (not active or free * REFILL_SHARE >= places):
                stepped = self._take(waiting, free)
                logits = self._prefill(slots, stepped, len(active))
                active += stepped
            else:
                stepped = active
                logits = self._decode(slots, active)
            for row, token in zip(stepped, draw_tokens(logits, stepped, sampling)):
                row.answer.append(token)
            self.statistics.generated_tokens += len(stepped)
            done = self._remove_finished(slots, active, sampling)
            if done:
                yield done

    def _row(self, request: dict[str, Any], sampling: Sampling) -> Row:
        if request.get("prompt") is not None:
            prompt = self.tokenizer(request["prompt"])["input_ids"]
        else:
            prompt = encode_prompt(self.tokenizer, request["messages"])
        return Row(request["id"], prompt, random.Random(f"{sampling.seed}/{request['id']}/{request.get('draw', 0)}"))

    def _rows_that_fit(self, active: Sequence[Row], waiting: Sequence[Row], sampling: Sampling) -> int:
        """How many rows the cache may hold, the longest of them deciding; always at least one."""
        prompts = [len(row.prompt) for row in active] + [len(row.prompt) for row in waiting][:1]
        return max(1, self.max_batch_tokens // (max(prompts) + sampling.max_tokens))

    def _take(self, waiting: deque[Row], free: int) -> list[Row]:
        """The next rows for one prefill: at most `free`, and about a block of tokens."""
        count = min(free, len(waiting), max(1, self.block // len(waiting[0].prompt)))
        return [waiting.popleft() for _ in range(count)]

    def _prefill(self, slots: Slots, rows: Sequence[Row], first_slot: int) -> Tensor:
        """Logits (rows, vocabulary) of each row's first new token; the rows go into the slots from `first_slot` on."""
        slots.reserve(max(len(row.prompt) for row in rows))
        return self._forward_whole(
            [row.prompt for row in rows], [[len(row.prompt) - 1] for row in rows], slots, first_slot
        )

    def _decode(self, slots: Slots, rows: Sequence[Row]) -> Tensor:
        """Logits (rows, vocabulary) of each row's next token."""
        cached = [row.cached for row in rows]
        slots.reserve(max(cached) + 1)
        step = Decode(cached, slots, self.device)
        return self._forward([row.answer[-1] for row in rows], cached, list(range(len(rows))), step)

    def _remove_finished(self, slots: Slots, active: list[Row], sampling: Sampling) -> list[dict[str, Any]]:
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
                slots.move(len(active), slot, last.cached)
                active[slot] = last
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

    @torch.inference_mode()
    def score(self, items: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        """Yield the loss of given answers under the model, in no particular order.

        Args:
            items: `{"id", "messages", "answer", "whole"}`; a whole answer is scored with its end of turn.

        Yields:
            `{"id", "loss_sum", "tokens"}`: nats, summed over the answer's tokens.
        """
        examples = [(item["id"], self._example(item)) for item in items]
        examples.sort(key=lambda pair: len(pair[1].input_ids), reverse=True)
        while examples:
            count = max(1, self.block // len(examples[0][1].input_ids))
            batch, examples = examples[:count], examples[count:]
            losses = self._losses([example for _, example in batch])
            yield [
                {"id": id, "loss_sum": loss.double().sum().item(), "tokens": len(loss)}
                for (id, _), loss in zip(batch, losses)
            ]

    def _example(self, item: dict[str, Any]) -> Example:
        whole = item.get("whole", True)
        return encode_example(self.tokenizer, item["messages"], item["answer"], whole=whole, max_length=self.context)

    def _losses(self, examples: Sequence[Example]) -> Sequence[Tensor]:
        """For each example the loss of each of its answer's tokens."""
        # The token at i is predicted at i - 1: an answer is predicted from its prompt's last token on.
        predicting = [list(range(x.prompt_length - 1, len(x.input_ids) - 1)) for x in examples]
        answers = [token for x in examples for token in x.input_ids[x.prompt_length :]]
        logits = self._forward_whole([x.input_ids for x in examples], predicting)
        losses = functional.cross_entropy(logits.float(), torch.tensor(answers, device=self.device), reduction="none")
        return losses.split([len(positions) for positions in predicting])

    # ---- through the network

    def _forward_whole(
        self, rows: Sequence[list[int]], keep: Sequence[list[int]], slots: Slots | None = None, first_slot: int = 0
    ) -> Tensor:
        """Logits at the positions `keep` of whole rows, one row after the other."""
        prefixes = [self.prefix if self._begins_with_prefix(row) else None for row in rows]
        ids: list[int] = []
        positions: list[int] = []
        kept: list[int] = []
        lengths = []
        for row, prefix, wanted in zip(rows, prefixes, keep):
            known = len(prefix.tokens) if prefix else 0
            kept += [len(ids) + position - known for position in wanted]
            ids += row[known:]
            positions += range(known, len(row))
            lengths.append(len(row) - known)
        return self._forward(ids, positions, kept, Prefill(lengths, prefixes, slots, first_slot))

    def _forward(self, ids: list[int], positions: list[int], keep: list[int], step: Step) -> Tensor:
        """Logits (kept, vocabulary) at the places `keep` of a flat sequence of tokens."""
        padding = -len(ids) % self.pad_tokens
        kept = keep + [0] * (-len(keep) % self.pad_tokens)
        self.statistics.positions += len(ids) + padding
        self.statistics.padded_positions += padding
        logits = self.model(
            input_ids=torch.tensor([ids + [0] * padding], device=self.device),
            position_ids=torch.tensor([positions + [0] * padding], device=self.device),
            logits_to_keep=torch.tensor(kept, dtype=torch.long, device=self.device),
            use_cache=False,
            step=step,
        ).logits
        return logits[0, : len(keep)]

    @torch.inference_mode()
    def _template_prefix(self) -> Prefix | None:
        """What the chat template puts before every question, often a system prompt, computed once for all rows.

        It is the template's own and not what the rows at hand have in common, which would change with the rows.
        """
        a, b = (encode_prompt(self.tokenizer, [{"role": "user", "content": text}]) for text in ("a", "b"))
        length = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), 0)
        if length < SHORTEST_PREFIX:
            return None
        slots = Slots(1)
        slots.reserve(length)
        self._forward(a[:length], list(range(length)), [0], Prefill([length], [None], slots, 0))
        keys = {layer: tensor[0, :, :length] for layer, tensor in slots.keys.items()}
        values = {layer: tensor[0, :, :length] for layer, tensor in slots.values.items()}
        return Prefix(a[:length], keys, values)

    def _begins_with_prefix(self, row: list[int]) -> bool:
        """Whether a row's first tokens need not be computed again. At least one token of its own must remain."""
        if self.prefix is None:
            return False
        return len(row) > len(self.prefix.tokens) and row[: len(self.prefix.tokens)] == self.prefix.tokens


def quantized(quantization: str, precision: str, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told so that it holds weights in 8 or 4 bit."""
    if quantization == "none":
        return {}
    if device.type != "cuda" or not is_bitsandbytes_available():
        raise RuntimeError(
            f"quantization: {quantization} needs a CUDA GPU and bitsandbytes (pip install 'lion-distill[gpu]'); "
            "take quantization: none"
        )
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if quantization == "8bit"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[precision],
        )
    )
    return {"quantization_config": config, "device_map": {"": device}}


def pack_linear_layers(model: nn.Module) -> None:
    """Put a `PackedLinear` in the place of each linear layer."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))


def can_pack(precision: str) -> bool:
    """Whether oneDNN multiplies in this precision on this CPU."""
    able = {
        "fp32": torch.backends.mkldnn.is_available,
        "bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported,
        "fp16": torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return torch.backends.mkldnn.is_available() and able[precision]()


def best_precision(device: torch.device) -> str:
    """The fastest type that the hardware itself computes in; emulated bf16 is slower than fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    able = torch.cpu.get_capabilities()
    return "bf16" if able.get("amx_bf16") or able.get("avx512_bf16") else "fp32"


def stop_tokens_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: of the generation config, of the tokenizer, of the chat template."""
    configured = model.generation_config.eos_token_id
    tokens = configured if isinstance(configured, list) else [configured]
    return frozenset(t for t in (*tokens, tokenizer.eos_token_id, end_of_turn(tokenizer)) if t is not None)


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
    return {
        "id": row.id,
        "text": None,
        "finish_reason": None,
        "prompt_tokens": len(row.prompt),
        "completion_tokens": 0,
        "error": f"the prompt has {len(row.prompt)} tokens; 1 to {room} fit into the context beside the answer",
    }


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
