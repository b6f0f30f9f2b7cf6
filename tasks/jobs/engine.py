"""Runs a causal language model on this machine: answers prompts in batches, and scores given answers.

Batches are planned once, over all requests, by length. A finished row leaves its batch, so that the short answers
do not wait for the long ones. Each row draws from a generator of its own, seeded by the run's seed and the row's
id, so that neither its neighbours nor a restart change what is drawn.

Knows nothing of jobs and files: `infer.py` does.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache, DynamicLayer

from tasks.jobs.template import encode_example, encode_prompt, end_of_turn, ensure_chat_template

COMPACT_BELOW = 0.8  # rows still running, as a share of the batch: below it the finished ones are taken out


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request, tokenised."""

    id: str
    tokens: list[int]
    draw: int


def best_device() -> str:
    """Where a model computes on this machine."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def best_dtype(precision: str, device: str) -> torch.dtype:
    """The dtype of a named precision; for `auto` the smallest that this machine computes natively."""
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if precision != "auto":
        return named[precision]
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32  # emulated bf16 is slower than fp32


class PreallocatedLayer(DynamicLayer):
    """A layer's keys and values in one buffer for the whole answer: a step writes its own token, and copies none."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.length = capacity, 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_initialized:
            batch, heads, _, width = key_states.shape
            self.buffers = [key_states.new_empty(batch, heads, self.capacity, width) for _ in range(2)]
            self.is_initialized = True
        end = self.length + key_states.shape[2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = states
        self.length = end
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)


