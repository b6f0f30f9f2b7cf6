"""Makes a smaller model out of a larger one by leaving out the layers that change their input least.

    python -m tasks.jobs.prune <directory>/job.json

`job.json`: {"model": folder, "layers": how many to keep, "prompts": [messages, ...]}. Writes the model, in the
type of its source, with its tokenizer into the directory, `result.json` last.

A layer's influence is 1 - cosine between its input and its output, the mean over all tokens of the sample
prompts (Men et al. 2024, ShortGPT, arXiv 2403.03853). Deterministic: of two layers of equal influence the first
is dropped first.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from tasks.jobs.launch import finish
from tasks.jobs.template import Messages, encode_prompt


def prune(model: Any, tokenizer: Any, layers: int, prompts: Sequence[Messages]) -> dict[str, Any]:
    """Drop the layers of least influence, in place, until `layers` are left; what was dropped and why.

    Raises:
        SystemExit: the model is not built of a list of layers, or has too few of them.
    """
    decoder = model.get_decoder()
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise SystemExit(f"{type(model).__name__} is not built of a list of layers like a Llama: it cannot be pruned.")
    total = len(decoder.layers)
    if not 1 <= layers <= total:
        raise SystemExit(f"The model has {total} layers, so it cannot keep {layers}. Ask for 1 to {total}.")
    if not prompts:
        raise SystemExit("Without sample prompts the influence of a layer is unknown. Give some in `prompts`.")
    influence = influence_of_layers(model, decoder.layers, [encode_prompt(tokenizer, prompt) for prompt in prompts])
    dropped = sorted(sorted(range(total), key=lambda layer: influence[layer])[: total - layers])
    keep = [layer for layer in range(total) if layer not in dropped]
    decoder.layers = nn.ModuleList(decoder.layers[layer] for layer in keep)
    keep_in_config(model.config.get_text_config(), keep, total)
    return {
        "dropped": dropped,
        "influence": {str(layer): round(value, 6) for layer, value in enumerate(influence)},
        "parameters": model.num_parameters(),
        "layers": layers,
    }


@torch.inference_mode()
def influence_of_layers(model: Any, layers: nn.ModuleList, prompts: Sequence[list[int]]) -> list[float]:
    """1 - cosine between input and output of each layer, the mean over the tokens of all prompts."""
    sums = torch.zeros(len(layers), dtype=torch.float64)

    # Hooks and not `output_hidden_states`, whose last state is already normed: the last layer would look twice as strong.
    def watch(index: int) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            sums[index] += (1 - nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)).double().sum()

        return add

    hooks = [layer.register_forward_hook(watch(i), with_kwargs=True) for i, layer in enumerate(layers)]
    for prompt in prompts:
        model(torch.tensor([prompt], device=model.device), use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return (sums / sum(map(len, prompts))).tolist()


def keep_in_config(config: Any, keep: Sequence[int], total: int) -> None:
    """Shorten what the config says of each layer: their number, their types, and whatever else is a list of them."""
    config.num_hidden_layers = len(keep)
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == total:
            setattr(config, name, [value[layer] for layer in keep])


def raise_unless_whole(directory: Path) -> None:
    """See that the saved model is read back with all weights that it was saved with.

    Raises:
        SystemExit: its config says by their numbers which layers are of another kind, as of some models with experts.
    """
    found: dict[str, Any]
    _, found = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    wrong = sorted(
        name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in map(str, found[kind])
    )
    if wrong:
        raise SystemExit(
            f"A model with layers of several kinds cannot be pruned here: without some of them it is read back otherwise "
            f"({', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}). Take student.start.init: base."
        )


def main(job_file: Path) -> None:
    """Run one job: see the module's docstring."""
    job, directory = json.loads(job_file.read_bytes()), job_file.parent
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto").eval()
    kept_as = model.dtype
    model.float()  # bf16 to fp32 and back loses nothing, and layers close to each other are told apart
    result = prune(model, tokenizer, job["layers"], job["prompts"])
    model.to(kept_as).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    raise_unless_whole(directory)
    finish(directory, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
