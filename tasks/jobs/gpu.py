"""A causal language model on a GPU: a step is recorded once as a CUDA graph, and replayed with other tokens.

transformers' forward launches some thousand kernels a step, which takes the processor longer than it takes the GPU to
run them; a graph launches all of them at once. It wants the same shapes each time, which tiles have.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.jobs.attention import PAGE, Pages, Step
from tasks.jobs.gpu_kernels import PIECE, Places, attend

TILES = (256, 512, 1024)  # tokens of a step, where they give the same
TRIED = 32  # tokens of each row by which that is tried out
CACHE_SHARE = 0.8  # of the memory that a model leaves free


class GpuNetwork:
    """transformers' own forward on a GPU, recorded; attention comes from `tasks.jobs.gpu_kernels`."""

    def __init__(self, model: Any, tiles: Sequence[int] = TILES):
        self.model, self.config, self.generation_config = model, model.config, model.generation_config
        self._cache: Pages | None = None
        self._steps: dict[int, GpuStep] = {}
        self._pool: Any = None
        self._can_record = False  # what is only tried out is not worth it
        self.tiles = tiles
        self.tiles = self._alike(tiles)
        self._can_record = model.device.type == "cuda"

    def forward(self, step: Step) -> Iterator[Tensor]:
        """Logits of the tokens wanted; they hold until the next step."""
        if step.cache is not self._cache:  # what was recorded writes into another
            self._steps.clear()
            self._cache = step.cache
            self._pool = torch.cuda.graph_pool_handle() if self._can_record else None
        tile = len(step.tokens)
        if tile not in self._steps:
            self._steps[tile] = GpuStep(self.model, step.cache, tile)
            self._can_record = self._can_record and self._steps[tile].record(self._pool)
        logits = self._steps[tile].logits(step)
        if step.wanted:
            yield logits[: len(step.wanted)]

    def tokens_that_fit(self) -> int:
        """How many tokens' keys and values the GPU's free memory holds, with room left for a step."""
        text = self.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        each = 2 * text.num_hidden_layers * heads * size * self.model.dtype.itemsize
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.model.device)
        return int(free * CACHE_SHARE) // each

    def _alike(self, tiles: Sequence[int]) -> list[int]:
        """The sizes of a step at which a token gets the same logits as in the smallest, to the last bit.

        Libraries pick how they sum up by the shape alone, and do not say how; so it is tried out.
        """
        expected = self._some_logits(tiles[0])
        return [size for size in tiles if torch.equal(self._some_logits(size), expected)]

    @torch.inference_mode()
    def _some_logits(self, size: int) -> Tensor:
        """(the largest tile, vocabulary): of the same tokens in steps of any size."""
        most = self.tiles[-1]
        tokens = np.random.default_rng(0).integers(0, self.config.get_text_config().vocab_size, most, np.int32)
        positions = np.arange(size, dtype=np.int32) % TRIED
        runs = [(at, at + TRIED) for at in range(0, size, TRIED)]
        cache = Pages(1 + most // TRIED, 1)
        logits = []
        for some in tokens.reshape(-1, size):
            pages = np.repeat(cache.take(len(runs) * PAGE), TRIED).astype(np.int32)[:, None]
            logits += [part.clone() for part in self.forward(Step(some, positions, pages, runs, cache, range(size)))]
        return torch.cat(logits)


class GpuStep:
    """A step of a number of tokens through a model, as a CUDA graph whose inputs are written over each time.

    Attention finds it in the place of `Step`, with a cache and `attend`.
    """

    def __init__(self, model: Any, cache: Pages, tokens: int):
        self.model, self.cache, self.tokens = model, cache, tokens
        parts = {"ids": tokens, "wanted": tokens, "positions": tokens, "alone": 2 * tokens, "pieces": tokens}
        lengths = [*parts.values(), tokens * cache.width]
        self._inputs = torch.zeros(sum(lengths), dtype=torch.int32, device=model.device)
        self._ids, self._wanted, positions, alone, pieces, tables = self._inputs.split(lengths)
        self.places = Places(positions, tables.view(tokens, -1), alone.view(-1, 2), pieces.view(-1, 2))
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    def logits(self, step: Step) -> Tensor:
        """(tokens, vocabulary): of those wanted, in their order, and of others."""
        self._inputs.copy_(torch.from_numpy(self._packed(step)))
        if self._graph is None:
            return self._run()
        self._graph.replay()
        return self._logits

    def record(self, pool: Any) -> bool:
        """Record the graph; false where the model looks at what it computes, as with experts, which no graph can."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels and makes the pages
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._logits = self._run()
        except RuntimeError:
            torch.cuda.synchronize()
            return False
        self._graph = graph
        return True

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float,
        window: int,
        softcap: float | None,
    ) -> Tensor:
        """See `tasks.jobs.gpu_kernels.attend`."""
        return attend(query, key, value, keys, values, self.places, scaling, window, softcap)

    def _run(self) -> Tensor:
        done = self.model(
            input_ids=self._ids.long()[None],
            position_ids=self.places.positions.long()[None],
            use_cache=False,
            logits_to_keep=self._wanted.long(),
            step=self,
        )
        return done.logits[0]

    def _packed(self, step: Step) -> np.ndarray:
        """What `_inputs` holds for a step."""
        wanted, alone = np.zeros(self.tokens, np.int32), np.zeros((self.tokens, 2), np.int32)
        wanted[: len(step.wanted)] = step.wanted
        alone[:, 0] = range(self.tokens)
        alone[step.alone, 1] = 1
        pieces, tables = np.zeros((self.tokens // 2, 2), np.int32), np.zeros((self.tokens, self.cache.width), np.int32)
        cut = [
            (at, min(PIECE, end - at)) for begin, end in step.runs if end - begin > 1 for at in range(begin, end, PIECE)
        ]
        pieces[: len(cut)] = cut or 0
        tables[:, : step.pages.shape[1]] = step.pages
        return np.concatenate([step.tokens, wanted, step.positions, *(x.ravel() for x in (alone, pieces, tables))])
