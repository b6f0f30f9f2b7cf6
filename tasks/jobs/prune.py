"""Makes a smaller model by dropping layers: `python -m tasks.jobs.prune FOLDER/job.json`.

The layers dropped are those of least influence: 1 - cosine between what goes into a layer and what comes out of
it, averaged over the tokens of sample prompts (Men et al. 2024, ShortGPT, arXiv 2403.03853). For any Llama-like
model: one whose layers are `model.model.layers`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.jobs.launch import finish, report_progress
from tasks.jobs.template import encode_prompt


@torch.inference_mode()
def influence_of_layers(model: Any, tokenizer: Any, prompts: list[list[dict[str, str]]]) -> list[float]:
    """Influence of each layer, in their order: 0 for one that changes nothing."""
    total, tokens = torch.zeros(model.config.num_hidden_layers, dtype=torch.float64), 0
    for done, messages in enumerate(prompts):
        ids = torch.tensor([encode_prompt(tokenizer, messages)], device=model.device)
        states = _states(model, ids)
        for layer, (before, after) in enumerate(zip(states, states[1:], strict=False)):
            total[layer] += (1 - torch.cosine_similarity(before.double(), after.double(), dim=-1)).sum().cpu()
        tokens += ids.shape[1]
        report_progress(done + 1, len(prompts))
    return (total / tokens).tolist()


def _states(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """What goes into the first layer, and what comes out of each: (tokens, width). The final norm is not a layer's."""
    states: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        if not states:
            states.append(inputs[0][0])
        states.append((output[0] if isinstance(output, tuple) else output)[0])

    hooks = [layer.register_forward_hook(keep) for layer in model.model.layers]
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return states


def drop_layers(model: Any, dropped: set[int]) -> None:
    """Take layers out of a model, in place."""
    kept = [index for index in range(model.config.num_hidden_layers) if index not in dropped]
    model.model.layers = torch.nn.ModuleList(model.model.layers[index] for index in kept)
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place  # where its keys and values are in the cache
    model.config.num_hidden_layers = len(kept)
    if types := getattr(model.config, "layer_types", None):
        model.config.layer_types = [types[index] for index in kept]


def main(job_file: Path) -> None:
    job = json.loads(job_file.read_text())
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    layers, wanted = model.config.num_hidden_layers, job["layers"]
    if not 1 <= wanted < layers:
        raise SystemExit(f"error: the model has {layers} layers; a pruned student keeps fewer, not {wanted}")
    if not isinstance(getattr(getattr(model, "model", None), "layers", None), torch.nn.ModuleList):
        raise SystemExit(f"error: a {type(model).__name__} cannot be pruned: its layers are not model.model.layers")
    stored = model.dtype
    influence = influence_of_layers(model.float(), tokenizer, job["prompts"])
    dropped = sorted(sorted(range(layers), key=lambda layer: (influence[layer], layer))[: layers - wanted])
    drop_layers(model, set(dropped))
    model.to(stored).save_pretrained(job_file.parent)
    tokenizer.save_pretrained(job_file.parent)
    finish(
        job_file.parent,
        {"dropped": dropped, "influence": influence, "layers": wanted, "parameters": model.num_parameters()},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
