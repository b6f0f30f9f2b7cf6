"""The engine gives a row the same answer in any company, and the answer that transformers would give."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.jobs import kernels
from tasks.jobs import sampling as drawing
from tasks.jobs.attention import PAGE
from tasks.jobs.engine import Engine
from tasks.jobs.network import LlamaNetwork, UnsupportedModel, best_precision, check_can_run, context_of
from tasks.jobs.sampling import Sampling, draw_tokens
from tasks.jobs.template import encode_example, encode_prompt
from tasks.jobs.tiles import Row, Statistics
from tests.tiny import CHATML, TEXTS

REQUESTS = [{"id": f"r{i}", "messages": [{"role": "user", "content": text}]} for i, text in enumerate(TEXTS[::18])]
GREEDY, SAMPLED = Sampling(max_tokens=24), Sampling(temperature=1.0, top_p=0.9, max_tokens=24, seed=7)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return Engine(tiny_model, "fp32")


def answers(engine: Engine, requests: list[dict[str, Any]], sampling: Sampling) -> dict[str, dict[str, Any]]:
    return {reply["id"]: reply for replies in engine.generate(requests, sampling) for reply in replies}


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_a_row_answers_the_same_in_batches_of_any_size(tiny_model: Path, engine: Engine, sampling, rows) -> None:
    assert answers(Engine(tiny_model, "fp32", max_batch_rows=rows), REQUESTS, sampling) == answers(
        engine, REQUESTS, sampling
    )


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_row_answers_the_same_in_any_shard(engine: Engine, sampling: Sampling) -> None:
    shards = [answers(engine, list(reversed(REQUESTS[part::3])), sampling) for part in range(3)]
    assert shards[0] | shards[1] | shards[2] == answers(engine, REQUESTS, sampling)


def prompts_of(engine: Engine) -> list[list[int]]:
    """Short ones, and two that go beyond a run, a tile and the parts of a step."""
    prompts = [encode_prompt(engine.tokenizer, request["messages"]) for request in REQUESTS]
    every = [token for prompt in prompts for token in prompt] * 9
    return [*prompts, every[:300], every[7:480]]


def logits_after(engine: Engine, prompts: list[list[int]]) -> torch.Tensor:
    """(prompts, vocabulary): what the engine finds to follow each prompt."""
    found: dict[str, torch.Tensor] = {}

    def settle(wanted: Any, logits: torch.Tensor) -> list[Any]:
        found.update({row.id: each for (row, _), each in zip(wanted, logits.cpu().clone())})
        return [(row, {}) for row, _ in wanted]

    list(engine._share([Row(str(i), prompt) for i, prompt in enumerate(prompts)], settle, 128))
    return torch.stack([found[str(i)] for i in range(len(prompts))])


def largest_error(engine: Engine, prompts: list[list[int]], model: Any) -> float:
    """Of the logits after each prompt, beside those of transformers' model: in parts of the largest."""
    errors = []
    for prompt, ours in zip(prompts, logits_after(engine, prompts).float()):
        with torch.inference_mode():
            theirs = model(torch.tensor([prompt], device=model.device)).logits[0, -1].cpu()
        errors.append((ours - theirs).abs().max() / theirs.abs().max())
    return torch.stack(errors).max().item()


def save_random(config: Any, tiny_model: Path, folder: Path) -> Any:
    """A model of this config with random weights; saved with the tiny model's tokenizer, too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_do_not_depend_on_the_company_to_the_last_bit(tiny_model: Path, precision: str) -> None:
    engine = Engine(tiny_model, precision)
    prompts = prompts_of(engine)
    together = logits_after(engine, prompts)
    engine.lanes = 1
    alone = torch.cat([logits_after(engine, [prompt]) for prompt in prompts])
    backwards = logits_after(engine, prompts[::-1]).flip(0)
    assert torch.equal(alone, together) and torch.equal(backwards, together)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU; see test_gpu.py")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_llama_written_out_is_the_llama_of_transformers(tiny_model: Path, precision: str) -> None:
    engine = Engine(tiny_model, precision)
    assert isinstance(engine.network, LlamaNetwork)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert largest_error(engine, prompts_of(engine), model) < {"fp32": 1e-5, "bf16": 0.05}[precision]


def assert_answers_are_those_of(model: Any, engine: Engine, requests: list[dict[str, Any]]) -> None:
    """Greedy ones, of transformers' own loop."""
    ours = answers(engine, requests, GREEDY)
    for request in requests:
        prompt = encode_prompt(engine.tokenizer, request["messages"])
        output = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :]
        assert ours[request["id"]]["text"] == engine.tokenizer.decode(output, skip_special_tokens=True)
        assert ours[request["id"]]["completion_tokens"] == len(output)
        assert ours[request["id"]]["prompt_tokens"] == len(prompt)


