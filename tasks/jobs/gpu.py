"""A causal language model on a GPU: a step is recorded once as a CUDA graph, and replayed with other tokens.

transformers' forward launches some thousand kernels a step, which takes the processor longer than it takes the GPU to
run them; a graph launches all of them at once. It wants the same shapes each time, which tiles have. `GpuLlama` has a
third of the kernels, for models of Llama's shape.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary, proxy

import numpy as np
import torch
from torch import Tensor, nn
from triton.runtime.errors import OutOfResources

from tasks.jobs import gpu_kernels
from tasks.jobs.attention import PAGE, Pages, Step, filled
from tasks.jobs.gpu_kernels import PIECE, Places, add_norm, gate, rotate
from tasks.jobs.linear import JoinedLinear
from tasks.jobs.llama import LlamaLayer, rotations, windows
from tasks.jobs.network import unsupported
from tasks.jobs.sampling import GPU_ROWS
from tasks.jobs.tiles import LANES_OF_A_GPU

TILES = (256, 512, 1024)  # tokens of a step: those are taken that give the same
TRIED = 32  # tokens of each row by which that is tried out
CACHE_SHARE = 0.8  # of what is left; the rest is for what nobody counts: workspaces, and blocks that are rounded up
DRAWN_BYTES = 16  # for each logit from which tokens are drawn: it in fp32, its probability, and sums of them


# ids, positions and what is wanted (tokens), and the step: logits (wanted, vocabulary)
Compute = Callable[[Tensor, Tensor, Tensor, "GpuStep"], Tensor]


class GpuNetwork:
    """A model's steps, recorded. Each lane has recordings of its own, which live as long as its cache.

    Raises:
        UnsupportedModel: its attention does not fit on this GPU.
    """

    def __init__(self, model: Any, compute: Compute | None = None, tiles: Sequence[int] = TILES):
        self.model, self.config, self.generation_config = model, model.config, model.generation_config
        self._compute = compute or self._by_transformers
        self._steps: WeakKeyDictionary[Pages, dict[int, GpuStep]] = WeakKeyDictionary()
        self._recording = threading.Lock()
        self._can_record = False  # what is only tried out is not worth it
        self._bytes_of_a_token = 0  # of its keys and values, as seen where steps are tried out
        self.tiles = tiles
        try:
            self.tiles = self._alike(tiles)
        except OutOfResources as error:
            raise unsupported(self.config, f"its heads are too large for this GPU ({error})") from None
        on_gpu = model.device.type == "cuda"
        self._largest_step = self._bytes_of_largest_step() if on_gpu else 0
        self._can_record = on_gpu

    def forward(self, step: Step) -> Iterator[Tensor]:
        """Logits of the tokens wanted; they hold until the lane's next step."""
        steps, tile = self._steps.setdefault(step.cache, {}), len(step.tokens)
        if tile not in steps:
            steps[tile] = GpuStep(self._compute, step.cache, tile, self.model.device)
            with self._recording:
                self._can_record = self._can_record and steps[tile].record()
        logits = steps[tile].logits(step)
        if step.wanted:
            yield logits[: len(step.wanted)]

    def _by_transformers(self, ids: Tensor, positions: Tensor, wanted: Tensor, step: "GpuStep") -> Tensor:
        done = self.model(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=wanted, step=step
        )
        return done.logits[0]

    def tokens_that_fit(self) -> int:
        """How many tokens' keys and values the GPU's free memory holds, with room left for each lane's steps and draws.

        Recordings share no memory: each size of a step has its own in each lane.
        """
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.model.device)
        recorded = self._largest_step * sum(self.tiles) // self.tiles[-1]
        drawn = DRAWN_BYTES * GPU_ROWS * self.config.get_text_config().vocab_size
        left = max(0, free - LANES_OF_A_GPU * (recorded + drawn))
        return int(left * CACHE_SHARE) // self._bytes_of_a_token

    def _bytes_of_largest_step(self) -> int:
        """What it takes beside weights and pages, at most."""
        device, most = self.model.device, self.tiles[-1]
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        self._some_logits(most)
        pages = (1 + most // TRIED) * PAGE * self._bytes_of_a_token
        return max(0, torch.cuda.max_memory_allocated(device) - before - pages)

    def _alike(self, tiles: Sequence[int]) -> list[int]:
        """The sizes of a step at which a token gets the same logits as in the smallest, to the last bit.

        Libraries pick how they sum up by the shape alone, and do not say how; so it is tried out. A size for which there
        is too little memory is left out.
        """
        expected, alike = self._some_logits(tiles[0]), [tiles[0]]
        for size in tiles[1:]:
            with suppress(torch.OutOfMemoryError):
                if torch.equal(self._some_logits(size), expected):
                    alike.append(size)
        return alike

    @torch.inference_mode()
    def _some_logits(self, size: int) -> Tensor:
        """(the largest tile, vocabulary), on the CPU: of the same tokens in steps of any size."""
        most = self.tiles[-1]
        tokens = np.random.default_rng(0).integers(0, self.config.get_text_config().vocab_size, most, np.int32)
        positions = np.arange(size, dtype=np.int32) % TRIED
        runs = [(at, at + TRIED) for at in range(0, size, TRIED)]
        cache = Pages(1 + most // TRIED, 1)
        logits = []
        for some in tokens.reshape(-1, size):
            pages = np.repeat(cache.take(len(runs) * PAGE), TRIED).astype(np.int32)[:, None]
            logits += [part.cpu() for part in self.forward(Step(some, positions, pages, runs, cache, range(size)))]
        self._bytes_of_a_token = cache.bytes_of_a_token()
        return torch.cat(logits)


class GpuStep:
    """A step of a number of tokens, as a CUDA graph whose inputs are written over each time.

    Attention finds it in the place of a `Step`, with a cache and `attend`.
    """

    def __init__(self, compute: Compute, cache: Pages, tokens: int, device: torch.device):
        self._compute, self.cache, self.tokens = compute, proxy(cache), tokens
        parts = {"ids": tokens, "wanted": tokens, "positions": tokens, "alone": 2 * tokens, "pieces": tokens}
        lengths = [*parts.values(), tokens * cache.width]
        self._inputs = torch.zeros(sum(lengths), dtype=torch.int32, device=device)
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

    def record(self) -> bool:
        """Record the graph; false where the model looks at what it computes, which no graph can."""
        for _ in range(2):  # compiles kernels and makes the pages
            self._run()
        graph, stream, pool = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):  # other lanes go on
                self._logits = self._run()
        except RuntimeError:
            # Torch leaves the thread in the stream of the recording, and the allocator as if it went on: it would free
            # nothing for anybody any more.
            torch.cuda.set_stream(stream)
            with suppress(RuntimeError, AttributeError):  # it did end, or another torch has them elsewhere
                torch._C._cuda_endAllocateToPool(stream.device_index, pool)
                torch._C._cuda_releasePool(stream.device_index, pool)
            torch.cuda.synchronize()
            self._logits = None
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
        softcap: float | None = None,
    ) -> Tensor:
        """Put the tokens' keys and values into their pages; what each query finds there (tokens, heads, size)."""
        gpu_kernels.store(key, value, keys, values, self.places)
        return gpu_kernels.attend(query, keys, values, self.places, scaling, window, softcap)

    def _run(self) -> Tensor:
        return self._compute(self._ids.long(), self.places.positions.long(), self._wanted.long(), self)

    def _packed(self, step: Step) -> np.ndarray:
        """What `_inputs` holds for a step."""
        wanted, alone = filled(step.wanted, self.tokens), np.zeros((self.tokens, 2), np.int32)
        alone[:, 0] = range(self.tokens)
        alone[step.alone, 1] = 1
        pieces, tables = np.zeros((self.tokens // 2, 2), np.int32), np.zeros((self.tokens, self.cache.width), np.int32)
        cut = [
            (at, min(PIECE, end - at)) for begin, end in step.runs if end - begin > 1 for at in range(begin, end, PIECE)
        ]
        pieces[: len(cut)] = cut or 0
        tables[:, : step.pages.shape[1]] = step.pages
        return np.concatenate([step.tokens, wanted, step.positions, *(x.ravel() for x in (alone, pieces, tables))])


class GpuLlama:
    """Llama's layers with one kernel for what lies between two products, as `LlamaNetwork` has it on a CPU.

    Takes the model apart. What runs through the layers is kept in fp32, whatever the precision of the weights.
    """

    def __init__(self, model: Any):
        config = model.config
        self.epsilon, self.kv_heads = config.rms_norm_eps, config.num_key_value_heads
        self.embedding, self.head = model.get_input_embeddings(), JoinedLinear(model.lm_head)
        self.norm = model.model.norm.weight.detach()
        self.cosines, self.sines = rotations(model)
        self.layers = []
        for index, (layer, window) in enumerate(zip(model.model.layers, windows(config))):
            self.layers.append(LlamaLayer(layer, window, JoinedLinear, Tensor.contiguous))
            model.model.layers[index] = nn.Identity()  # its weights are free

    def __call__(self, ids: Tensor, positions: Tensor, wanted: Tensor, step: GpuStep) -> Tensor:
        change = self.embedding(ids)
        stream = torch.zeros(change.shape, dtype=torch.float32, device=change.device)
        for index, layer in enumerate(self.layers):
            normed = add_norm(stream, change, layer.input_norm, self.epsilon)
            qkv = layer.qkv(normed)  # (tokens, (heads + 2 x kv heads) x size)
            heads = qkv.shape[1] // layer.size - 2 * self.kv_heads
            rotate(qkv, heads + self.kv_heads, layer.size, self.cosines, self.sines, step.places.positions)
            query, key, value = qkv.view(len(qkv), -1, layer.size).split([heads, self.kv_heads, self.kv_heads], 1)
            keys, values = step.cache.of_layer(index, self.kv_heads, layer.size, qkv)
            found = step.attend(query, key, value, keys, values, layer.scaling, layer.window)  # (tokens, heads, size)
            change = layer.output(found.flatten(1))
            normed = add_norm(stream, change, layer.attention_norm, self.epsilon)
            change = layer.down(gate(layer.gate_and_up(normed)))
        return self.head(add_norm(stream, change, self.norm, self.epsilon)[wanted])
