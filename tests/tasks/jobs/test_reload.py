"""What is saved of a weight."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
)

from tasks.jobs import reload
from tasks.jobs.reload import merge_adapter, rounded, save_model, stored_dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_becomes_one_of_its_two_neighbours_and_is_right_on_average(dtype: torch.dtype) -> None:
    weight = torch.full((100_000,), 0.3)
    low, high = sorted({value.item() for value in rounded(weight, dtype).float().unique()})
    assert low < 0.3 < high and torch.nextafter(torch.tensor(low).to(dtype), torch.tensor(1).to(dtype)) == high
    assert abs(rounded(weight, dtype).double().mean() - 0.3) < 0.01 * (high - low)
    assert abs(rounded(-weight, dtype).double().mean() + 0.3) < 0.01 * (high - low)


def test_what_a_type_holds_stays_as_it_is() -> None:
    weight = torch.randn(1000).to(torch.bfloat16)
    assert torch.equal(rounded(weight.float(), torch.bfloat16), weight)
    fine = torch.randn(1000)
    assert torch.equal(rounded(fine, torch.float32), fine)
    assert torch.equal(rounded(weight, torch.float32), weight.float())  # as DeepSpeed gives what is not trained
    assert torch.equal(rounded(weight, torch.float16), rounded(weight.float(), torch.float16))


def test_a_large_weight_is_rounded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "PART", 7)
    weight = torch.randn(10, 5).t()
    made = rounded(weight, torch.bfloat16)
    assert made.shape == weight.shape and (made - weight).abs().max() < 0.05


def test_the_same_weight_is_rounded_the_same() -> None:
    weight = torch.randn(1000)
    assert torch.equal(rounded(weight, torch.bfloat16), rounded(weight.clone(), torch.bfloat16))


def test_what_was_not_trained_is_saved_as_it_is(tmp_path: Path) -> None:
    config = DeepseekV3Config(
        vocab_size=40, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config)
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    bias += torch.linspace(5.0001, 5.0002, 4)
    save_model(model.state_dict(), model, torch.bfloat16, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    (found,) = [tensor for name, tensor in saved.items() if name.endswith("e_score_correction_bias")]
    assert torch.equal(found, bias)
    assert saved["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_a_model_that_lacks_a_weight_is_not_saved_and_a_tied_one_is_known_by_its_first_name(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    weights = model.state_dict()
    del weights["lm_head.weight"]
    save_model(weights, model, torch.float32, tmp_path / "tied")
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_model, tmp_path / "tied"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    del weights["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(RuntimeError, match=r"lacks the weights \['model.layers.2.mlp.up_proj.weight'\]"):
        save_model(weights, model, torch.float32, tmp_path / "lacking")
    assert not (tmp_path / "lacking").exists()


def test_the_precision_of_a_model_is_that_of_its_config(tiny_model: Path, tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype).save_pretrained(tmp_path)
        assert stored_dtype(str(tmp_path)) == dtype
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({key: said for key, said in config.items() if key != "dtype"}))
    assert stored_dtype(str(tmp_path)) == torch.float32


@pytest.mark.parametrize("kind", [LlamaConfig, MixtralConfig])
def test_an_adapter_is_merged_as_into_a_model_of_fp32_and_rounded_once(
    kind: type[PretrainedConfig], tmp_path: Path
) -> None:
    config = kind(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    base, ours, theirs = tmp_path / "base", tmp_path / "ours", tmp_path / "theirs"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    adapted.save_pretrained(ours / "adapter")
    merge_adapter(ours, None)
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(whole, str(ours / "adapter")).merge_and_unload()
    save_model(merged.state_dict(), merged, torch.bfloat16, theirs)
    before, found, expected = (load_file(folder / "model.safetensors") for folder in (base, ours, theirs))
    assert found.keys() == expected.keys() == before.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    changed = {name for name in before if not torch.equal(found[name], before[name])}
    assert changed == {name for name in before if "layers." in name and "norm" not in name}