def test_greedy_answers_are_those_of_transformers(tiny_model: Path, engine: Engine) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert_answers_are_those_of(model, engine, REQUESTS)


def test_a_system_prompt_of_the_template_is_computed_once_and_changes_no_answer(tiny_model: Path) -> None:
    with_preamble = Engine(tiny_model, "fp32", max_batch_rows=2)  # pages go from rows that are done to others
    preamble = f"<|im_start|>system\n{'Explain renewable energy in public libraries. ' * 12}<|im_end|>\n"
    with_preamble.tokenizer.chat_template = preamble.replace("\n", "{{ '\\n' }}") + CHATML
    without, before = answers(with_preamble, REQUESTS, GREEDY), with_preamble.statistics
    with_preamble.prefix = with_preamble._template_prefix()
    assert len(with_preamble.prefix) > PAGE and len(with_preamble.prefix) % PAGE, "shared pages, and one that is copied"
    with_preamble.statistics = after = Statistics()
    assert {id: reply["text"] for id, reply in answers(with_preamble, REQUESTS, GREEDY).items()} == {
        id: reply["text"] for id, reply in without.items()
    }
    assert after.positions - after.padded_positions < before.positions - before.padded_positions


def test_another_draw_or_another_seed_is_another_answer(engine: Engine) -> None:
    first = answers(engine, REQUESTS, SAMPLED)
    other_draw = answers(engine, [{**request, "draw": 1} for request in REQUESTS], SAMPLED)
    other_seed = answers(engine, REQUESTS, Sampling(temperature=1.0, top_p=0.9, max_tokens=24, seed=8))
    assert all(first[id]["text"] not in (other_draw[id]["text"], other_seed[id]["text"]) for id in first)


def test_sampling_follows_the_models_probabilities(engine: Engine) -> None:
    request = REQUESTS[0]
    draws = [{**request, "id": f"d{draw}", "draw": draw} for draw in range(800)]
    replies = answers(engine, draws, Sampling(temperature=0.5, max_tokens=1))
    prompt = encode_prompt(engine.tokenizer, request["messages"])
    probabilities = torch.softmax(logits_after(engine, [prompt])[0] / 0.5, -1)
    token = int(probabilities.argmax())
    text = engine.tokenizer.decode([token])
    same_text = [t for t in range(len(probabilities)) if engine.tokenizer.decode([t], skip_special_tokens=True) == text]
    expected = float(probabilities[same_text].sum())
    drawn = sum(reply["text"] == text for reply in replies.values()) / len(replies)
    assert abs(drawn - expected) < 4 * (expected * (1 - expected) / len(replies)) ** 0.5


def test_a_narrow_nucleus_is_the_likeliest_token(engine: Engine) -> None:
    narrow = answers(engine, REQUESTS, Sampling(temperature=1.0, top_p=1e-6, max_tokens=10))
    greedy = answers(engine, REQUESTS, Sampling(max_tokens=10))
    assert {id: reply["text"] for id, reply in narrow.items()} == {id: reply["text"] for id, reply in greedy.items()}


@pytest.mark.parametrize("candidates", [1, 512], ids=["sorted whole", "among the likeliest"])
def test_a_nucleus_is_of_the_probabilities_at_that_temperature(
    candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "TOP_P_CANDIDATES", candidates)
    logits = 0.5 * torch.tensor([[0.05, 0.5, 0.15, 0.3]] * 4).log()
    how = Sampling(temperature=0.5, top_p=0.6)  # 0.5 and 0.3 fill it
    assert draw_tokens(logits, [0.0, 0.6, 0.65, 0.999], how) == [1, 1, 3, 3]


def test_no_rows_are_no_replies(engine: Engine) -> None:
    assert answers(engine, [], GREEDY) == {}
    assert list(engine.score([])) == []


def test_a_stop_text_ends_the_answer_and_is_left_out(engine: Engine) -> None:
    whole = answers(engine, REQUESTS[:1], GREEDY)["r0"]
    stop = whole["text"][10:13]
    cut = answers(engine, REQUESTS[:1], Sampling(max_tokens=24, stop=(stop,)))["r0"]
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["finish_reason"] == "stop"
    assert cut["completion_tokens"] < whole["completion_tokens"]


