"""Who runs the shards of a local model: within a flow each is a task run, in threads here or on Ray.

A shard's folder is its cache, and the stage that asks owns the retry: the task has neither. What a shard is told is plain
data, and what it makes is in its folder, so that it may run in another process, or on another machine that has the same
home under the same path.

Knows nothing of what a shard does: see `tasks/jobs/launch.py`.
"""

import importlib.util
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

from prefect import Flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext, TaskRunContext
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.jobs.launch import RUNNER, Pending, Threads, run_shard

TaskRunner = Literal["threads", "ray"]

as_task = task(name="shard", cache_policy=NO_CACHE, persist_result=False)(run_shard)


class Tasks(Threads):
    """Runs shards as tasks of the flow, in its task runner, whose threads are this process's."""

    def submit(self, place: int, count: int, gpus_each: int, job: tuple[str, dict[str, Any], str]) -> Pending:
        stage = TaskRunContext.get()
        name = f"{stage.task_run.name} · shard {place + 1} of {count}" if stage else f"shard {place + 1} of {count}"
        return as_task.with_options(task_run_name=name).submit(*job, self.environment(place, gpus_each))


class RayTasks(Tasks):
    """Runs shards as tasks on Ray, which gives each its GPUs, and without any its share of the processors."""

    here = False  # the GPU may be on another machine than this process

    def devices(self, gpus_each: int) -> int:
        return sum(count // gpus_each for count in self._on_each_node("GPU"))

    def submit(self, place: int, count: int, gpus_each: int, job: tuple[str, dict[str, Any], str]) -> Pending:
        from prefect_ray.context import remote_options

        given: dict[str, Any] = {"num_gpus": gpus_each} if self.devices(gpus_each) else {"num_cpus": self._share(count)}
        server = {PREFECT_API_URL: str(get_client(sync_client=True).api_url)}  # a temporary one is in no setting
        with remote_options(max_retries=0, **given), temporary_settings(server), _bare_flow():
            return super().submit(place, count, gpus_each, job)

    def cancel(self, shards: Sequence[Any]) -> None:
        import ray

        for shard in shards:
            ray.cancel(shard.wrapped_future, force=True)  # the worker ends, and its child with it

    def environment(self, place: int, gpus_each: int) -> dict[str, str]:
        return {}  # a worker's environment says which GPUs Ray gave it

    def _share(self, count: int) -> int:
        """Processors for each of so many shards: by Ray's default a shard alone would compute with one thread."""
        nodes = [processors for processors in self._on_each_node("CPU") if processors]
        return max(1, min(nodes) // -(-count // len(nodes)))

    def _on_each_node(self, resource: str) -> list[int]:
        import ray

        return [int(node["Resources"].get(resource, 0)) for node in ray.nodes() if node["Alive"]]


def check_is_there(task_runner: TaskRunner) -> None:
    """Check that what a task runner needs is installed.

    Raises:
        ValueError: it is not; says how to install it.
    """
    if task_runner == "ray" and importlib.util.find_spec("prefect_ray") is None:
        raise ValueError("task_runner: ray needs pip install -e '.[ray]'")


@contextmanager
def shards_by(task_runner: TaskRunner) -> Iterator[None]:
    """Within the block, which is in a flow, the shards of a local model are task runs of that flow.

    Raises:
        ValueError: as for `check_is_there`.
    """
    check_is_there(task_runner)
    with _ray() if task_runner == "ray" else nullcontext():
        token = RUNNER.set(RayTasks() if task_runner == "ray" else Tasks())
        try:
            yield
        finally:
            RUNNER.reset(token)


def _this_flow() -> FlowRunContext:
    flow = FlowRunContext.get()
    assert flow, "shards are tasks of a flow"
    return flow


def _bare_flow() -> FlowRunContext:
    """This flow with a function that can be imported anywhere: a deployment's, which Ray's workers cannot import, is sent
    with each task, and never called there."""
    flow = _this_flow()
    return flow.model_copy(update={"flow": Flow(run_shard, name=flow.flow.name if flow.flow else None)})


@contextmanager
def _ray() -> Iterator[None]:
    """The flow's task runner is Ray: the one at RAY_ADDRESS, or one on this machine that ends with the block."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # sends nothing anywhere
    from prefect_ray import RayTaskRunner

    flow = _this_flow()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    with RayTaskRunner(init_kwargs=quiet) as runner:
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own leaves with an exit code, unseen by Prefect and by stages
        with flow.model_copy(update={"task_runner": runner}):
            yield