class Engine:
    """A loaded model with its tokenizer."""

    def __init__(self, model: str, precision: str, max_batch_rows: int, max_batch_tokens: int):
        self.device = best_device()
        self.dtype = best_dtype(precision, self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        ensure_chat_template(self.tokenizer)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=self.dtype).to(self.device).eval()
        self.max_batch_rows, self.max_batch_tokens = max_batch_rows, max_batch_tokens
        self.context = getattr(self.model.config, "max_position_embeddings", None) or 2**31
        eos = self.model.generation_config.eos_token_id
        self.stop_tokens = {end_of_turn(self.tokenizer), *(eos if isinstance(eos, list) else [eos])} - {None}
        self.computed = self.useful = 0  # decode steps x rows, and those of them that gave a token of an answer

    def encode(self, request: dict[str, Any]) -> Prompt:
        """Token ids of a request: a conversation in the chat template, or a plain text as it stands."""
        if "prompt" in request:
            tokens = self.tokenizer(request["prompt"], add_special_tokens=False)["input_ids"]
        else:
            tokens = encode_prompt(self.tokenizer, request["messages"])
        return Prompt(request["id"], tokens, request.get("draw", 0))

    def plan(self, prompts: Sequence[Prompt], max_tokens: int) -> list[list[Prompt]]:
        """Batches of prompts of like length, the same ones for the same prompts."""
        batches: list[list[Prompt]] = []
        for prompt in sorted(prompts, key=lambda p: (-len(p.tokens), p.id)):
            # Sorted longest first, so a batch's first prompt says what a row of it costs.
            fits = batches and len(batches[-1]) < self.max_batch_rows
            if fits and (len(batches[-1]) + 1) * (len(batches[-1][0].tokens) + max_tokens) <= self.max_batch_tokens:
                batches[-1].append(prompt)
            else:
                batches.append([prompt])
        return batches

    @torch.inference_mode()
    def generate(self, batch: Sequence[Prompt], sampling: dict[str, Any], seed: int) -> list[dict[str, Any]]:
        """Answer one batch; replies in its order. Texts hold new tokens alone, without what ended them."""
        rows = [_Row(prompt, _generator(seed, prompt)) for prompt in batch]
        running = list(rows)
        width = max(len(prompt.tokens) for prompt in batch)
        ids, mask = self._padded([prompt.tokens for prompt in batch])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        cache.layers = [
            PreallocatedLayer(width + sampling["max_tokens"]) if type(layer) is DynamicLayer else layer
            for layer in cache.layers
        ]
        while True:
            logits = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
            ).logits[:, -1].float()
            drawn = _draw(logits, [row.generator for row in running], sampling).tolist()
            for row, token in zip(running, drawn, strict=True):
                if row.finish_reason is None:
                    self.useful += 1
                    self._take(row, token, sampling)
            self.computed += len(running)
            alive = [index for index, row in enumerate(running) if row.finish_reason is None]
            if not alive:
                break
            positions = positions[:, -1:] + 1
            if len(alive) < COMPACT_BELOW * len(running):
                keep = torch.tensor(alive, device=self.device)
                cache.batch_select_indices(keep)
                mask, positions = mask[keep], positions[keep]
                drawn, running = [drawn[index] for index in alive], [running[index] for index in alive]
            ids = torch.tensor(drawn, device=self.device)[:, None]
            mask = torch.cat([mask, mask.new_ones(len(running), 1)], 1)
        return [self._reply(row) for row in rows]

    def _take(self, row: "_Row", token: int, sampling: dict[str, Any]) -> None:
        """Give a row its next token, and end it where that ends it."""
        row.count += 1
        if token in self.stop_tokens:
            row.finish_reason = "stop"
            return
        row.tokens.append(token)
        if sampling["stop"]:
            text = self.tokenizer.decode(row.tokens, skip_special_tokens=True)
            places = [place for stop in sampling["stop"] if (place := text.find(stop)) >= 0]
            if places:
                row.text, row.finish_reason = text[: min(places)], "stop"
                return
        if row.count == sampling["max_tokens"]:
            row.finish_reason = "length"

    def _reply(self, row: "_Row") -> dict[str, Any]:
        text = row.text if row.text is not None else self.tokenizer.decode(row.tokens, skip_special_tokens=True)
        return {
            "id": row.prompt.id,
            "text": text.strip(),
            "finish_reason": row.finish_reason,
            "prompt_tokens": len(row.prompt.tokens),
            "completion_tokens": row.count,
            "error": None,
        }

    def refusal(self, prompt: Prompt, max_tokens: int) -> dict[str, Any] | None:
        """The reply to a prompt that does not fit into the model's context; None where it does."""
        if len(prompt.tokens) + max_tokens <= self.context:
            return None
        error = f"a prompt of {len(prompt.tokens)} tokens and {max_tokens} new ones exceed the context of {self.context}"
        counts = {"prompt_tokens": len(prompt.tokens), "completion_tokens": 0}
        return {"id": prompt.id, "text": None, "finish_reason": None, **counts, "error": error}

    @torch.inference_mode()
    def score(self, items: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        """Loss in nats, summed over the tokens of given answers (end of turn included), a batch at a time."""
        encoded = [
            (item["id"], encode_example(self.tokenizer, item["messages"], item["answer"], whole=item["whole"], max_length=self.context))
            for item in items
        ]  # fmt: skip
        encoded.sort(key=lambda pair: (-len(pair[1].input_ids), pair[0]))
        size = max(self.max_batch_rows // 4, 1)  # logits of all answer positions are held at once
        for start in range(0, len(encoded), size):
            batch = encoded[start : start + size]
            ids, mask = self._padded([example.input_ids for _, example in batch])
            lengths = [len(example.input_ids) - example.prompt_length for _, example in batch]
            keep = max(lengths) + 1  # padded on the left: the answers stand at the end of every row
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep).logits
            scores = []
            for row, ((key, _), length) in enumerate(zip(batch, lengths, strict=True)):
                target = ids[row, ids.shape[1] - length :]
                loss = torch.nn.functional.cross_entropy(logits[row, -length - 1 : -1].float(), target, reduction="sum")
                scores.append({"id": key, "loss_sum": loss.item(), "tokens": length})
            yield scores

    def _padded(self, rows: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask (rows, longest), padded on the left."""
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return ids, mask


class _Row:
    """One answer in the making."""

    def __init__(self, prompt: Prompt, generator: torch.Generator):
        self.prompt, self.generator = prompt, generator
        self.tokens: list[int] = []
        self.count = 0  # new tokens, the one that ended it included
        self.text: str | None = None  # set where a stop text ended it
        self.finish_reason: str | None = None


def _generator(seed: int, prompt: Prompt) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{prompt.id}/{prompt.draw}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _draw(logits: torch.Tensor, generators: Sequence[torch.Generator], sampling: dict[str, Any]) -> torch.Tensor:
    """Next tokens (rows,) from logits (rows, vocabulary): the best one, or one drawn by inverse CDF."""
    if sampling["temperature"] == 0:
        return logits.argmax(-1)
    probabilities, order = (logits / sampling["temperature"]).softmax(-1).sort(-1, descending=True, stable=True)
    cumulative = probabilities.cumsum(-1)
    uniform = torch.cat([torch.rand(1, generator=generator) for generator in generators]).to(logits.device)
    # The nucleus is the shortest run of best tokens that holds top_p; a point in it falls on one of them.
    kept = cumulative - probabilities < sampling["top_p"]
    total = (probabilities * kept).sum(-1)
    place = (cumulative < (uniform * total)[:, None]).sum(-1).clamp(max=logits.shape[-1] - 1)
    return order.gather(-1, place[:, None])[:, 0]