def test_a_stop_text_is_found_of_however_many_tokens_it_is_and_the_first_place_counts(engine: Engine) -> None:
    row = Row(
        "a", [1], answer=[token for sign in "So far\n### End ###" for token in engine.tokenizer(sign)["input_ids"]]
    )
    for stop in (("### End ###",), ("End ###", "### End ###")):
        assert engine._ending(row, Sampling(stop=stop)) == ("So far\n", "stop")
    assert engine._ending(row, Sampling(stop=("### End ####",))) == ("", None)


def test_the_end_of_turn_ends_the_answer_and_is_left_out(engine: Engine) -> None:
    replies = answers(engine, REQUESTS, Sampling(temperature=1.5, max_tokens=300, seed=1))
    stopped = [reply for reply in replies.values() if reply["finish_reason"] == "stop"]
    assert stopped
    assert all("<|im_end|>" not in reply["text"] and reply["completion_tokens"] < 300 for reply in stopped)


def test_an_answer_without_an_end_is_cut_and_says_so(engine: Engine) -> None:
    reply = answers(engine, REQUESTS[:1], Sampling(max_tokens=3))["r0"]
    assert (reply["finish_reason"], reply["completion_tokens"]) == ("length", 3)


def test_a_prompt_beyond_the_context_or_none_at_all_is_refused_by_id_and_the_others_are_answered(
    engine: Engine,
) -> None:
    long = {"id": "long", "messages": [{"role": "user", "content": "bridges " * 500}]}
    replies = answers(engine, [*REQUESTS[:2], long, {"id": "empty", "prompt": ""}], GREEDY)
    assert replies["long"]["text"] is None and replies["long"]["finish_reason"] is None
    assert "488 fit" in replies["long"]["error"]  # a context of 512 less 24 for the answer
    assert "the prompt has 0 tokens" in replies["empty"]["error"]
    assert replies["r0"]["error"] is None and replies["r1"]["text"]


def test_a_plain_prompt_is_continued_without_a_template(engine: Engine) -> None:
    reply = answers(engine, [{"id": "p", "prompt": "1. Explain the water cycle\n2."}], GREEDY)["p"]
    assert reply["prompt_tokens"] == len(engine.tokenizer("1. Explain the water cycle\n2.")["input_ids"])


def test_few_tokens_of_cache_make_small_batches_and_the_same_answers(tiny_model: Path, engine: Engine) -> None:
    narrow = Engine(tiny_model, "fp32", max_batch_tokens=256)
    assert answers(narrow, REQUESTS, GREEDY) == answers(engine, REQUESTS, GREEDY)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU: a GPU's steps are of one size")
def test_little_of_what_is_computed_is_padding(tiny_model: Path) -> None:
    engine = Engine(tiny_model)
    many = [{"id": f"m{i}", "messages": [{"role": "user", "content": TEXTS[i % len(TEXTS)]}]} for i in range(300)]
    replies = answers(engine, many, Sampling(temperature=1.0, max_tokens=100))
    assert len({reply["completion_tokens"] for reply in replies.values()}) > 5  # they end here and there
    assert engine.statistics.padded_share < 0.15


