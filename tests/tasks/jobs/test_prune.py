"""Pruning drops the layers that do least, and leaves a model that loads and answers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tasks.jobs.launch import JobError, run_job
from tasks.jobs.prune import prune
from tasks.jobs.template import encode_prompt
from tests.tiny import TEXTS

PROMPTS = [[{"role": "user", "content": text}] for text in TEXTS[::40]]


def test_the_layers_of_least_influence_go_and_the_rest_compute_as_before(tmp_path: Path, tiny_model: Path) -> None:
    result = run_job("tasks.jobs.prune", {"model": str(tiny_model), "layers": 2, "prompts": PROMPTS}, tmp_path / "p")
    influence = {int(layer): value for layer, value in result["influence"].items()}
    assert result["dropped"] == sorted(sorted(influence, key=influence.__getitem__)[:2])
    assert result["layers"] == 2

    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "p")
    assert pruned.config.num_hidden_layers == 2
    assert pruned.num_parameters() == result["parameters"]
    original = AutoModelForCausalLM.from_pretrained(tiny_model)
    original.model.layers = torch.nn.ModuleList(
        layer for i, layer in enumerate(original.model.layers) if i not in result["dropped"]
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "p")
    ids = torch.tensor([encode_prompt(tokenizer, PROMPTS[0])])
    with torch.inference_mode():
        assert torch.equal(pruned(ids, use_cache=False).logits, original(ids, use_cache=False).logits)


def test_a_layer_that_does_nothing_goes_first(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for linear in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            linear.weight.zero_()
    result = prune(model, AutoTokenizer.from_pretrained(tiny_model), 3, PROMPTS)
    assert result["dropped"] == [1] and result["influence"]["1"] == pytest.approx(0, abs=1e-6)


def test_of_equal_layers_the_first_goes(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    assert prune(model, AutoTokenizer.from_pretrained(tiny_model), 2, PROMPTS)["dropped"] == [0, 1]


def test_types_of_layers_are_shortened_with_the_layers(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.layer_types = ["full_attention"] * 4
    prune(model, AutoTokenizer.from_pretrained(tiny_model), 3, PROMPTS)
    assert model.config.layer_types == ["full_attention"] * 3


def test_a_model_in_bf16_stays_in_bf16(tmp_path: Path, tiny_model: Path) -> None:
    source = tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(tiny_model).to(torch.bfloat16).save_pretrained(source)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(source)
    run_job("tasks.jobs.prune", {"model": str(source), "layers": 3, "prompts": PROMPTS}, tmp_path / "p")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "p", dtype="auto").dtype == torch.bfloat16


def test_more_layers_than_there_are_is_an_error_that_says_so(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(JobError, match="has 4 layers, so it cannot keep 9"):
        run_job("tasks.jobs.prune", {"model": str(tiny_model), "layers": 9, "prompts": PROMPTS}, tmp_path / "p")


def test_a_model_whose_config_counts_its_kinds_of_layers_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4,
        num_experts_per_tok=2, mlp_only_layers=[0],
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():  # the dense layer does nothing, so that it goes
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(JobError, match="layers of several kinds cannot be pruned"):
        run_job("tasks.jobs.prune", {"model": str(tmp_path / "model"), "layers": 2, "prompts": PROMPTS}, tmp_path / "p")
