"""A local model's rows are shared among processes: the same answers in any number of them."""

from pathlib import Path
from typing import Any

import pytest

from storage.files import Checkpoint
from tasks.jobs.launch import JobError
from tasks.jobs.process import gpus
from tasks.models.chat import Sampling
from tasks.models.local import LocalModel, answer_locally, infer
from tests.tiny import requests

SAMPLED = Sampling(temperature=0.8, max_tokens=8)


def in_shards(shards: int, count: int, checkpoint: Checkpoint) -> list[str | None]:
    settings = LocalModel(precision="fp32", shards=shards)
    replies = answer_locally(settings, checkpoint, requests(count), SAMPLED, seed=3, on_progress=lambda *_: None)
    assert [reply.id for reply in replies] == [str(number) for number in range(count)]
    return [reply.text for reply in replies]


def folders(home: Path) -> int:
    return len(list((home / "jobs").iterdir()))


def test_one_shard_and_three_give_the_same_answers(home: Path, checkpoint: Checkpoint) -> None:
    assert in_shards(3, 40, checkpoint) == in_shards(1, 40, checkpoint)
    assert folders(home) == 4


def test_no_shard_is_empty(home: Path, checkpoint: Checkpoint) -> None:
    assert all(in_shards(8, 3, checkpoint))
    assert folders(home) == 3


@pytest.mark.parametrize(("rows", "sizes"), [(5, [1] * 5), (1007, [126] * 7 + [125])])
def test_rows_are_split_evenly_among_eight_devices(
    rows: int, sizes: list[int], home: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    settings, sampling = LocalModel(engine="transformers", precision="fp32"), Sampling(max_tokens=1)
    replies = answer_locally(settings, checkpoint, requests(rows), sampling, seed=0, on_progress=lambda *_: None)
    assert [reply.id for reply in replies] == [str(number) for number in range(rows)]
    written = [path.read_text().count("\n") for path in (home / "jobs").glob("*/replies.jsonl")]
    assert sorted(written, reverse=True) == sizes


def test_progress_of_all_shards_is_one(checkpoint: Checkpoint) -> None:
    seen: list[tuple[int, int, dict[str, Any]]] = []
    given = [{"id": "x", "messages": [{"role": "user", "content": "Say it."}], "answer": "It.", "whole": True}]
    settings = LocalModel(precision="fp32", shards=2)
    replies, scores = infer(
        settings, checkpoint, requests(3), given, SAMPLED, seed=0, on_progress=lambda *told: seen.append(told)
    )
    assert (len(replies), len(scores)) == (3, 1)
    assert seen[-1][:2] == (4, 4)


def test_a_shard_that_fails_is_told_and_the_others_are_not_made_again(home: Path, checkpoint: Checkpoint) -> None:
    in_shards(2, 4, checkpoint)
    broken = sorted((home / "jobs").iterdir())[0]
    (broken / "result.json").unlink()
    (broken / "replies.jsonl").unlink()
    (broken / "replies.jsonl").mkdir()
    whole = {path: path.stat().st_mtime_ns for path in (home / "jobs").glob("*/result.json")}
    with pytest.raises(JobError, match=r"IsADirectoryError"):
        in_shards(2, 4, checkpoint)
    assert whole == {path: path.stat().st_mtime_ns for path in (home / "jobs").glob("*/result.json")}


def test_the_gpus_are_those_that_one_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert gpus() == ["2", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus() == []