def test_the_loss_of_an_answer_is_that_of_single_forwards(tiny_model: Path, engine: Engine) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    items = [
        {"id": request["id"], "messages": request["messages"], "answer": TEXTS[i][: 5 * i], "whole": i % 2 == 0}
        for i, request in enumerate(REQUESTS)
    ]
    scores = {score["id"]: score for batch in engine.score(items) for score in batch}
    for item in items:
        example = encode_example(
            engine.tokenizer, item["messages"], item["answer"], whole=item["whole"], max_length=512
        )
        labels = [-100] * example.prompt_length + example.input_ids[example.prompt_length :]
        tokens = len(example.input_ids) - example.prompt_length
        with torch.inference_mode():
            loss = model(torch.tensor([example.input_ids]), labels=torch.tensor([labels])).loss.item() if tokens else 0
        assert scores[item["id"]]["tokens"] == tokens
        assert scores[item["id"]]["loss_sum"] == pytest.approx(loss * tokens, abs=1e-4, rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_of_an_answer_does_not_depend_on_the_company_to_the_last_bit(tiny_model: Path, precision: str) -> None:
    engine = Engine(tiny_model, precision)
    items = [{**request, "answer": TEXTS[i] * (1 + i), "whole": True} for i, request in enumerate(REQUESTS)]
    together = {score["id"]: score for batch in engine.score(items) for score in batch}
    engine.lanes = 1
    alone = {score["id"]: score for item in items for batch in engine.score([item]) for score in batch}
    assert alone == together


@pytest.mark.parametrize(
    ("cpu", "able", "precision"),
    [
        ("without", [], "fp32"),
        ("Intel Xeon", ["avx512_bf16", "avx512_fp16", "amx_bf16"], "bf16"),  # Sapphire Rapids
        ("Intel Xeon", ["avx512_bf16", "avx512_fp16"], "fp32"),  # its AMX hidden by a hypervisor
        ("Intel Xeon", ["avx512_bf16"], "bf16"),  # Cooper Lake
        ("AMD EPYC", ["avx512_bf16"], "bf16"),  # Zen 4
        ("AMD EPYC", ["avx512_bf16", "avx512_fp16"], "bf16"),  # Zen 6
    ],
)
def test_precision_follows_the_hardware(
    cpu: str, able: list[str], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    capabilities = {"cpu_name": cpu, **dict.fromkeys(able, True)}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert best_precision(torch.device("cpu")) == precision


LAYERS = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("Qwen2", LAYERS),
        ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}),
        # A window shorter than the prompts, and caps so low, that they matter.
        ("Mistral", {**LAYERS, "sliding_window": 8}),
        (
            "Gemma2",
            {
                **LAYERS,
                "head_dim": 16,
                "sliding_window": 8,
                "attn_logit_softcapping": 0.5,
                "final_logit_softcapping": 5.0,
            },
        ),
    ],
    ids=["qwen2", "gpt2", "mistral", "gemma2"],
)
def test_other_architectures_answer_as_in_transformers(
    architecture: str, settings: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    tokens = {"vocab_size": len(AutoTokenizer.from_pretrained(tiny_model)), "eos_token_id": 2, "pad_token_id": 2}
    config = getattr(transformers, f"{architecture}Config")(**tokens, bos_token_id=None, **settings)
    model = save_random(config, tiny_model, tmp_path)
    assert_answers_are_those_of(model, Engine(tmp_path, "fp32"), REQUESTS[:6])


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (
            lambda: transformers.Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"]),
            "layers of the kind conv",
        ),
        (lambda: transformers.Llama4TextConfig(), "layers of the kind chunked_attention"),
        (lambda: transformers.DiffLlamaConfig(), "its attention cannot be replaced"),
        (lambda: transformers.DogeConfig(), "its attention cannot be replaced"),  # its values choose what is seen
        (lambda: transformers.NemotronConfig(), "its attention cannot be replaced"),
        (lambda: transformers.DeepseekV3Config(), "its values have another size"),
        (lambda: transformers.GptOssConfig(), "its attention has sinks"),
        (lambda: transformers.AutoConfig.for_model("granite_swa"), "its attention has sinks"),
        (lambda: transformers.PhimoeConfig(sliding_window=2047), "do not say how far they look back"),
        (lambda: transformers.MambaConfig(), "its attention cannot be replaced"),
    ],
    ids=[
        "lfm2", "llama4", "diffllama", "doge", "nemotron", "deepseek", "gpt-oss", "granite-swa", "phimoe",
        "mamba",
    ],
)  # fmt: skip
def test_a_model_that_would_be_computed_wrong_is_refused(config: Any, why: str) -> None:
    with pytest.raises(UnsupportedModel, match=why):
        check_can_run(config())


