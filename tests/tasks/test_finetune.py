"""What is trained on: rows of any usual form, and only those with an answer."""

from pathlib import Path
from typing import Any

import pytest

from flows.answer import FIGURES
from storage.files import Checkpoint
from storage.pools import read_rows, write_snapshot
from tasks import finetune
from tasks.finetune import FinetuneConfig, NothingToTrainOn, examples_of, finetune_student, train_student
from tasks.jobs.launch import checkpoint_folder
from tasks.jobs.settings import SftSettings, launcher_command
from tasks.models.chat import Reply, Status

MADE = {"left_out": {"no_label": ["a"], "empty": []}, "rows": 1, "validation_rows": 2}


def test_alpaca_and_messages_and_our_own_rows_become_examples() -> None:
    asked = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "?"},
    ]
    records = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"messages": [*asked, {"role": "assistant", "content": "!"}], "id": 7},
        {"instruction_id": "own", "messages": asked, "response": "cut sho", "whole": False},
    ]
    rows = examples_of(((f"file, line {number}", record) for number, record in enumerate(records, 1)), "Be brief.")
    assert [row["instruction_id"] for row in rows] == ["file, line 1", "7", "own"]
    assert [row["response"] for row in rows] == ["3", "!", "cut sho"]
    assert [row["whole"] for row in rows] == [True, True, False]
    assert rows[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add.\n\n1 2"},
    ]
    assert rows[1]["messages"] == rows[2]["messages"] == asked


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Add."},
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"messages": [{"role": "assistant", "content": "Hi"}]},
        {"instruction": "Add.", "output": None},
        "Add.",
    ],
)
def test_a_record_without_an_answer_is_refused_by_its_place(record: Any) -> None:
    with pytest.raises(NothingToTrainOn, match=r"rows\.json, item 3: no answer"):
        examples_of([("rows.json, item 3", record)], None)


def test_an_answer_that_is_null_is_not_told_as_found() -> None:
    failed = {"instruction": "Add.", "input": "", "output": None, "status": "failed"}
    with pytest.raises(NothingToTrainOn, match=r"line 1: no answer to train on \(found: instruction, input, status\)"):
        examples_of([("line 1", failed)], None)


def test_only_whole_good_answers_are_trained_on_and_the_others_are_counted(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = [{"instruction_id": key, "instruction": key, "input": "1 2", "origin": "seed"} for key in "abcde"]
    statuses = {"a": "ok", "b": "truncated", "c": "failed", "d": "ok"}
    answers = [
        {"instruction_id": key, "role": "teacher", "model": "m", "status": status, "prompt_tokens": 1,
         "completion_tokens": 1, "response": None if status == "failed" else "answer"}
        for key, status in statuses.items()
    ]  # fmt: skip
    jobs = []

    def make_checkpoint(module: str, job: dict[str, Any], made_from: dict[str, Any], **options: Any) -> Any:
        jobs.append(made_from)
        return Checkpoint(digest="d", content="c"), MADE

    monkeypatch.setattr(finetune, "make_checkpoint", make_checkpoint)
    inputs = [
        write_snapshot("instructions", pool, step="t", version=1),
        write_snapshot("responses", answers, step="t", version=1),
    ]
    student = Checkpoint(digest="s", content="s")
    trained = finetune_student.fn(FinetuneConfig(), student, *inputs, "Be brief.", 0)
    rows = read_rows(trained.examples)
    assert [(row["instruction_id"], row["response"], row["whole"]) for row in rows] == [
        ("a", "answer", True), ("d", "answer", True)
    ]  # fmt: skip
    assert [said["content"] for said in rows[0]["messages"]] == ["Be brief.", "a\n\n1 2"]
    assert trained.left_out == {"truncated": 1, "failed": 1, "unanswered": 1, "no_label": 1, "validation": 2}
    assert trained.rows == 1

    often = FinetuneConfig.model_validate({"training": {"save_steps": 7, "report_to": ["wandb"]}})
    finetune_student.fn(often, student, *inputs, "Be brief.", 0)
    longer = FinetuneConfig.model_validate({"training": {"max_length": 512}})
    finetune_student.fn(longer, student, *inputs, "Be brief.", 0)
    assert jobs[0] == jobs[1] != jobs[2]

    cut = finetune_student.fn(FinetuneConfig(train_on_truncated=True), student, *inputs, None, 0)
    assert [row["whole"] for row in read_rows(cut.examples)] == [True, False, True], "of b's end nothing is known"
    lost = write_snapshot("responses", answers[2:3], step="t", version=1)
    with pytest.raises(NothingToTrainOn, match="worth training on: 4 unanswered, 1 failed"):
        finetune_student.fn(FinetuneConfig(), student, inputs[0], lost, None, 0)


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Add.", "input": 5, "output": "3"},
        {"messages": [{"role": "usr", "content": "?"}, {"role": "assistant", "content": "!"}]},
        {"messages": [{"content": "?"}, {"role": "assistant", "content": "!"}]},
        {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "!"}]},
        {"messages": [{"role": "user", "content": "?"}, {"role": "tool", "content": "1"}], "response": "!"},
        {"messages": [], "response": "!"},
    ],
)
def test_a_turn_that_is_none_is_named(record: dict[str, Any]) -> None:
    with pytest.raises(NothingToTrainOn, match="line 1: `input` must be a text"):
        examples_of([("line 1", record)], None)


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Add.", "output": "3 \ud83d"},
        {"messages": [{"role": "user", "content": "\udc00?"}, {"role": "assistant", "content": "!"}]},
    ],
)
def test_half_a_character_is_named_by_its_place(record: dict[str, Any]) -> None:
    with pytest.raises(NothingToTrainOn, match="line 1: half of a character"):
        examples_of([("line 1", record)], None)


