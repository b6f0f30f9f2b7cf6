"""One step of tokens through a causal language model: logits of all of them.

`load` picks the way. On a CPU `TransformersNetwork` is transformers' own model with our attention, for any architecture,
and `LlamaNetwork` the same computation for models of Llama's shape, written out: a third of the time of a step goes to a
hundred small operations a layer in the former, and Python that keeps other threads waiting. On a GPU it is
`tasks.jobs.gpu`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from tasks.jobs import kernels
from tasks.jobs.attention import ATTENTION, Step, attend_on_cpu, filled
from tasks.jobs.kernels import bits, tensor
from tasks.jobs.linear import TILE, PackedLinear, WidenedLinear, alike_tiles, can_pack, pack_linear_layers, widen_at_use
from tasks.jobs.llama import LlamaLayer, is_llama_like, rotations, windows
from tasks.jobs.quantization import quantized

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LARGEST_TILE = 512  # of parts: a layer's weights are read from memory once for all of them
ATTENDED_LAYERS = {"full_attention", "sliding_attention"}
WITH_SINKS = {"flint", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash"}  # model types
UNTOLD_WINDOWS = {"phimoe", "qwen2_moe"}  # model types whose layers tell their mask of a window, and attention nothing
# Model types that come out wrong, or not at all, though nothing says why. What is not among them an engine may still find
# to be so (`Engine._check`).
MISCOMPUTED = {"diffllama", "doge", "dory", "hrm_text", "nemotron"}


class UnsupportedModel(Exception):
    """The engine would compute another model than this one."""


class Network(Protocol):
    """What an engine needs of a model; on a GPU `tokens_that_fit`, too (`tasks.jobs.gpu.GpuNetwork`)."""

    config: Any
    generation_config: Any
    tiles: Sequence[int]  # how many tokens a step may have, for a token to get the same logits in any of them

    def forward(self, step: Step) -> Iterator[Tensor]:
        """Logits (tokens, vocabulary) of the tokens wanted, some at a time; keys and values go into the step's pages."""
        ...


def load(
    path: Path, precision: str, device: torch.device, quantization: str, texts: Sequence[Sequence[int]]
) -> tuple[Network, list[Tensor]]:
    """The model in a folder, ready to compute in a precision, and the losses that it gives to some texts by itself.

    Args:
        texts: token ids.

    Returns:
        The network, and for each text (tokens - 1), on the CPU: the loss of each token but the first, in nats.

    Raises:
        NotInstalled: the weights are to be quantized, and there is no bitsandbytes.
        UnsupportedModel: it is of a kind that this engine does not compute.
    """
    check_can_run(transformers.AutoConfig.from_pretrained(path))
    dtype = DTYPES[precision]
    model, widened = load_weights(path, dtype, device, quantization, attn_implementation="eager")
    losses = [_losses(model, torch.tensor(text, device=device)) for text in texts]
    model.set_attn_implementation(ATTENTION)
    written_out = not widened and is_llama_like(model)
    network: Network
    if device.type == "cuda":
        from tasks.jobs.gpu import GpuLlama, GpuNetwork  # which need Triton

        network = GpuNetwork(model, GpuLlama(model) if written_out else None)
    elif not can_pack(precision):
        network = TransformersNetwork(model, [TILE])
    elif written_out and kernels.can_attend(dtype, model.model.layers[0].self_attn.head_dim):
        network = LlamaNetwork(model)
    else:
        network = TransformersNetwork(model, alike_tiles([*widened, *pack_linear_layers(model)]))
    return network, losses


@torch.inference_mode()
def _losses(model: Any, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
    return functional.cross_entropy(logits.float(), tokens[1:], reduction="none").cpu()


def load_weights(
    path: Path, dtype: torch.dtype, device: torch.device, quantization: str, **how: Any
) -> tuple[Any, list[WidenedLinear]]:
    """transformers' model in a folder, and its layers that are held in few bits.

    Raises:
        NotInstalled: the weights are to be quantized, and there is no bitsandbytes.
    """
    held = quantized(quantization, dtype, device)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **how, **held).eval()
    return (model, widen_at_use(model, dtype)) if held else (model.to(device), [])


def check_can_run(config: Any) -> None:
    """See that a model of this kind looks across the tokens of a step by our attention alone, as a step holds many rows.

    Raises:
        UnsupportedModel: it does not, or its attention has something that ours has not.
    """
    text = config.get_text_config()
    model = transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
    other_layers = set(getattr(text, "layer_types", None) or []) - ATTENDED_LAYERS
    if model is None or not model._supports_attention_backend or text.model_type in MISCOMPUTED:
        why = "its attention cannot be replaced"
    elif other_layers:
        why = f"it has layers of the kind {', '.join(sorted(other_layers))}"
    elif getattr(text, "kv_lora_rank", None):
        why = "its values have another size than its keys"
    elif text.model_type in WITH_SINKS:
        why = "its attention has sinks"
    elif text.model_type in UNTOLD_WINDOWS and 0 < (text.sliding_window or 0) < text.max_position_embeddings:
        why = "its layers do not say how far they look back"
    elif not getattr(text, "max_position_embeddings", None):
        why = "its settings do not say how long a text may be"
    else:
        return
    raise unsupported(config, why)


