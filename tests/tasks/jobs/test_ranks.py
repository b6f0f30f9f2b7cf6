"""One training by two processes: the same as by one, step for step, whatever is shared out between them.

The processes are forks of warm ones, without a launcher: what torchrun adds is in `test_strategies`.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tasks.jobs.dataset import COLLATE, Examples, Order, encode_rows
from tasks.jobs.process import ENVIRONMENT, Process, can_fork, free_port, lines_of, start, start_fork
from tasks.jobs.settings import SftSettings
from tests.tasks.jobs.test_sft import history_of, make_job, train_here, write_rows

RANKS = 2
ANSWERS = [f"{'very ' * (7 * number % 29)}{number}" for number in range(48)]  # batches differ in their labels
TRAINING: dict[str, Any] = {
    "num_train_epochs": 2,
    "global_batch_size": 12,
    "validation_share": 0.21,
    "weight_decay": 0.1,
    "warmup_ratio": 0.3,
}  # 38 rows in fours: a process of the last two has nothing to learn from, and the last of four steps has one batch alone
STRATEGIES = [
    pytest.param({"strategy": "ddp"}, id="ddp"),
    pytest.param({"strategy": "fsdp", "gradient_checkpointing": True}, id="fsdp", marks=pytest.mark.slow),
    pytest.param(  # all rows in each step: in which of them they are depends on the batch of a process
        {"strategy": "deepspeed-zero2", "packing": "packed", "global_batch_size": 40},
        id="zero2",
        marks=pytest.mark.slow,
    ),
    pytest.param({"strategy": "deepspeed-zero3", "packing": "none"}, id="zero3", marks=pytest.mark.slow),
]


def begin(rank: int, port: int, program: str, job_file: Path) -> Process:
    together = {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1"}
    own = {"MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # DeepSpeed wants its ninja
    environment = {**os.environ, **ENVIRONMENT, **together, **own, "PATH": path}
    if can_fork():
        return start_fork(program, str(job_file), environment)
    return start([sys.executable, "-m", program, str(job_file)], environment)


def train_together(job: dict[str, Any], directory: Path, program: str = "tasks.jobs.sft") -> dict[str, Any]:
    """Do a job with two processes; each must end well."""
    directory.mkdir(parents=True, exist_ok=True)
    job_file = directory / "job.json"
    job_file.write_text(json.dumps(job))
    port = free_port()
    ranks = [begin(rank, port, program, job_file) for rank in range(RANKS)]
    with ThreadPoolExecutor(RANKS) as reading:
        try:
            said = list(reading.map(partial(_said_by, ranks), ranks))
        finally:  # also where they wait for each other until the test's time is up
            _terminate(ranks)
    assert [rank.wait() for rank in ranks] == [0] * RANKS, "\n".join(said)
    return json.loads((directory / "result.json").read_text())


def _said_by(ranks: list[Process], rank: Process) -> str:
    """All that a process printed, to its end. One that fails ends the others, which would wait for it."""
    said = "".join(lines_of(rank))
    if rank.wait() != 0:
        _terminate(ranks)
    return said


def _terminate(ranks: list[Process]) -> None:
    for rank in ranks:
        with suppress(ProcessLookupError):
            rank.terminate()


def files_of(directory: Path) -> set[str]:
    """What a training left, but for its job and TensorBoard's file, which has the time in its name."""
    found = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    return {name for name in found if name != "job.json" and not name.startswith("tensorboard/")}


def tokens_computed(job: dict[str, Any], target: Path) -> int:
    """Tokens of all batches of all processes, padding and what fills up the last ones included."""
    settings = SftSettings(**job["config"])
    encode_rows(Path(job["data"]), AutoTokenizer.from_pretrained(job["model"]), 128, target / "rows.arrow")
    examples, _ = Examples(target / "rows.arrow").split(settings.validation_share, job["seed"])
    order, count = Order(examples, settings, job["seed"]), 0
    for epoch in range(int(settings.num_train_epochs)):
        order.set_epoch(epoch)
        for batch in np.array(list(order)).reshape(-1, settings.per_device_train_batch_size):
            rows = [examples[int(place)] for place in batch]
            count += COLLATE[settings.packing](rows)["input_ids"].numel()
    return count


@pytest.mark.parametrize("settings", STRATEGIES)
def test_two_processes_train_as_one_does_with_the_same_batch(
    settings: dict[str, Any], home: Path, tiny_model: Path
) -> None:
    data = write_rows(*ANSWERS)
    alone = make_job(tiny_model, data, **TRAINING | settings | {"strategy": "single", "per_device_train_batch_size": 4})
    both = {"processes_per_node": RANKS, "per_device_train_batch_size": 2}
    job = make_job(tiny_model, data, **TRAINING | settings | both)
    expected, result = train_here(alone, home / "alone"), train_together(job, home / "both")

    assert (result["rows"], result["validation_rows"], result["world_size"]) == (38, 10, RANKS)
    assert result["steps"] == expected["steps"]
    for told, step in zip(history_of(home / "both"), history_of(home / "alone"), strict=True):
        for name in ("step", "epoch", "learning_rate", "tokens"):
            assert told[name] == step[name], name
        assert told["loss"] == pytest.approx(step["loss"], abs=1e-5)
        assert told["grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-4)
    assert result["padded_tokens"] == tokens_computed(job, home)
    for name in ("train_loss", "validation_loss"):
        assert result[name] == pytest.approx(expected[name], abs=1e-5), name
    assert result["reloaded_loss_difference"] < 1e-5
    weights = load_file(home / "alone" / "model.safetensors")
    for name, weight in load_file(home / "both" / "model.safetensors").items():
        np.testing.assert_allclose(weight, weights.pop(name), rtol=0, atol=2e-5, err_msg=name)
    assert not weights
    assert files_of(home / "both") == files_of(home / "alone")


def test_processes_wait_for_the_rows_each_part_of_a_checkpoint_and_the_result_and_one_of_them_removes(
    home: Path, tiny_model: Path
) -> None:
    settings = {"strategy": "ddp", "processes_per_node": RANKS, "per_device_train_batch_size": 2}
    settings |= {"save_steps": 1, "save_total_limit": 1}
    train_together(
        make_job(tiny_model, write_rows(*ANSWERS[:8]), **settings), home / "job", program="tests.tasks.jobs.late"
    )
