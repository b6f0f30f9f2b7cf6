"""Shards are task runs of a flow, in threads or on Ray: the same answers, killed or not, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import TaskRun

from flows.config import resolve
from flows.terminal import prepare_for_a_flow
from tasks.jobs.launch import RUNNER, run_together
from tasks.shards import check_is_there, shards_by
from tests.lion import environment, processes_of
from tests.recorded import checkpoint
from tests.sharded import student, texts

ROOT = Path(__file__).parents[2]
ROWS = 300  # answered two at a time: long enough to be killed in the midst of


@pytest.fixture(autouse=True)
def model(home: Path, tiny_model: Path) -> None:
    checkpoint("tiny", tiny_model)


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests define, and what they write into their folder, can be imported in Ray's workers, too."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))


@pytest.fixture
def ray(importable: None) -> Iterator[None]:
    """A Ray of two processors, and of two GPUs that it only believes to have."""
    pytest.importorskip("prefect_ray")
    import ray

    ray.init("local", num_cpus=2, num_gpus=2, include_dashboard=False)
    yield
    ray.shutdown()


def answered(task_runner: str, shards: int, count: int) -> tuple[list[str | None], list[TaskRun]]:
    """What the flow answers, and its task runs, which reach a server a while after they ended."""
    state = student(task_runner, shards, count, return_state=True)  # type: ignore[call-overload]
    texts, of_this_flow = state.result(), FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        for _ in range(100):
            runs = client.read_task_runs(flow_run_filter=of_this_flow)
            if len(runs) == 1 + shards and all(run.state and run.state.is_completed() for run in runs):
                return texts, runs
            time.sleep(0.2)
    raise AssertionError(runs)


def start(home: Path, task_runner: str, shards: int, count: int) -> "subprocess.Popen[bytes]":
    """The flow in a process of its own, ours to kill."""
    command = [sys.executable, "-m", "tests.sharded", task_runner, str(shards), str(count)]
    return subprocess.Popen(command, cwd=ROOT, env=environment(home), stderr=subprocess.DEVNULL)


def written(home: Path) -> dict[Path, bytes]:
    """The replies of each shard, the line left out that may be half written."""
    found = {path: path.read_bytes() for path in (home / "jobs").glob("*/replies.jsonl")}
    return {path: whole[: whole.rfind(b"\n") + 1] for path, whole in found.items()}


def test_shards_in_a_flow_are_task_runs_and_answer_as_one(home: Path) -> None:
    answers, runs = answered("threads", 3, 40)
    assert answers == texts(1, 40)
    stage, *shards = sorted(run.name for run in runs)
    assert shards == [f"{stage} · shard {number} of 3" for number in (1, 2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("task_runner", ["threads", "ray"])
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_killed_in_the_midst_of_its_shards_a_stage_goes_on_with_what_each_had_written(
    home: Path, importable: None, task_runner: str, ending: signal.Signals
) -> None:
    if task_runner == "ray":
        pytest.importorskip("prefect_ray")
    child = start(home, task_runner, 2, ROWS)
    while len(begun := written(home)) < 2 or not all(begun.values()):
        time.sleep(0.05)
        assert child.poll() is None
    child.send_signal(ending)
    assert 0 < sum(lines.count(b"\n") for lines in begun.values()) < ROWS
    assert child.wait(timeout=60) != 0
    for _ in range(600):  # Ray takes a while to notice that the flow is gone, and its shards go on until then
        if not (
            left := [command for command in processes_of(home) if "tasks.jobs" in command or "ray::shard" in command]
        ):
            break
        time.sleep(0.1)
    assert not left
    before = written(home)
    answers = student(task_runner, 2, ROWS)
    assert all(path.read_bytes().startswith(lines) for path, lines in before.items())
    assert answers == texts(1, ROWS)
    prepare_for_a_flow()


@pytest.mark.slow
def test_on_a_local_ray_of_two_workers_the_rows_are_the_same(home: Path, ray: None) -> None:
    answers, runs = answered("ray", 2, 40)
    assert answers == texts(1, 40)
    stage, *shards = sorted(run.name for run in runs)
    assert shards == [f"{stage} · shard {number} of 2" for number in (1, 2)]


@flow
def run_two(task_runner: str, folder: Path, on_progress: Callable[[dict[str, int]], None]) -> int:
    """Two shards of a program, and how many devices there are for them."""
    with shards_by(task_runner):  # type: ignore[arg-type]
        run_together("a_job", [({}, folder / "first"), ({}, folder / "second")], 1, on_progress)
        return RUNNER.get().devices(1)


A_JOB = """
import os, sys, time
from pathlib import Path
from tasks.jobs.launch import finish, report_progress
report_progress(1, 2)
"""
BOTH_AT_ONCE = """
own = Path(sys.argv[1]).parent
(own / "begun").touch()
while len(list(own.parent.glob("*/begun"))) < 2:
    time.sleep(0.05)
finish(own, {"gpus": os.environ["CUDA_VISIBLE_DEVICES"]})
"""


@pytest.mark.slow
def test_on_ray_each_shard_has_the_gpus_that_ray_gave_it(tmp_path: Path, ray: None) -> None:
    (tmp_path / "a_job.py").write_text(A_JOB + BOTH_AT_ONCE)
    assert run_two("ray", tmp_path, lambda report: None) == 2
    results = [json.loads((tmp_path / folder / "result.json").read_text()) for folder in ("first", "second")]
    assert {result["gpus"] for result in results} == {"0", "1"}


@pytest.mark.parametrize("task_runner", ["threads", pytest.param("ray", marks=pytest.mark.slow)])
def test_when_nobody_waits_any_more_shards_end_at_once(
    home: Path, tmp_path: Path, task_runner: str, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("importable" if task_runner == "threads" else "ray")
    (tmp_path / "a_job.py").write_text(A_JOB + "time.sleep(600)")

    def leave(report: dict[str, int]) -> None:
        if report["done"] == 2:  # both are at work
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_two(task_runner, tmp_path, leave)
    for _ in range(100):
        if not (left := [command for command in processes_of(home) if "a_job" in command]):
            break
        time.sleep(0.1)
    assert not left


def test_ray_that_is_not_installed_is_one_message(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "prefect_ray", None)
        with pytest.raises(ValueError, match=r"task_runner: ray needs pip install -e '\.\[ray\]'"):
            check_is_there("ray")
    code = "import sys; sys.modules['prefect_ray'] = None; from flows.cli import main; main()"
    command = [sys.executable, "-c", code, "run", "--preset", "smoke", "--set", "task_runner=ray"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path / "other"))
    assert (done.returncode, done.stderr.strip()) == (2, "error: task_runner: ray needs pip install -e '.[ray]'")
    assert not (tmp_path / "other" / "runs").exists()


def test_who_runs_the_shards_is_no_part_of_a_run() -> None:
    assert resolve("smoke", ["task_runner=ray"]).run_id == resolve("smoke").run_id