def unsupported(config: Any, why: str) -> UnsupportedModel:
    """What is told of a model that this engine does not compute."""
    return UnsupportedModel(
        f"a model of the type {config.get_text_config().model_type} is nothing for `engine: transformers`: {why}. "
        "Have it served: `engine: vllm`, or `engine: openai` with a command in `serve`"
    )


def context_of(config: Any) -> int:
    """How many tokens a text may have. Longrope turns all rows of a step otherwise where one is beyond its first range."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    context: int = text.max_position_embeddings
    first_range = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
    return min(context, first_range or context)


class TransformersNetwork:
    """transformers' own forward; attention comes from `tasks.jobs.attention`."""

    def __init__(self, model: Any, tiles: Sequence[int]):
        self.model, self.config, self.generation_config = model, model.config, model.generation_config
        self.tiles = tiles

    def forward(self, step: Step) -> Iterator[Tensor]:
        tokens, positions, wanted = (
            torch.from_numpy(x).to(self.model.device, torch.long)
            for x in (step.tokens, step.positions, _filled_up(step.wanted, self.tiles))
        )
        done = self.model(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=wanted,
            step=step,
        )
        if step.wanted:
            yield done.logits[0, : len(step.wanted)]


class LlamaNetwork:
    """Llama's layers: what is linear by oneDNN, the rest by one kernel each. Takes the model apart as it packs it.

    What runs through the layers is kept in fp32, whatever the precision of the weights. A step of more tokens than a
    product may have (`part`) goes through each layer in parts, one after the other, but for attention, which looks across
    them.
    """

    def __init__(self, model: Any):
        config = model.config
        self.config, self.generation_config = config, model.generation_config
        self.epsilon = config.rms_norm_eps
        self.kv_heads = config.num_key_value_heads
        self.embedding, self.head = model.get_input_embeddings(), PackedLinear(model.lm_head)
        self.norm = bits(model.model.norm.weight.detach())
        self.cosines, self.sines = (x.numpy() for x in rotations(model))
        self.layers = []
        for index, (layer, window) in enumerate(zip(model.model.layers, windows(config))):
            self.layers.append(LlamaLayer(layer, window, PackedLinear, bits))
            model.model.layers[index] = nn.Identity()  # its weights are free
        alike = alike_tiles([self.head, *self.layers[0].linear])
        self.part = alike[-1]
        self.tiles = sorted({size + before for size in alike for before in range(0, LARGEST_TILE, self.part)})

    def forward(self, step: Step) -> Iterator[Tensor]:
        # stream (tokens, hidden), changes the same in parts; qkv (tokens, (heads + 2 x kv heads) x size); found (tokens,
        # heads x size)
        parts = [slice(begin, begin + self.part) for begin in range(0, len(step.tokens), self.part)]
        changes = [self.embedding(torch.from_numpy(step.tokens[part]).long()) for part in parts]
        stream = np.zeros((len(step.tokens), changes[0].shape[1]), np.float32)
        for index, layer in enumerate(self.layers):
            qkv = changes[0].new_empty(len(step.tokens), layer.qkv.out_features)
            for part, change in zip(parts, changes):
                normed = kernels.add_norm(stream[part], bits(change), layer.input_norm, self.epsilon)
                self._rotate(layer, layer.qkv(tensor(normed)), step.positions[part], qkv[part])
            keys, values = step.cache.of_layer(index, self.kv_heads, layer.size, qkv)
            found = attend_on_cpu(qkv, keys, values, step, layer.scaling, layer.window)
            for i, part in enumerate(parts):
                change = layer.output(found[part])
                normed = kernels.add_norm(stream[part], bits(change), layer.attention_norm, self.epsilon)
                changes[i] = layer.down(tensor(kernels.gate(bits(layer.gate_and_up(tensor(normed))))))
        normed = tensor(kernels.add_norm(stream, bits(torch.cat(changes)), self.norm, self.epsilon))
        wanted = normed[torch.from_numpy(_filled_up(step.wanted, self.tiles)).long()]
        for begin in range(0, len(step.wanted), self.part):
            yield self.head(wanted[begin : begin + self.part])[: len(step.wanted) - begin]

    def _rotate(self, layer: LlamaLayer, qkv: Tensor, positions: np.ndarray, turned: Tensor) -> None:
        heads = qkv.shape[1] // layer.size - self.kv_heads  # of queries and keys
        kernels.rotate(bits(qkv), heads, layer.size, positions, self.cosines, self.sines, bits(turned))


def _filled_up(wanted: Sequence[int], tiles: Sequence[int]) -> np.ndarray:
    """The tokens whose logits are wanted, and token 0 behind them until they are so many as in a tile."""
    return filled(wanted, next(size for size in tiles if size >= len(wanted)))


def best_precision(device: torch.device) -> str:
    """The fastest type that the hardware itself computes in.

    Emulated bf16 is slower than fp32. So are vectors of bf16 on Intel since Sapphire Rapids, which is meant to use AMX:
    where a hypervisor hides that, products in bf16 have half the rate of fp32 (measured on Emerald Rapids). On Cooper
    Lake (oneDNN's issue 894) and on AMD they are faster.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    able = torch.cpu.get_capabilities()
    slow = able.get("cpu_name", "").startswith("Intel") and able.get("avx512_fp16")  # which Cooper Lake has not
    return "bf16" if able.get("amx_bf16") or (able.get("avx512_bf16") and not slow) else "fp32"
