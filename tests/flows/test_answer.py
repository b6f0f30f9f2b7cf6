"""`lion answer`: inference alone, on a file of one's own."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from flows.answer import read_asked
from tasks.seed import SeedError, read_seeds
from tests.lion import COMMAND, environment, lion

ROWS = [
    {"instruction": "Name a bird.", "input": "", "source": "mine"},
    {"messages": [{"role": "user", "content": "Name a tree."}, {"role": "assistant", "content": "An oak."}]},
    {"instruction": "Name a bird.", "input": "", "messages": None},  # as every row of such a Parquet file has it
    {"instruction": "Name a bird.", "input": "", "messages": "none yet"},  # a column of somebody's own
    {"instruction": "word " * 600},
]


def test_every_row_has_its_answer_in_the_form_it_came_in(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = ["answer", f"--model={tiny_model}", f"--data={tmp_path / 'rows.jsonl'}", "--max-tokens=8"]
    done = lion(tmp_path / "home", *command, f"--out={tmp_path / 'out.jsonl'}")
    first, second, third, own, fourth = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert (first["source"], first["completion_tokens"]) == ("mine", third["completion_tokens"])
    assert first["output"] == third["output"] == own["output"] and own["messages"] == "none yet"
    assert [said["role"] for said in second["messages"]] == ["user", "assistant"]
    assert second["messages"][1]["content"] != "An oak."
    assert (fourth["output"], fourth["status"]) == (None, "failed")
    assert "fit into the context" in fourth["error"]
    assert "1 failed" in done.stderr and "turns" not in done.stderr
    lion(tmp_path / "home", *command, f"--out={tmp_path / 'out.json'}", "--set=shards=2")
    assert len(read_seeds(str(tmp_path / "out.json")).rows) == 3


def test_turns_that_are_not_asked_are_told(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{"question_id": 1, "turns": ["Name a bird.", "Name another."]}, {"question_id": 2, "turns": ["Sing."]}]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["answer", f"--model={tiny_model}", f"--data={tmp_path / 'question.jsonl'}", "--max-tokens=8"]
    done = lion(tmp_path / "home", *command, f"--out={tmp_path / 'out.jsonl'}")
    assert "several `turns`: 1. The first is asked alone; lion evaluate" in done.stderr


def test_an_answer_is_the_same_in_a_locale_that_is_not_utf8(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "rows.txt").write_text("Größe des Ätna?\n中文 是什么?\n", encoding="utf-8")
    command = ["answer", f"--model={tiny_model}", f"--data={tmp_path / 'rows.txt'}", "--max-tokens=24"]
    lion(tmp_path / "home", *command, f"--out={tmp_path / 'utf8.jsonl'}")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run(
        [*COMMAND, *command, f"--out={tmp_path / 'other.jsonl'}"],
        env=environment(tmp_path / "other") | ascii_only, check=True, capture_output=True,
    )  # fmt: skip
    answered = (tmp_path / "utf8.jsonl").read_bytes()
    assert not answered.isascii() and (tmp_path / "other.jsonl").read_bytes() == answered


def test_what_cannot_be_written_or_read_is_refused_before_a_model_is_fetched(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "rows.txt").write_text("Say it.\n")
    data, there = f"--data={tmp_path / 'rows.txt'}", tmp_path / "there.jsonl"
    there.touch()
    command = ["answer", "--model=nobody/nothing", data]
    assert "there already" in lion(tmp_path, *command, f"--out={there}", code=2).stderr
    assert ".jsonl, .json" in lion(tmp_path, *command, "--out=answers.doc", code=2).stderr
    alone = lion(
        tmp_path,
        "answer",
        f"--model={tiny_model}",
        data,
        f"--out={tmp_path / 'new.json'}",
        "--set=engine=openai",
        code=2,
    )
    assert "go together" in alone.stderr and "given" not in alone.stderr
    gone = f"--data={tmp_path / 'gone.txt'}"
    assert "no such file" in lion(tmp_path, "answer", gone, f"--out={tmp_path / 'new.json'}", code=2).stderr


USER = {"role": "user", "content": "Name a bird."}


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"messages": "Say it."}, "no message of the role `user`"),
        ({"messages": [{"role": "assistant", "content": "It."}]}, "no message of the role `user`"),
        ({"messages": [USER, {"role": "assistant", "content": None}, USER]}, "a text as `content`"),
        ({"messages": [USER, {"role": "user", "content": [{"type": "text", "text": "A tree."}]}]}, "a text as `content`"),
        ({"messages": [USER, {"role": "tool", "content": "3"}]}, "a `role` (system, user, assistant)"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_put_to_no_model(tmp_path: Path, record: dict[str, Any], why: str) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [{"messages": [USER]}, record])))
    with pytest.raises(SeedError) as refused:
        read_asked(str(tmp_path / "rows.jsonl"))
    assert "rows.jsonl, line 2: " in str(refused.value) and why in str(refused.value)
