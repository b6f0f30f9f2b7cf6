"""The trainer, with a first process that is late with the rows, and a second one that is late with its part of a checkpoint
and removes nothing."""

import os
import runpy
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from tasks.jobs import dataset, trainer

FIRST = os.environ["RANK"] == "0"
encode, save, remove = dataset.encode_rows, trainer.Trainer._save_rng_state, shutil.rmtree


def encode_late(data: Path, tokenizer: Any, max_length: int, target: Path) -> dict[str, Any]:
    if FIRST:
        time.sleep(1)
    else:
        assert target.with_suffix(".json").exists(), "rows are read that are not there yet"
    return encode(data, tokenizer, max_length, target)


def save_late(self: Any, folder: str) -> None:
    if not FIRST:
        time.sleep(1)
        assert not (Path(folder) / "complete").exists(), "a checkpoint is said to be complete that is not"
    save(self, folder)


def remove_once(path: Path, *options: Any, **more: Any) -> None:
    assert FIRST or "trainer" not in Path(path).parts, "every process removes what the first one does"
    remove(path, *options, **more)


if __name__ == "__main__":
    dataset.encode_rows, trainer.Trainer._save_rng_state, shutil.rmtree = encode_late, save_late, remove_once
    runpy.run_module("tasks.jobs.sft", run_name="__main__", alter_sys=True)
    assert FIRST or Path(sys.argv[1]).with_name("result.json").exists(), "a process left before there was a result"
