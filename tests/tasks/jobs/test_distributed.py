"""What a training finds of those before it, and what it takes its strategy for."""

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from tasks.jobs.distributed import (
    SettingsError,
    _deepspeed_config,
    _fsdp_config,
    choose_device,
    choose_precision,
    drop_dead_build_locks,
    raise_unless_sharded,
    training_arguments,
)
from tasks.jobs.settings import SftSettings


def test_a_compilation_that_was_killed_keeps_no_later_training_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    now = time.time()
    locks = {name: tmp_path / name / "lock" for name in ("killed", "ours", "at_work")}
    for name, lock in locks.items():
        lock.parent.mkdir()
        lock.touch()
        age = -1 if name == "ours" else 600
        os.utime(lock, (now - age, now - age))
    compiler = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"], cwd=tmp_path / "at_work", stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    with compiler:
        assert compiler.stdout is not None
        compiler.stdout.readline()
        drop_dead_build_locks(began=now)
        compiler.communicate(b"\n")
    assert {name for name, lock in locks.items() if lock.exists()} == {"ours", "at_work"}


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    settings = SftSettings(strategy="ddp", processes_per_node=4)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device(settings) == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        SettingsError, match="4 processes need as many GPUs, and here are 2: set processes_per_node to 2"
    ):
        choose_device(settings)


def test_a_single_process_takes_the_first_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for before, after in (("3,5", "3"), (None, "0")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if before:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
        assert choose_device(SftSettings()) == torch.device("cuda", 0)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == after
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    choose_device(SftSettings(strategy="ddp", processes_per_node=2))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"


def test_the_trainer_is_told_what_the_settings_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    settings = SftSettings(
        per_device_train_batch_size=3, global_batch_size=12, num_train_epochs=1.5, learning_rate=3e-4,
        lr_scheduler_type="linear", warmup_ratio=0.25, weight_decay=0.125, max_grad_norm=0.5,
        gradient_checkpointing=True, save_steps=7, report_to=("trackio",),
    )  # fmt: skip
    told = training_arguments(settings, tmp_path, torch.device("cpu"), "bf16", 11, False)
    for name in ("per_device_train_batch_size", "num_train_epochs", "learning_rate", "weight_decay", "max_grad_norm"):
        assert getattr(told, name) == getattr(settings, name), name
    assert (told.gradient_accumulation_steps, told.lr_scheduler_type, told.get_warmup_steps(100)) == (4, "linear", 25)
    assert (told.seed, told.data_seed, told.bf16, told.fp16, told.logging_nan_inf_filter) == (
        11,
        11,
        True,
        False,
        False,
    )
    assert (told.save_strategy, told.save_steps, told.activation_checkpointing) == ("steps", 7, True)
    assert told.report_to == ["tensorboard", "trackio"] and told.output_dir == str(tmp_path / "trainer")
    never = training_arguments(SftSettings(save_steps=0), tmp_path, torch.device("cpu"), "fp32", 0, False)
    assert (never.save_strategy, never.bf16, never.activation_checkpointing) == ("no", False, False)


def test_what_waits_in_the_hosts_memory_is_what_offload_says() -> None:
    def told(**settings: Any) -> dict[str, Any]:
        return _deepspeed_config(SftSettings(**settings))

    for strategy, stage in (("deepspeed-zero2", 2), ("deepspeed-zero3", 3)):
        nothing, optimizer = told(strategy=strategy), told(strategy=strategy, offload="optimizer")
        assert nothing["zero_optimization"]["stage"] == stage
        assert not {"offload_optimizer", "offload_param"} & nothing["zero_optimization"].keys()
        assert "optimizer" not in nothing and optimizer["optimizer"]["type"] == "AdamW"
        assert optimizer["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
        assert "offload_param" not in optimizer["zero_optimization"]
        assert nothing["data_types"] == optimizer["data_types"] == {"grad_accum_dtype": "fp32"}
    parameters = told(strategy="deepspeed-zero3", offload="parameters")["zero_optimization"]
    assert {parameters[name]["device"] for name in ("offload_optimizer", "offload_param")} == {"cpu"}
    assert parameters["stage3_gather_16bit_weights_on_model_save"] is True
    sharded = [_fsdp_config(SftSettings(strategy="fsdp", offload=offload)) for offload in ("none", "parameters")]
    assert [config["cpu_offload"] for config in sharded] == [False, True]


def test_fsdp_shares_out_layer_by_layer_and_computes_activations_twice_where_it_shall() -> None:
    for twice in (True, False):
        told = _fsdp_config(SftSettings(strategy="fsdp", gradient_checkpointing=twice))
        assert told["activation_checkpointing"] is twice
        assert (told["version"], told["auto_wrap_policy"]) == (2, "TRANSFORMER_BASED_WRAP")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp16"}, "on this CPU take auto, bf16 or fp32"),
        ({"strategy": "fsdp", "offload": "parameters"}, "on this CPU take offload: none"),
    ],
)
def test_what_a_cpu_cannot_do_is_refused_with_the_way_out(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        choose_precision(SftSettings(**settings), torch.device("cpu"))


def test_a_precision_that_was_asked_for_is_kept() -> None:
    cpu = torch.device("cpu")
    assert [choose_precision(SftSettings(precision=asked), cpu) for asked in ("bf16", "fp32")] == ["bf16", "fp32"]
    assert (
        choose_precision(SftSettings(strategy="deepspeed-zero3", offload="parameters", precision="bf16"), cpu) == "bf16"
    )
    assert choose_precision(SftSettings(precision="fp16"), torch.device("cuda")) == "fp16"


def test_processes_of_our_own_group_wait_as_long_as_in_accelerates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Made(Exception):
        pass

    def make(*_: str, timeout: timedelta) -> None:
        assert timeout.total_seconds() == TrainingArguments(tmp_path, use_cpu=True).ddp_timeout
        raise Made

    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", make)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    with pytest.raises(Made):
        training_arguments(
            SftSettings(strategy="fsdp", offload="parameters"), tmp_path, torch.device("cuda", 0), "bf16", 0, False
        )


def test_a_strategy_that_did_not_take_hold_is_refused() -> None:
    plain = torch.nn.Linear(1, 1)
    raise_unless_sharded(SftSettings(), plain)
    raise_unless_sharded(SftSettings(strategy="ddp"), plain)  # alone on a GPU it is not wrapped
    for settings in (
        {"strategy": "ddp", "processes_per_node": 2},
        {"strategy": "fsdp"},
        {"strategy": "deepspeed-zero3"},
    ):
        with pytest.raises(SettingsError, match=f"{settings['strategy']} did not take hold; the model is a Linear"):
            raise_unless_sharded(SftSettings(**settings), plain)