def test_what_a_trainer_killed_at_its_very_end_left_behind_is_cleared_away(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Checkpoint(digest="d", content="c")
    (made.path / "trainer" / "checkpoint-12").mkdir(parents=True)
    monkeypatch.setattr(finetune, "make_checkpoint", lambda *args, **options: (made, MADE))
    data = write_snapshot("examples", [], step="t", version=1)
    trained = train_student(SftSettings(), Checkpoint(digest="s", content="s"), data, 0)
    assert (trained.checkpoint, trained.left_out) == (made, {"no_label": 1, "validation": 2})
    assert made.path.is_dir() and not (made.path / "trainer").exists()


def test_several_processes_share_the_processors_and_other_machines_are_told_what_to_start(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    asked: list[dict[str, Any]] = []

    def make_checkpoint(module: str, job: dict[str, Any], made_from: dict[str, Any], **options: Any) -> Any:
        asked.append(options | {"folder": checkpoint_folder(module, made_from)})
        return Checkpoint(digest="d", content="c"), MADE

    monkeypatch.setattr(finetune, "make_checkpoint", make_checkpoint)
    monkeypatch.setattr(finetune, "tell", told.append)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    data = write_snapshot("examples", [], step="t", version=1)
    alone = SftSettings(strategy="single")
    both = SftSettings(strategy="ddp", processes_per_node=2, nodes=2, rdzv_endpoint="first:29500")
    for settings in (alone, both):
        train_student(settings, Checkpoint(digest="s", content="s"), data, 0)
    assert [options["environment"] for options in asked] == [{}, {"OMP_NUM_THREADS": "4"}]
    assert [options["launcher"] for options in asked] == [[], launcher_command(both)]
    (said,) = told
    command = " ".join([*launcher_command(both), "-m", "tasks.jobs.sft", str(asked[1]["folder"] / "job.json")])
    assert said.startswith("Waiting for 2 machines") and said.endswith(command)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    train_student(both, Checkpoint(digest="s", content="s"), data, 0)
    assert asked[2]["environment"] == {}, "whoever runs it has chosen"


def test_another_student_other_rows_another_seed_and_another_trainer_are_another_training(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, jobs = [], []

    def make_checkpoint(module: str, job: dict[str, Any], made_from: dict[str, Any], **options: Any) -> Any:
        folders.append(checkpoint_folder(module, made_from))
        jobs.append(job)
        return Checkpoint(digest="d", content="c"), MADE

    monkeypatch.setattr(finetune, "make_checkpoint", make_checkpoint)
    example = {"messages": [{"role": "user", "content": "?"}], "response": "!", "whole": True}
    one, other = (
        write_snapshot("examples", [{"instruction_id": name} | example], step="t", version=1) for name in "ab"
    )
    student, another = (Checkpoint(digest=digest, content=digest) for digest in "st")
    for asked in ((student, one, 0), (another, one, 0), (student, other, 0), (student, one, 1), (student, one, 0)):
        train_student(SftSettings(), *asked)
        assert (jobs[-1]["model"], jobs[-1]["data"], jobs[-1]["seed"]) == (
            str(asked[0].path),
            str(asked[1].path),
            asked[2],
        )
    assert folders[0] == folders[4] and len(set(folders)) == 4
    monkeypatch.setattr(finetune, "VERSION", finetune.VERSION + 1)
    train_student(SftSettings(), student, one, 0)
    assert folders[5] not in folders[:5]


@pytest.mark.parametrize("whole", ["false", 0])
def test_whether_an_answer_is_whole_is_not_guessed(whole: Any) -> None:
    record = {"messages": [{"role": "user", "content": "?"}], "response": "!", "whole": whole}
    with pytest.raises(NothingToTrainOn, match="line 1: `whole` must be true, or false"):
        examples_of([("line 1", record)], None)
    (row,) = examples_of([("line 1", record | {"whole": None})], None)  # as Parquet says that it is not there
    assert row["whole"] is True


def test_an_answer_of_lion_answer_that_was_cut_teaches_no_end() -> None:
    reply = Reply("1", Status.TRUNCATED, "Once upon a", finish_reason="length")
    record = {"instruction": "Tell a tale.", "output": reply.text} | {name: getattr(reply, name) for name in FIGURES}
    (cut,), (whole,) = (examples_of([("line 1", record | {"status": status})], None) for status in ("truncated", "ok"))
    assert (cut["whole"], whole["whole"]) == (False, True)
