"""The trainer: what it learns from, what it leaves out, and that the same job gives the same weights."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from storage.pools import write_snapshot
from tasks.jobs.launch import JobError, run_job
from tasks.jobs.settings import SftSettings
from tasks.jobs.sft import IGNORE, Examples, SftTrainer, collate, last_complete
from tasks.jobs.template import end_of_turn


def examples(*answers: str, ask: str = "Say something about the number") -> Path:
    rows = [
        {
            "instruction_id": f"row-{number}",
            "messages": [{"role": "user", "content": f"{ask} {number}."}],
            "response": answer,
            "whole": True,
        }
        for number, answer in enumerate(answers)
    ]
    return write_snapshot("examples", rows, step="test", version=1).path


def job(model: Path, data: Path, **settings: Any) -> dict[str, Any]:
    given = {"num_train_epochs": 1, "global_batch_size": 2, "per_device_train_batch_size": 2, "max_length": 128}
    config = SftSettings(**(given | {"learning_rate": 1e-3} | settings))
    return {"model": str(model), "data": str(data), "config": config.model_dump(mode="json"), "seed": 0}


def test_end_of_turn_is_in_the_loss_even_when_pad_is_eos(home: Path, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    rows = Examples(str(examples("Short.", "A much longer answer than the other one.")), tokenizer, 128)
    batch = collate([rows[0], rows[1]])
    end = end_of_turn(tokenizer)
    for place in range(2):
        labelled = batch["labels"][place][batch["labels"][place] != IGNORE]
        assert labelled[-1] == end
        assert batch["attention_mask"][place].sum() == len(rows[place]["input_ids"])


def test_a_prompt_that_fills_the_length_is_left_out_by_name(home: Path, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = Examples(str(examples("Yes.", "No.", ask="word " * 400)), tokenizer, 64)
    assert len(rows) == 0
    assert rows.no_label == ["row-0", "row-1"]


def test_a_very_long_answer_is_cut_and_named(home: Path, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = Examples(str(examples("Yes.", "word " * 20_000)), tokenizer, 64)
    assert rows.cut == ["row-1"]
    assert max(rows.lengths) == 64


def test_the_loss_is_that_of_the_model_itself(home: Path, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    rows = Examples(str(examples("Short.", "A longer answer, with more words.")), tokenizer, 128)
    batch = collate([rows[0], rows[1]])
    trainer = object.__new__(SftTrainer)
    ours = trainer.compute_loss(model, dict(batch))
    torch.testing.assert_close(ours, model(**batch).loss, atol=1e-5, rtol=1e-5)


def test_training_lowers_the_loss_and_the_same_job_gives_the_same_weights(home: Path, tiny_model: Path) -> None:
    data = examples(*["The answer is always the same."] * 12)
    results = [run_job("tasks.jobs.sft", job(tiny_model, data, num_train_epochs=4), home / name) for name in ("a", "b")]
    losses = [loss for _, loss in results[0]["loss_by_step"]]
    assert losses[-1] < losses[0] - 0.5
    assert results[0]["content"] == results[1]["content"]


def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for step in (2, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-2" / "complete").touch()
    (tmp_path / "checkpoint-10" / "complete").touch()
    assert last_complete(tmp_path) == str(tmp_path / "checkpoint-10")


def test_a_killed_training_goes_on_to_the_same_weights(home: Path, tiny_model: Path) -> None:
    data = examples(*[f"The answer is {number}." for number in range(24)])
    settings = job(tiny_model, data, num_train_epochs=4, save_steps=6)
    undisturbed = run_job("tasks.jobs.sft", settings, home / "whole")
    directory = home / "killed"
    directory.mkdir(parents=True)
    (directory / "job.json").write_text(json.dumps(settings))
    child = subprocess.Popen(
        [sys.executable, "-m", "tasks.jobs.sft", str(directory / "job.json")], env=os.environ.copy()
    )
    while not list(directory.glob("trainer/checkpoint-*/complete")):
        time.sleep(0.02)
        assert child.poll() is None, "the training ended before it could be killed"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (directory / "result.json").exists()
    resumed = run_job("tasks.jobs.sft", settings, directory)
    assert resumed["content"] == undisturbed["content"]


def test_nothing_to_learn_from_ends_the_job_with_one_clear_line(home: Path, tiny_model: Path) -> None:
    data = examples("Yes.", ask="word " * 400)
    with pytest.raises(JobError, match="none of 1 rows has a label"):
        run_job("tasks.jobs.sft", job(tiny_model, data, max_length=64), home / "job")


def test_batch_sizes_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="no multiple of the 3 rows"):
        SftSettings(global_batch_size=8, per_device_train_batch_size=3)