def test_a_model_that_no_list_names_is_held_to_its_own_losses(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.jobs.network.MISCOMPUTED", set())
    like = {"vocab_size": len(AutoTokenizer.from_pretrained(tiny_model)), "initializer_range": 0.2}
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    save_random(transformers.DiffLlamaConfig(**like, **size), tiny_model, tmp_path)
    with pytest.raises(UnsupportedModel, match=r"type diffllama .* texts get other losses here, by \d.* nats a token"):
        Engine(tmp_path, "fp32")


def test_a_machine_on_which_a_kernel_is_wrong_answers_nothing(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = kernels.add_norm
    monkeypatch.setattr(kernels, "add_norm", lambda stream, change, *others: right(stream, -change, *others))
    with pytest.raises(UnsupportedModel, match=r"type llama .* texts get other losses here"):
        Engine(tiny_model, "fp32")


@pytest.mark.parametrize(
    "kind",
    [
        "Llama", "Mistral", "Qwen2", "Qwen2Moe", "Qwen3", "Gemma", "Gemma2", "Gemma3Text", "Gemma4Text", "Phi3", "Phimoe",
        "GPT2",
    ],
)  # fmt: skip
def test_usual_models_are_not_refused(kind: str) -> None:
    check_can_run(getattr(transformers, f"{kind}Config")())


def test_a_context_ends_where_longrope_would_turn_all_rows_of_a_step_otherwise() -> None:
    factors = {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48}
    config = transformers.Phi3Config(
        max_position_embeddings=400,
        original_max_position_embeddings=100,
        rope_parameters={"rope_type": "longrope", **factors},
    )
    assert context_of(config) == 100
    assert context_of(transformers.LlamaConfig(max_position_embeddings=400)) == 400


def test_a_peaked_row_draws_the_same_beside_a_flat_one() -> None:
    generator = torch.Generator().manual_seed(0)
    peaked = (4 * torch.randn(1, 5000, generator=generator)).bfloat16()  # with ties, as bf16 has
    flat = torch.zeros(1, 5000, dtype=torch.bfloat16)
    sampling = Sampling(temperature=1.0, top_p=0.95)
    for chance in torch.rand(200, generator=generator).tolist():
        (alone,) = draw_tokens(peaked, [chance], sampling)
        assert draw_tokens(torch.cat([peaked, flat]), [chance, 0.5], sampling)[0] == alone


def test_what_cannot_be_scored_has_no_loss_and_costs_the_others_nothing(engine: Engine) -> None:
    ask = [{"role": "user", "content": "Why?"}]
    items = [
        {"id": "long", "messages": [{"role": "user", "content": "bridges " * 700}], "answer": "Yes.", "whole": True},
        {"id": "empty", "messages": ask, "answer": "", "whole": False},
        {"id": "good", "messages": ask, "answer": "Because.", "whole": True},
    ]
    scores = {score["id"]: score for batch in engine.score(items) for score in batch}
    assert [(scores[id]["loss_sum"], scores[id]["tokens"]) for id in ("long", "empty")] == [(None, 0)] * 2
    assert scores["good"]["loss_sum"] > 0


def test_a_row_that_the_template_refuses_is_refused_by_id_and_the_others_are_answered(tiny_model: Path) -> None:
    engine = Engine(tiny_model, "fp32")
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    engine.tokenizer.chat_template = no_system + CHATML
    refused = {"id": "system", "messages": [{"role": "system", "content": "Be brief."}, *REQUESTS[0]["messages"]]}
    replies = answers(engine, [refused, *REQUESTS[:2]], GREEDY)
    assert "the chat template refuses it: no system" in replies["system"]["error"]
    assert all(replies[request["id"]]["error"] is None for request in REQUESTS[:2])
    (scored,) = engine.score([{**refused, "answer": "x", "whole": True}])
    assert scored == [{"id": "system", "loss_sum": None, "tokens": 0}]


def test_a_base_model_without_a_chat_template_answers(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path)
    assert not (tmp_path / "chat_template.jinja").exists()
    assert all(reply["error"] is None for reply in answers(Engine(tmp_path, "fp32"), REQUESTS[:3], GREEDY).values())


class TestWeightsInFewBits:
    @pytest.fixture(
        scope="class", params=[("8bit", "fp32"), ("8bit", "bf16"), ("4bit", "fp32"), ("4bit", "bf16")], ids="-".join
    )
    def few(self, request: Any, outliers: Path) -> Engine:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install -e '.[gpu]')")
        quantization, precision = request.param
        return Engine(outliers, precision, quantization=quantization)

    @pytest.fixture(scope="class")
    def outliers(self, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The same function as the tiny model, with inputs beyond the 6 where LLM.int8 treats columns apart."""
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.post_attention_layernorm.weight[::7] *= 8
                for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                    linear.weight[:, ::7] /= 8
        folder = tmp_path_factory.mktemp("outliers")
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
        return folder

    def test_a_row_answers_the_same_in_any_company(self, few: Engine) -> None:
        prompts = prompts_of(few)
        together = logits_after(few, prompts)
        assert torch.equal(logits_after(few, prompts[::-1]).flip(0), together)
        assert torch.equal(torch.cat([logits_after(few, [prompt]) for prompt in prompts]), together)

    def test_logits_are_those_of_the_rounded_weights(self, few: Engine, outliers: Path) -> None:
        held = few.network.config.quantization_config
        model = AutoModelForCausalLM.from_pretrained(outliers, dtype=few.network.model.dtype, quantization_config=held)
        model = model.dequantize(torch.float32).float()
        assert largest_error(few, prompts_of(few), model) < {"fp32": 1e-5, "bf16": 0.05}[few.precision]

    def test_weights_take_little_memory(self, few: Engine) -> None:
        layer = few.network.model.model.layers[0].mlp.up_proj
        bits = 4 if few.network.config.quantization_config.load_in_4bit else 8
        assert 8 * layer.weight.untyped_storage().nbytes() == bits * layer.in_features * layer.out_features
