"""`lion finetune`: this stage alone, on a file of one's own."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.lion import lion
from tests.recorded import checkpoint

ROWS = [
    {"instruction": "word " * 400, "input": "", "output": "The prompt alone fills the length."},
    {"instruction": "Say nothing.", "input": "", "output": " \n"},
    {"instruction": "Say x often.", "input": "", "output": "x" * 100_000},
    {"messages": [{"role": "user", "content": "Say one."}, {"role": "assistant", "content": "One."}]},
    *({"instruction": f"Say {number}.", "input": "", "output": f"The number {number}."} for number in range(8)),
]


def test_a_file_without_a_row_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("\n")
    done = lion(tmp_path, "finetune", "--preset", "smoke", f"--data={tmp_path / 'none.jsonl'}", code=2)
    assert "none.jsonl: no row in it, so nothing to train on." in done.stderr


@pytest.mark.slow
def test_the_right_rows_are_trained_and_the_others_named(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    student = f"--set=student.model.model_name_or_path={tiny_model}"
    command = ["finetune", "--preset", "smoke", student, f"--data={tmp_path / 'rows.jsonl'}"]
    done = lion(tmp_path / "home", *command, f"--out={tmp_path / 'model'}")
    assert "not trained on, no_label: " in done.stderr and "rows.jsonl, line 1\n" in done.stderr
    assert "not trained on, empty: " in done.stderr and "rows.jsonl, line 2\n" in done.stderr
    assert "1 answers were cut at 128 tokens" in done.stderr
    result = json.loads((tmp_path / "model" / "result.json").read_text())
    assert (result["rows"], result["steps"]) == (10, 3)
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    again = lion(tmp_path / "home", *command)
    assert again.stdout.split("\n")[:-2] == done.stdout.split("\n")[:-2]  # found, not trained again: the same seconds


def test_a_model_is_at_its_place_once_it_is_copied_whole(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import commands_training, finetune

    figures = dict.fromkeys(("rows", "steps", "train_loss", "validation_rows", "validation_loss", "tokens"), 0)
    figures |= dict.fromkeys(("padding_share", "tokens_per_second", "seconds"), 0)
    trained = SimpleNamespace(checkpoint=checkpoint("trained"), figures=figures | {"left_out": {}, "cut": []})
    monkeypatch.setattr(finetune, "finetune_on_file", lambda *_: trained)

    def fills_the_disk(source: Path, target: Path, **_: object) -> None:
        target.mkdir(exist_ok=True)
        shutil.copy(source / "config.json", target)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full, pytest.raises(OSError, match="No space"):
        full.setattr(shutil, "copytree", fills_the_disk)
        commands_training.finetune("rows.jsonl", "smoke", copy_to=tmp_path / "model")
    assert list(tmp_path.iterdir()) == [home], "half a model is none"
    commands_training.finetune("rows.jsonl", "smoke", copy_to=tmp_path / "model")
    assert {file.name for file in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}


def test_a_file_without_answers_is_refused_by_its_place(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"instruction": "Say it."}]')
    done = lion(tmp_path, "finetune", "--preset", "smoke", f"--data={tmp_path / 'rows.json'}", code=2)
    assert "rows.json, item 1: no answer to train on (found: instruction)" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in fp16")
def test_a_setting_that_only_the_trainer_can_judge_is_refused_as_any_other(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[3:]))
    student = f"--set=student.model.model_name_or_path={tiny_model}"
    settings = [student, "--set=finetune.training.precision=fp16", f"--data={tmp_path / 'rows.json'}"]
    done = lion(tmp_path, "finetune", "--preset", "smoke", *settings, code=2)
    assert done.stderr.count("error: precision: fp16 needs a GPU; on this CPU take auto, bf16 or fp32") == 1
    assert "goes on from here" not in done.stderr
