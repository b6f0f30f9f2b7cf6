"""What models of Llama's shape consist of, for those who write their layers out: a CPU's network, and a GPU's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LLAMA_LIKE = {"llama", "mistral", "qwen2"}  # model types
FIXED_ROPES = {"default", "linear", "llama3", "yarn"}  # that do not change with the length of a text


class LlamaLayer:
    """The weights of one layer: projections of the same input as one matrix.

    Args:
        window: how many of the last keys its queries see; 0 is all.
        linear: makes one of several linear layers of the same input.
        held: what becomes of other weights.
    """

    def __init__(self, layer: Any, window: int, linear: Callable[..., Any], held: Callable[[Tensor], Any]):
        attention, mlp = layer.self_attn, layer.mlp
        self.size, self.scaling, self.window = attention.head_dim, attention.scaling, window
        self.input_norm = held(layer.input_layernorm.weight.detach())
        self.attention_norm = held(layer.post_attention_layernorm.weight.detach())
        self.qkv = linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = linear(attention.o_proj)
        self.gate_and_up = linear(mlp.gate_proj, mlp.up_proj)
        self.down = linear(mlp.down_proj)
        self.linear = [self.qkv, self.output, self.gate_and_up, self.down]


def is_llama_like(model: Any) -> bool:
    """Whether a model's layers are Llama's, as they are written out for a CPU and for a GPU."""
    config = model.config
    if config.model_type not in LLAMA_LIKE or config.hidden_act != "silu":
        return False
    rotary = model.model.rotary_emb
    return rotary.rope_type in FIXED_ROPES and 2 * len(rotary.inv_freq) == model.model.layers[0].self_attn.head_dim


def windows(config: Any) -> list[int]:
    """How many of the last keys each layer's queries see; 0 is all."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or 0
    return [window if kind == "sliding_attention" else 0 for kind in kinds]


def rotations(model: Any) -> tuple[Tensor, Tensor]:
    """Cosines and sines (positions, size / 2) by which each position turns queries and keys, in fp32."""
    rotary = model.model.rotary_emb
    positions = torch.arange(model.config.max_position_embeddings, device=model.device)[None]
    both = rotary(torch.zeros(1, dtype=torch.float32, device=model.device), positions)
    cosines, sines = (x[0, :, : len(rotary.inv_freq)].contiguous() for x in both)
    return cosines, sines
