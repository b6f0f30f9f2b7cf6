"""The trainer: what it learns from, what it leaves out, and that the same job gives the same weights."""

import copy
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from storage.pools import write_snapshot
from tasks.jobs.dataset import COLLATE, DataError, Examples, Order, encode_rows, order_of_rows, packed, padded
from tasks.jobs.distributed import SettingsError
from tasks.jobs.launch import JobRefused, run_job
from tasks.jobs.preflight import advice, estimate
from tasks.jobs.settings import SftSettings, launcher_command
from tasks.jobs.sft import one_clear_last_line, raise_unless_saved, train
from tasks.jobs.template import encode_prompt, end_of_turn
from tasks.jobs.trainer import TrainingError, Watch, complete_checkpoints, model_inputs, read_history


def write_examples(*examples: tuple[str, str, str], whole: bool = True) -> Path:
    """A Parquet file of names, questions and answers."""
    rows = [
        {
            "instruction_id": name,
            "messages": [{"role": "user", "content": question}],
            "response": answer,
            "whole": whole,
        }
        for name, question, answer in examples
    ]
    return write_snapshot("examples", rows, step="test", version=1).path


def write_rows(*answers: str, ask: str = "Say something about the number", whole: bool = True) -> Path:
    """A Parquet file of questions and these answers."""
    examples = [(f"row-{number}", f"{ask} {number}.", answer) for number, answer in enumerate(answers)]
    return write_examples(*examples, whole=whole)


def make_job(model: Path, data: Path, **settings: Any) -> dict[str, Any]:
    given = {"num_train_epochs": 1, "global_batch_size": 4, "per_device_train_batch_size": 4, "max_length": 128}
    config = SftSettings(**(given | {"learning_rate": 1e-3, "precision": "fp32"} | settings))
    return {"model": str(model), "data": str(data), "config": config.model_dump(mode="json"), "seed": 0}


def train_here(job: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Do a job in this process, which saves the seconds that a new one needs to import torch."""
    directory.mkdir(parents=True, exist_ok=True)
    train(job, directory)
    return json.loads((directory / "result.json").read_text())


def history_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads would wait for each other longer than so small a model computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def encode(tokenizer: Any, data: Path, target: Path, max_length: int = 128) -> tuple[Examples, dict[str, Any]]:
    report = encode_rows(data, tokenizer, max_length, target / "rows.arrow")
    return Examples(target / "rows.arrow"), report


NUMBERS = [f"The answer is {'very ' * (number % 7)}{number}." for number in range(24)]


class TestRows:
    def test_end_of_turn_is_in_the_loss_even_when_pad_is_eos(self, home: Path, tokenizer: Any) -> None:
        assert tokenizer.pad_token == tokenizer.eos_token
        examples, _ = encode(tokenizer, write_rows("Short.", "A much longer answer than the other."), home)
        batch = padded([examples[0], examples[1]])
        ends = (batch["labels"] == end_of_turn(tokenizer)).nonzero().flatten().tolist()
        assert ends == [examples.labelled[0] - 1, examples.labelled.sum() - 1]
        assert batch["attention_mask"].sum(1).tolist() == examples.lengths.tolist()

    def test_an_answer_that_was_never_ended_teaches_no_end(self, home: Path, tokenizer: Any) -> None:
        examples, report = encode(tokenizer, write_rows("It goes on and", whole=False), home)
        assert examples[0]["input_ids"][-1] != end_of_turn(tokenizer)
        assert (report["rows_with_end_of_turn_in_loss"], report["rows_without_end"]) == (0, 1)

    def test_rows_that_teach_nothing_are_left_out_by_name_and_reason(self, home: Path, tokenizer: Any) -> None:
        data = write_examples(
            ("long", "word " * 400, "Yes."),
            ("blank", "Say", " \n"),
            ("good", "Say", "A word."),
            ("huge", "Say", "x" * 100_000),
        )
        examples, report = encode(tokenizer, data, home, max_length=64)
        assert report["left_out"] == {"no_label": ["long"], "empty": ["blank"], "refused_by_template": []}
        assert (report["cut"], report["cut_share"]) == (["huge"], 0.5)
        assert sorted(row["instruction_id"] for row in (examples[0], examples[1])) == ["good", "huge"]
        assert examples.lengths.max() == 64
        data = write_rows("A word.", ask="Say")
        prompt = len(encode_prompt(tokenizer, [{"role": "user", "content": "Say 0."}]))
        with pytest.raises(DataError, match="the prompt alone fills max_length"):  # the end alone is no answer
            encode(tokenizer, data, home / "no room", max_length=prompt + 1)
        assert encode(tokenizer, data, home / "room", max_length=prompt + 2)[0].labelled.tolist() == [2]

    def test_a_row_that_the_template_refuses_is_left_out_and_a_tokenizer_without_an_end_is_refused(
        self, home: Path, tokenizer: Any
    ) -> None:
        tokenizer = copy.deepcopy(tokenizer)
        template = tokenizer.chat_template
        tokenizer.chat_template = (
            "{% if 'No' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}" + template
        )
        _, report = encode(tokenizer, write_examples(("Yes?", "Yes?", "A."), ("No?", "No?", "A.")), home)
        assert (report["rows"], report["left_out"]["refused_by_template"]) == (1, ["No?"])
        tokenizer.chat_template, tokenizer.eos_token = "{{ messages[0]['content'] }}{{ messages[1]['content'] }}", None
        with pytest.raises(DataError, match="no answer could end"):
            encode(tokenizer, write_rows("Yes."), home / "other")

    def test_nothing_to_learn_from_is_an_error_that_says_why(self, home: Path, tokenizer: Any) -> None:
        with pytest.raises(DataError, match="none of 2 rows has a label: the prompt alone fills max_length 64 in 2"):
            encode(tokenizer, write_rows("Yes.", "No.", ask="word " * 400), home, max_length=64)

    def test_rows_encoded_once_are_not_encoded_again(self, home: Path, tokenizer: Any) -> None:
        data = write_rows("One.", "Two.")
        _, report = encode(tokenizer, data, home)
        data.unlink()
        assert encode(tokenizer, data, home)[1] == report

    def test_a_held_out_row_is_never_trained_on(self, home: Path, tokenizer: Any) -> None:
        examples, _ = encode(tokenizer, write_rows(*NUMBERS), home)
        trained, held_out = examples.split(0.25, seed=1)
        assert sorted([*trained.places, *held_out.places]) == list(range(24))
        assert len(held_out) == 6
        assert examples.split(0.25, seed=1)[1].places.tolist() == held_out.places.tolist()

    @pytest.mark.parametrize("collate", [padded, packed])
    def test_the_loss_is_that_of_the_model_itself(
        self, home: Path, tokenizer: Any, tiny_model: Path, collate: Any
    ) -> None:
        model = AutoModelForCausalLM.from_pretrained(tiny_model, use_cache=False).eval()
        examples, _ = encode(tokenizer, write_rows("Short.", "A longer answer, with more words.", "Middle one."), home)
        rows = [examples[place] for place in range(3)]
        width = int(examples.lengths.max())
        plain = {name: torch.zeros(3, width, dtype=torch.long) for name in ("input_ids", "attention_mask")}
        labels = torch.full((3, width), -100)
        for place, row in enumerate(rows):
            tokens = torch.tensor(row["input_ids"], dtype=torch.long)
            plain["input_ids"][place, : len(tokens)], plain["attention_mask"][place, : len(tokens)] = tokens, 1
            labels[place, row["prompt_length"] : len(tokens)] = tokens[row["prompt_length"] :]
        ours = model(**model_inputs(collate(rows))).loss
        torch.testing.assert_close(ours, model(**plain, labels=labels).loss, atol=1e-5, rtol=1e-5)


class TestOrder:
    LENGTHS = np.random.default_rng(0).integers(5, 200, 2000)

    def order(self, epoch: int = 0, **settings: Any) -> np.ndarray:
        given = {"global_batch_size": 256, "per_device_train_batch_size": 4, "strategy": "ddp", "processes_per_node": 2}
        return order_of_rows(self.LENGTHS, SftSettings(**(given | settings)), seed=3, epoch=epoch)

    @pytest.mark.parametrize("packing", ["none", "grouped", "packed"])
    def test_every_epoch_shows_each_row_once_in_an_order_of_its_own(self, packing: Any) -> None:
        first, again, second = self.order(0, packing=packing), self.order(0, packing=packing), self.order(1)
        assert sorted(first) == list(range(2000))
        assert first.tolist() == again.tolist() != second.tolist()

    def test_grouping_leaves_each_step_the_rows_that_a_random_order_gives_it(self) -> None:
        grouped, random = self.order(1, packing="grouped"), self.order(1, packing="none")
        for step in range(0, 2000, 256):
            assert sorted(grouped[step : step + 256]) == sorted(random[step : step + 256])

    @pytest.mark.parametrize("global_batch_size", [8, 256])
    def test_on_every_device_a_grouped_batch_is_of_like_length(self, global_batch_size: int) -> None:
        order = self.order(1, packing="grouped", global_batch_size=global_batch_size)
        batches = self.LENGTHS[order].reshape(-1, 8)
        padding = 1 - batches.sum() / (batches.max(1) * 8).sum()
        assert padding < 0.05

    def test_packed_batches_are_alike_in_tokens(self) -> None:
        tokens = self.LENGTHS[self.order(1, packing="packed")].reshape(-1, 4).sum(1)
        assert tokens.std() / tokens.mean() < 0.25  # a third of what random batches have

    @pytest.mark.parametrize("packing", ["none", "grouped"])
    def test_the_largest_batch_comes_first(self, packing: Any) -> None:
        assert self.LENGTHS[self.order(0, packing=packing)[:8]].max() == self.LENGTHS.max()

    def test_the_longest_row_comes_first_even_where_it_fills_no_batch(self) -> None:
        settings = SftSettings(per_device_train_batch_size=8, global_batch_size=16, packing="none")
        for seed in range(400):
            lengths = np.random.default_rng(seed).permutation(60) + 5
            assert lengths[order_of_rows(lengths, settings, seed=seed, epoch=0)[:8]].max() == 64

    @pytest.mark.parametrize("packing", ["none", "grouped", "packed"])
    def test_fewer_rows_than_are_computed_at_once_are_all_shown(self, packing: Any) -> None:
        settings = SftSettings(per_device_train_batch_size=8, global_batch_size=8, packing=packing)
        assert sorted(order_of_rows(self.LENGTHS[:3], settings, seed=0, epoch=0)) == [0, 1, 2]

    @pytest.mark.parametrize("collate", [padded, packed])
    def test_several_processes_get_as_many_batches_and_no_row_twice(
        self, home: Path, tokenizer: Any, tiny_model: Path, collate: Any
    ) -> None:
        examples, _ = encode(tokenizer, write_rows(*NUMBERS[:13]), home)
        together = {
            "strategy": "ddp",
            "processes_per_node": 2,
            "per_device_train_batch_size": 4,
            "global_batch_size": 8,
        }
        order = Order(examples, SftSettings(**together), seed=0)
        shown = list(order)
        assert len(shown) == len(order) == 16
        assert sorted(shown) == [*range(13), 13, 13, 13]
        alone = {"per_device_train_batch_size": 4, "global_batch_size": 8}
        assert sorted(Order(examples, SftSettings(**alone), seed=0)) == list(range(13))

        model = AutoModelForCausalLM.from_pretrained(tiny_model, use_cache=False).eval()
        rows = [examples[place] for place in shown[-4:]]  # a row to learn from, and three that fill up
        batch, single = collate(rows), collate(rows[:1])
        torch.testing.assert_close(model(**model_inputs(batch)).loss, model(**model_inputs(single)).loss)
        assert batch["tokens"] == single["tokens"]
        nothing = model(**model_inputs(collate(rows[1:])), num_items_in_batch=torch.tensor(5)).loss
        nothing.backward()
        assert nothing.item() == 0


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"global_batch_size": 8, "per_device_train_batch_size": 3}, "no multiple of the 3 rows.*to 9"),
            ({"processes_per_node": 2, "global_batch_size": 2}, "several processes need another strategy"),
            ({"offload": "optimizer"}, "needs strategy deepspeed"),
            ({"offload": "parameters", "strategy": "ddp"}, "needs strategy deepspeed-zero3 or fsdp"),
            ({"peft": "qlora", "strategy": "fsdp"}, "take peft: lora"),
            ({"hostfile": "hosts", "strategy": "ddp"}, "hostfile is for DeepSpeed"),
            ({"nodes": 2, "strategy": "ddp"}, "need rdzv_endpoint"),
        ],
    )
    def test_what_cannot_work_is_refused_with_the_way_out(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SftSettings(**settings)

    def test_each_strategy_has_its_launcher(self) -> None:
        assert launcher_command(SftSettings()) == []
        several = launcher_command(SftSettings(strategy="deepspeed-zero2", processes_per_node=4))
        assert several[1:] == [
            "-m", "torch.distributed.run", "--log_dir", os.devnull, "--standalone", "--nproc_per_node=4"
        ]  # fmt: skip
        machines = {"strategy": "fsdp", "nodes": 2, "processes_per_node": 4, "rdzv_endpoint": "one:29400"}
        assert launcher_command(SftSettings(**machines))[5:] == [
            "--nnodes=2", "--rdzv_backend=c10d", "--rdzv_endpoint=one:29400", "--nproc_per_node=4"
        ]  # fmt: skip
        hosts = launcher_command(SftSettings(strategy="deepspeed-zero3", hostfile="hosts"))
        assert hosts[1:5] == ["-m", "deepspeed.launcher.runner", "--hostfile", "hosts"]

    def test_all_processes_of_all_machines_share_the_batch_of_a_step(self) -> None:
        machines = {"strategy": "ddp", "nodes": 2, "processes_per_node": 4, "rdzv_endpoint": "one:29400"}
        settings = SftSettings(**machines, per_device_train_batch_size=2, global_batch_size=48)
        assert (settings.world_size, settings.accumulation) == (8, 3)
        with pytest.raises(ValueError, match=r"no multiple of the 16 rows.*global_batch_size to 16"):
            SftSettings(**machines, per_device_train_batch_size=2, global_batch_size=8)

    def test_processes_of_a_machine_share_its_memory(
        self, home: Path, tokenizer: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        examples, _ = encode(tokenizer, write_rows("Yes."), home)
        model, there = AutoModelForCausalLM.from_pretrained(tiny_model), psutil.virtual_memory()
        monkeypatch.setattr(psutil, "virtual_memory", lambda: there._replace(available=64e9))
        machines = {"strategy": "ddp", "nodes": 2, "processes_per_node": 4, "rdzv_endpoint": "one:29400"}
        told = estimate(SftSettings(**machines), "fp32", torch.device("cpu"), model, examples)
        assert told["device_gb_a_process"] == 16

    def test_memory_is_estimated_for_every_strategy_with_advice_where_it_falls_short(
        self, home: Path, tokenizer: Any
    ) -> None:
        examples, _ = encode(tokenizer, write_rows("Yes."), home)
        with torch.device("meta"):
            seven_billion = LlamaForCausalLM(LlamaConfig())
        settings = SftSettings(strategy="ddp", processes_per_node=8)
        told = estimate(settings, "bf16", torch.device("cpu"), seven_billion, examples)
        needed = told["needed_gb_a_process"]
        assert 110 < needed["ddp"] < 140  # the paper says 112 GB
        assert needed["fsdp"] < needed["deepspeed-zero2"] < needed["ddp"]
        assert "gradient_checkpointing: true" in told["advice"]
        assert "peft: lora" in told["advice"]

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [  # bytes a parameter: 2 computed with, 4 of gradient, 12 of master weight and Adam; 32 layers, one of them whole
            ({}, {"single": 18, "ddp": 18, "deepspeed-zero2": 2 + 2, "deepspeed-zero3": 2.25 + 1 / 16, "fsdp": 2.25 + 1 / 16}),
            ({"precision": "fp32"}, {"ddp": 16, "deepspeed-zero2": 4 + 1.5, "fsdp": 2 + 1 / 8}),
            ({"offload": "optimizer"}, {"ddp": 18, "deepspeed-zero2": 2, "deepspeed-zero3": 0.25 + 1 / 16, "fsdp": 2.25 + 1 / 16}),
            ({"offload": "parameters"}, {"deepspeed-zero2": 2, "deepspeed-zero3": 1 / 8, "fsdp": 1 / 8}),
            ({"peft": "lora"}, {"single": 2, "ddp": 2, "deepspeed-zero2": 2, "fsdp": 0.25 + 1 / 16}),
            ({"peft": "qlora", "strategy": "ddp"}, {"single": 1, "ddp": 1, "deepspeed-zero2": 1}),
        ],
    )  # fmt: skip
    def test_memory_is_that_of_weights_gradients_and_optimizer_as_the_strategy_shares_them_out(
        self, settings: dict[str, Any], expected: dict[str, float], home: Path, tokenizer: Any
    ) -> None:
        examples, _ = encode(tokenizer, write_rows("Yes."), home)
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig())
        if "peft" in settings:
            model.requires_grad_(False)
        if settings.get("peft") == "qlora":  # as much as two weights in 4 bit
            model.to(torch.float8_e4m3fn)
        given = SftSettings(**{"strategy": "deepspeed-zero3", "processes_per_node": 8} | settings)
        precision = "fp32" if given.precision == "fp32" else "bf16"
        told = estimate(given, precision, torch.device("cpu"), model, examples)
        billions = sum(weight.numel() for weight in model.parameters()) / 1e9
        for strategy, bytes_a_parameter in expected.items():
            needed = told["needed_gb_a_process"][strategy]
            assert needed == pytest.approx(bytes_a_parameter * billions, abs=0.3), strategy

    def test_memory_of_activations_grows_with_the_batch_and_the_longest_row_and_hardly_where_they_are_computed_twice(
        self, home: Path, tokenizer: Any
    ) -> None:
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig())
        short, _ = encode(tokenizer, write_rows("Yes."), home / "short")
        mixed, _ = encode(tokenizer, write_rows("Yes.", "Yes " * 300), home / "mixed", max_length=2048)

        def needed(examples: Examples, rows: int, **settings: Any) -> float:
            given = SftSettings(per_device_train_batch_size=rows, global_batch_size=rows, **settings)
            told = estimate(given, "bf16", torch.device("cpu"), model, examples)
            return told["needed_gb_a_process"]["single"]

        weights = 2 * needed(short, 64) - needed(short, 128)
        activations = needed(short, 64) - weights
        longer = mixed.lengths.max() / short.lengths.max()
        assert activations == pytest.approx(64 * int(short.lengths[0]) * 4096 * 33 * 34 / 1e9, rel=0.1)
        assert needed(mixed, 64) - weights == pytest.approx(longer * activations, rel=0.1)
        assert needed(short, 64, gradient_checkpointing=True) - weights < 0.15 * activations
        twice = 64 * 4096 * int(mixed.lengths.max()) * (32 * 2 + 34) + 10 * 64 * int(mixed.labelled.max()) * 32000
        assert needed(mixed, 64, gradient_checkpointing=True) - weights == pytest.approx(twice / 1e9, rel=0.02)
        dropped_out = needed(short, 64, peft="lora") - needed(short, 64, peft="lora", lora_dropout=0.0)
        copies = 3 * 33 * 64 * int(short.lengths[0]) * (6 * 4096 + 11008)
        assert dropped_out == pytest.approx(copies / 1e9, rel=0.02)

    def test_the_time_is_that_of_six_operations_a_parameter_and_token_at_half_the_devices_speed(
        self, home: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ticks = itertools.count()
        monkeypatch.setattr("time.perf_counter", lambda: next(ticks))  # each product takes a second
        examples, _ = encode(tokenizer, write_rows(*NUMBERS), home)
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig())
        operations = sum(weight.numel() for weight in model.parameters()) * int(examples.lengths.sum())

        def seconds(**settings: Any) -> float:
            given = SftSettings(**{"num_train_epochs": 1} | settings)
            return estimate(given, "fp32", torch.device("cpu"), model, examples)["seconds"]

        assert seconds() == pytest.approx(6 * operations / 512**3, abs=1)
        assert seconds(num_train_epochs=3) == pytest.approx(3 * seconds(), abs=2)
        assert seconds(gradient_checkpointing=True) == pytest.approx(8 / 6 * seconds(), abs=2)
        assert seconds(strategy="ddp", processes_per_node=4) == pytest.approx(seconds() / 4, abs=2)

    def test_advice_names_only_what_would_change_something(self, home: Path, tokenizer: Any, tiny_model: Path) -> None:
        everything = (
            "to make it fit: gradient_checkpointing: true; strategy: fsdp or deepspeed-zero3 on several devices; "
            "deepspeed-zero3 with offload: parameters; peft: lora; a shorter max_length"
        )
        assert advice(SftSettings(), []) == advice(SftSettings(), ["single"]) == everything
        sparing = {"gradient_checkpointing": True, "peft": "lora", "processes_per_node": 2}
        two = SftSettings(strategy="ddp", per_device_train_batch_size=2, **sparing)
        assert (
            advice(two, ["ddp", "fsdp", "deepspeed-zero3"])
            .split("; ")[0]
            .startswith("to make it fit: a smaller per_device_train_batch_size")
        )
        assert "; strategy: fsdp or deepspeed-zero3; deepspeed-zero3 with offload" in advice(
            two, ["ddp", "fsdp", "deepspeed-zero3"]
        )
        assert "peft" not in advice(two, []) and "checkpointing" not in advice(two, [])
        last = SftSettings(strategy="deepspeed-zero3", offload="parameters", **sparing)
        assert advice(last, []) == "to make it fit: a shorter max_length"
        examples, _ = encode(tokenizer, write_rows("Yes."), home)
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        assert estimate(SftSettings(), "fp32", torch.device("cpu"), model, examples)["advice"] is None


class TestTraining:
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_it_lowers_the_loss_and_keeps_dtype_template_and_generation_config(
        self, precision: str, home: Path, tiny_model: Path, tmp_path: Path
    ) -> None:
        base = tmp_path / "base"
        shutil.copytree(tiny_model, base)
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(base)
        data = write_rows(*["The answer is always the same."] * 12)
        job = make_job(base, data, num_train_epochs=4, validation_share=0.2, precision=precision)
        result = train_here(job, home / "job")
        losses = [loss for _, loss in result["loss_by_step"]]
        assert losses[-1] < losses[0] - 0.5
        assert result["train_loss"] == pytest.approx(np.mean(losses[-3:]))
        assert result["validation_loss"] < losses[0] - 0.5
        assert result["rows"] == 10
        assert result["reloaded_loss_difference"] < (0.01 if precision == "fp32" else 0.05)
        assert {tensor.dtype for tensor in load_file(home / "job" / "model.safetensors").values()} == {torch.bfloat16}
        saved = json.loads((home / "job" / "config.json").read_text())
        assert (saved["dtype"], saved["use_cache"]) == ("bfloat16", True)
        assert (home / "job" / "generation_config.json").exists()
        assert AutoTokenizer.from_pretrained(home / "job").chat_template
        assert list((home / "job" / "tensorboard").iterdir())
        assert not (home / "job" / "trainer").exists()

    def test_a_training_of_one_step_learns_something(self, home: Path, tiny_model: Path) -> None:
        job = make_job(tiny_model, write_rows(*NUMBERS[:4]), global_batch_size=128, num_train_epochs=1)
        result = train_here(job, home / "job")
        before, after = (load_file(folder / "model.safetensors") for folder in (tiny_model, home / "job"))
        assert result["steps"] == 1
        assert not all(torch.equal(before[name], after[name]) for name in after)

    def test_the_rate_rises_from_the_first_step_and_falls_until_the_last(self, home: Path, tiny_model: Path) -> None:
        settings = {"global_batch_size": 4, "num_train_epochs": 2, "warmup_ratio": 0.3, "learning_rate": 1e-3}
        train_here(make_job(tiny_model, write_rows(*NUMBERS), **settings), home / "job")
        rates = [entry["learning_rate"] for entry in history_of(home / "job")]
        peak = int(np.argmax(rates))
        assert rates[0] > 0 and rates[-1] > 0 and max(rates) == pytest.approx(1e-3)
        assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True) and 2 <= peak <= 4

    def test_a_student_of_a_base_that_ends_otherwise_ends_its_turns_for_everybody(
        self, home: Path, tiny_model: Path, tmp_path: Path
    ) -> None:
        base = tmp_path / "base"
        shutil.copytree(tiny_model, base)
        config = json.loads((base / "generation_config.json").read_text())
        (base / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
        train_here(make_job(base, write_rows(*NUMBERS[:4])), home / "job")
        end = end_of_turn(AutoTokenizer.from_pretrained(base))
        assert GenerationConfig.from_pretrained(home / "job").eos_token_id == [0, end]

    def test_accumulated_batches_give_the_step_of_one_large_batch(self, home: Path, tiny_model: Path) -> None:
        data = write_rows(*NUMBERS)
        settings = {"global_batch_size": 8, "num_train_epochs": 2, "packing": "none"}
        large = train_here(make_job(tiny_model, data, per_device_train_batch_size=8, **settings), home / "large")
        job = make_job(tiny_model, data, per_device_train_batch_size=2, gradient_checkpointing=True, **settings)
        small = train_here(job, home / "small")
        np.testing.assert_allclose(large["loss_by_step"][1:], small["loss_by_step"][1:], rtol=0.05)
        assert large["steps"] == small["steps"] == 6

    def test_a_training_that_was_stopped_goes_on_from_its_newest_checkpoint_as_if_it_never_was(
        self, home: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Stopped(BaseException):
            pass

        def stop(watch: Watch, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 11:
                raise Stopped

        data = write_rows(*NUMBERS)
        settings = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "peft": "lora", "save_total_limit": 2}
        undisturbed = train_here(make_job(tiny_model, data, save_steps=0, **settings), home / "whole")
        job = make_job(tiny_model, data, save_steps=3, **settings)
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(Watch, "on_step_end", stop)
            train_here(job, home / "job")
        kept = sorted(path.parent.name for path in home.glob("job/trainer/*/complete"))
        assert kept == sorted(path.name for path in home.glob("job/trainer/checkpoint-*"))
        assert kept == ["checkpoint-6", "checkpoint-9"]
        resumed = train_here(job, home / "job")
        assert resumed["preflight"]["resumed_from"] == "checkpoint-9"
        for name in ("loss_by_step", "train_loss", "steps", "tokens", "padded_tokens", "padding_share"):
            assert resumed[name] == undisturbed[name], name
        weights = [load_file(home / folder / "model.safetensors") for folder in ("whole", "job")]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        history = history_of(home / "job")
        assert [entry["step"] for entry in history] == list(range(1, 13))
        assert [entry["seconds"] for entry in history] == sorted(entry["seconds"] for entry in history)
        assert resumed["seconds"] == history[-1]["seconds"]

    def test_each_step_trains_on_the_rows_of_its_epochs_order_and_counts_their_tokens(
        self, home: Path, tiny_model: Path, tokenizer: Any
    ) -> None:
        data = write_rows(*NUMBERS)
        examples, _ = encode(tokenizer, data, home)
        job = make_job(tiny_model, data, num_train_epochs=3, packing="none")
        result = train_here(job, home / "job")
        assert result["tokens"] == 3 * examples.lengths.sum() < result["padded_tokens"]
        assert result["padding_share"] == round(1 - result["tokens"] / result["padded_tokens"], 4)
        history = history_of(home / "job")
        told = np.diff([entry["tokens"] for entry in history], prepend=0).reshape(3, 6)
        trained, _ = examples.split(0.0, seed=0)
        for epoch in range(3):  # each in an order of its own
            order = order_of_rows(trained.lengths, SftSettings(**job["config"]), seed=0, epoch=epoch)
            assert told[epoch].tolist() == trained.lengths[order].reshape(6, 4).sum(1).tolist()

    def test_the_validation_loss_is_that_of_the_held_out_rows_under_the_saved_model(
        self, home: Path, tiny_model: Path, tokenizer: Any
    ) -> None:
        answers = [f"{'very ' * (number * 3)}{number}" for number in range(24)]  # batches differ in labels
        data = write_rows(*answers)
        examples, _ = encode(tokenizer, data, home)
        job = make_job(tiny_model, data, validation_share=0.3, peft="lora", lora_dropout=0.5)
        result = train_here(job, home / "job")
        trained, held_out = examples.split(0.3, seed=0)
        assert (result["rows"], result["validation_rows"]) == (len(trained), len(held_out)) == (17, 7)
        model = AutoModelForCausalLM.from_pretrained(home / "job", use_cache=False).eval()
        batch = padded([held_out[place] for place in range(len(held_out))])
        with torch.no_grad():
            expected = model(**model_inputs(batch)).loss.item()
        assert result["validation_loss"] == pytest.approx(expected, rel=1e-4)

    def test_an_adapter_has_the_shape_that_was_asked_for(self, home: Path, tiny_model: Path) -> None:
        asked = {"lora_rank": 3, "lora_alpha": 5, "lora_dropout": 0.25, "lora_target": r".*\.q_proj"}
        train_here(make_job(tiny_model, write_rows(*NUMBERS[:4]), peft="lora", **asked), home / "job")
        kept = json.loads((home / "job" / "adapter" / "adapter_config.json").read_text())
        assert (kept["r"], kept["lora_alpha"], kept["lora_dropout"]) == (3, 5, 0.25)
        assert {name.split(".")[-3] for name in load_file(home / "job" / "adapter" / "adapter_model.safetensors")} == {
            "q_proj"
        }

    def test_labels_at_the_wrong_places_are_found_out_before_the_first_step(
        self, home: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def one_off(rows: list[dict[str, Any]]) -> dict[str, Any]:
            batch = padded(rows)
            return batch | {"logits_to_keep": batch["logits_to_keep"].roll(1, 1)}

        monkeypatch.setitem(COLLATE, "none", one_off)
        with pytest.raises(TrainingError, match="our batches give this model another loss than its own"):
            train_here(make_job(tiny_model, write_rows(*NUMBERS), packing="none"), home / "job")
        assert not (home / "job" / "history.jsonl").exists()

    def test_a_lora_target_that_names_no_layer_is_refused_with_the_way_out(self, home: Path, tiny_model: Path) -> None:
        job = make_job(tiny_model, write_rows(*NUMBERS[:4]), peft="lora", lora_target="q_proj")
        with pytest.raises(SettingsError, match="lora_target: q_proj names none of this model's layers"):
            train_here(job, home / "job")

    def test_packed_rows_train_without_padding(self, home: Path, tiny_model: Path) -> None:
        result = train_here(make_job(tiny_model, write_rows(*NUMBERS), packing="packed"), home / "job")
        assert result["padding_share"] == 0
        assert result["preflight"]["loss_differs_from_models_own_by"] < 1e-4

    def test_packing_is_refused_where_a_model_does_not_keep_rows_apart(
        self, home: Path, tiny_model: Path, tmp_path: Path
    ) -> None:
        from transformers import MambaConfig, MambaForCausalLM

        vocabulary = AutoModelForCausalLM.from_pretrained(tiny_model).config.vocab_size
        shutil.copytree(tiny_model, tmp_path / "mamba")
        torch.manual_seed(0)
        config = MambaConfig(vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, state_size=4)
        MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
        with pytest.raises(TrainingError, match="take packing: grouped"):
            train_here(make_job(tmp_path / "mamba", write_rows(*NUMBERS), packing="packed"), home / "job")

    def test_a_loss_that_is_no_number_ends_the_job_and_names_its_rows(
        self, home: Path, tiny_model: Path, tokenizer: Any, tmp_path: Path
    ) -> None:
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        model.get_input_embeddings().weight.data[tokenizer("@", add_special_tokens=False)["input_ids"]] = float("nan")
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(torch.nan_to_num(model.lm_head.weight.data.clone()))
        shutil.copytree(tiny_model, tmp_path / "broken")
        model.save_pretrained(tmp_path / "broken")
        data = write_rows(*NUMBERS[:10], "One answer with @ in it, and more words than the others have.")
        job = make_job(tmp_path / "broken", data, per_device_train_batch_size=1)
        with pytest.raises(TrainingError, match=r"the loss is nan in step \d, on the rows row-10; lower"):
            train_here(job, home / "job")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
    def test_what_needs_a_gpu_is_refused_without_one(self, home: Path, tiny_model: Path) -> None:
        with pytest.raises(SettingsError, match=r"fp16 needs a GPU; .* take auto, bf16 or fp32"):
            train_here(make_job(tiny_model, write_rows(*NUMBERS), precision="fp16"), home / "job")

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    @pytest.mark.parametrize("settings", [{"precision": "fp16"}, {"packing": "packed"}])
    def test_what_only_a_gpu_can_do_lowers_the_loss(
        self, settings: dict[str, Any], home: Path, tiny_model: Path
    ) -> None:
        data = write_rows(*["The answer is always the same."] * 12)
        result = train_here(make_job(tiny_model, data, num_train_epochs=4, **settings), home / "job")
        losses = [loss for _, loss in result["loss_by_step"]]
        assert result["device"] == "cuda:0" and losses[-1] < losses[0] - 0.2

    def test_an_operation_that_a_gpu_computes_in_any_order_is_refused_with_the_way_out(self, tiny_model: Path) -> None:
        said = (
            "histc_cuda does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms"
        )
        refused = "refused: a GPU computes histc_cuda, which this model has, in any order: set deterministic: false"
        with pytest.raises(SystemExit, match=refused), one_clear_last_line(make_job(tiny_model, Path("none"))):
            raise RuntimeError(said)

    def test_memory_that_falls_short_is_named_with_advice(self, tiny_model: Path) -> None:
        job = make_job(tiny_model, Path("none"))
        advised = r"error: out of memory \(CUDA out of memory\); to make it fit: a smaller"
        with pytest.raises(SystemExit, match=advised), one_clear_last_line(job):
            raise torch.OutOfMemoryError("CUDA out of memory")
        with pytest.raises(SystemExit, match="peft: lora"), one_clear_last_line(job):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    @pytest.mark.parametrize(
        ("error", "line"),
        [
            (DataError("no row"), "refused: no row"),
            (SettingsError("no GPU"), "refused: no GPU"),
            (TrainingError("the loss is nan"), "error: the loss is nan"),
            (MemoryError(), r"error: out of memory \(of the host\); to make it fit"),
        ],
    )
    def test_what_we_know_ends_the_job_in_one_line_and_says_whose_fault_it_is(
        self, error: Exception, line: str, tiny_model: Path
    ) -> None:
        with pytest.raises(SystemExit, match=line), one_clear_last_line(make_job(tiny_model, Path("none"))):
            raise error

    def test_a_last_line_has_its_end_so_that_processes_which_say_it_together_do_not_share_one(
        self, tiny_model: Path
    ) -> None:
        for error in (SettingsError("no GPU"), TrainingError("the loss is nan"), MemoryError()):
            with pytest.raises(SystemExit, match=r"\n\Z"), one_clear_last_line(make_job(tiny_model, Path("none"))):
                raise error

    def test_what_we_do_not_know_keeps_its_traceback(self, tiny_model: Path) -> None:
        job = make_job(tiny_model, Path("none"))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), one_clear_last_line(job):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    def test_other_processes_than_the_settings_say_are_refused(self, home: Path, tiny_model: Path) -> None:
        both = {"strategy": "ddp", "processes_per_node": 2, "global_batch_size": 8}
        with pytest.raises(SettingsError, match="1 processes were started, and the settings say 2"):
            train_here(make_job(tiny_model, write_rows(*NUMBERS), **both), home / "job")

    def test_lora_keeps_its_adapter_and_merges_it_into_the_model(self, home: Path, tiny_model: Path) -> None:
        data = write_rows(*NUMBERS)
        job = make_job(tiny_model, data, peft="lora", learning_rate=5e-3, num_train_epochs=3)
        result = train_here(job, home / "job")
        assert (home / "job" / "adapter" / "adapter_model.safetensors").exists()
        assert result["reloaded_loss_difference"] < 1e-4
        before, after = load_file(tiny_model / "model.safetensors"), load_file(home / "job" / "model.safetensors")
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {name for name in before if "_proj" in name}
        assert before.keys() == after.keys()

    @pytest.mark.parametrize(("peft", "rate"), [("none", 5e-5), ("lora", 1e-4), ("qlora", 1e-4)])
    def test_what_little_was_learned_is_there_in_a_student_of_16_bit(
        self, peft: str, rate: float, home: Path, tiny_model: Path, tmp_path: Path
    ) -> None:
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
        shutil.copytree(tiny_model, tmp_path / "base")
        base.save_pretrained(tmp_path / "base")
        data = write_rows(*["The answer is always the same."] * 12)
        job = make_job(tmp_path / "base", data, peft=peft, learning_rate=rate, num_train_epochs=2)
        result = train_here(job, home / "job")
        losses = [loss for _, loss in result["loss_by_step"]]
        assert result["reloaded_loss_difference"] < 0.1 * (losses[0] - losses[-1])
        assert {weight.dtype for weight in load_file(home / "job" / "model.safetensors").values()} == {torch.bfloat16}

    def test_qlora_learns_on_weights_in_4_bit_and_saves_the_very_model_it_trained(
        self, home: Path, tiny_model: Path
    ) -> None:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install -e '.[gpu]')")
        data = write_rows(*["The answer is always the same."] * 12)
        job = make_job(tiny_model, data, peft="qlora", learning_rate=5e-3, num_train_epochs=4)
        result = train_here(job, home / "job")
        losses = [loss for _, loss in result["loss_by_step"]]
        assert losses[-1] < losses[0] - 0.2
        assert result["reloaded_loss_difference"] < 1e-4
        before, after = load_file(tiny_model / "model.safetensors"), load_file(home / "job" / "model.safetensors")
        assert before.keys() == after.keys()
        assert "quantization_config" not in json.loads((home / "job" / "config.json").read_text())


@pytest.mark.slow
class TestProcesses:
    """Real processes, killed with -9 where it matters."""

    def test_a_killed_training_goes_on_to_the_very_same_weights(
        self, home: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as here: in how many parts a sum is made shows in its last bits
        data = write_rows(*NUMBERS * 2)
        settings = {"num_train_epochs": 4, "packing": "grouped", "per_device_train_batch_size": 2, "peft": "lora"}
        undisturbed = train_here(make_job(tiny_model, data, save_steps=0, **settings), home / "whole")
        job = make_job(tiny_model, data, save_steps=7, save_total_limit=1, **settings)
        directory = home / "killed"
        directory.mkdir(parents=True)
        (directory / "job.json").write_text(json.dumps(job))
        command = [sys.executable, "-m", "tasks.jobs.sft", str(directory / "job.json")]
        child = subprocess.Popen(command)
        while not complete_checkpoints(directory / "trainer"):
            time.sleep(0.02)
            assert child.poll() is None, "the training ended before it could be killed"
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not (directory / "result.json").exists()
        (directory / "trainer" / "checkpoint-40").mkdir()  # half written: it has no mark
        reports: list[dict[str, Any]] = []
        python = [sys.executable]  # fresh, as a fork has the threads of its warm process
        resumed = run_job("tasks.jobs.sft", job, directory, launcher=python, on_progress=reports.append)
        assert reports[0]["done"] >= 7
        assert resumed["content"] == undisturbed["content"]
        assert resumed["loss_by_step"] == undisturbed["loss_by_step"]
        assert resumed["tokens"] == undisturbed["tokens"]

    def test_a_failure_is_told_in_one_clear_last_line(self, home: Path, tiny_model: Path) -> None:
        data = write_rows("Yes.", ask="word " * 400)
        with pytest.raises(JobRefused, match=r"^none of 1 rows has a label.*\nWhole log: .*log.txt$"):
            run_job("tasks.jobs.sft", make_job(tiny_model, data, max_length=64), home / "job")


@pytest.mark.parametrize(
    ("reloaded", "trained", "precision", "dtype"),
    [
        (2.0739, 2.0119, "bf16", torch.bfloat16),  # weights rounded by chance
        (0.031, 0.020, "bf16", torch.bfloat16),  # and where next to nothing is left to learn
        (1.5, 2.0, "bf16", torch.bfloat16),
        (2.03, 2.0, "bf16", torch.float32),
        (2.0005, 2.0, "fp32", torch.float32),
    ],
)
def test_what_rounding_costs_is_no_fault_of_saving(
    reloaded: float, trained: float, precision: str, dtype: torch.dtype
) -> None:
    raise_unless_saved(reloaded, trained, precision, dtype)


@pytest.mark.parametrize(
    ("reloaded", "precision", "dtype"),
    [
        (4.0, "bf16", torch.bfloat16),
        (2.2, "bf16", torch.float32),
        (2.1, "fp32", torch.float32),
        (float("nan"), "bf16", torch.bfloat16),
    ],
)
def test_something_else_than_what_was_trained_is_no_student(
    reloaded: float, precision: str, dtype: torch.dtype
) -> None:
    with pytest.raises(TrainingError, match="the saved model has a higher loss"):
        raise_unless_saved(reloaded, 2.0, precision, dtype)


def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for step in (2, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-2" / "complete").touch()
    (tmp_path / "checkpoint-10" / "complete").touch()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]


def test_history_after_the_checkpoint_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert read_history(tmp_path, tmp_path / "checkpoint-2") == [{"step": 1}, {"step": 2}]
    assert read_history(tmp_path, None) == []
