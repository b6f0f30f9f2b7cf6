"""Runs one stage after another and writes into the manifest what each did: how long, cached or not, what it made."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from typing import Any

from httpx import TransportError
from prefect.client.schemas.objects import State
from prefect.exceptions import Pause, TerminationSignal
from prefect.runtime import flow_run
from prefect.tasks import Task
from rich.text import Text

from flows.approval import NotApproved
from flows.chain import before_upgrade
from flows.config import DistillConfig
from flows.terminal import note, of_a_lost_server
from storage import catalog
from storage.files import StorageError, home, locked
from storage.journal import spend_of
from storage.runs import Baseline, IterationRecord, Manifest, RunState, load_manifest, now
from tasks.models.errors import BudgetReached
from tasks.policies import stage_key_of


class LostServer(RuntimeError):
    """The Prefect server of a run does not answer any more."""


class Steps:
    """The stages of one iteration, or of the baseline before the first."""

    def __init__(self, manifest: Manifest, record: Baseline | IterationRecord):
        self.manifest, self.record = manifest, record
        self.where = f"iteration {record.iteration}" if isinstance(record, IterationRecord) else "baseline"

    def __call__(self, stage: Task[..., Any], *inputs: Any, label: str | None = None) -> Any:
        """Run a stage and return its result, from the cache where it is there and whole.

        Args:
            label: the stage's name in the manifest, where one stage runs twice in an iteration.
        """
        name = label or stage.name
        self.manifest.save()  # with what the stage before made: were this one killed, gc would take it
        started = time.perf_counter()
        named = stage.with_options(
            task_run_name=f"{name} · {self.where}",
            tags={f"stage:{stage.name}", self.where.replace(" ", ":")},
            result_storage=home() / "results",
        )
        state: State[Any] = named(*inputs, return_state=True)  # type: ignore[assignment]
        try:
            result = state.result()
        except Exception:  # the message that follows may be of a setting that several stages have
            note.print(f"  {self.where:<12} {name:<18} stopped")
            raise
        cached = state.name == "Cached"
        seconds = time.perf_counter() - started
        self.record.seconds[name] = round(seconds, 2)
        self.record.cached[name] = cached
        key = stage_key_of(stage, inputs)
        if key not in self.manifest.stage_keys:
            self.manifest.stage_keys.append(key)
        self.manifest.save()
        note.print(f"  {self.where:<12} {name:<18} {'cached' if cached else f'{seconds:6.1f} s'}")
        return result


def publish_catalog() -> None:
    """Bring the views up to date. What is damaged of another run is no fault of this one."""
    try:
        catalog.publish()
    except StorageError as error:
        note.print(Text("note:", "yellow"), f"catalog.duckdb stays as it was: {error}")


def warn(manifest: Manifest, warning: str) -> None:
    """Say what is possible and perhaps not meant, now and in the report."""
    manifest.warnings.append(warning)
    note.print(Text("note:", "yellow"), warning, soft_wrap=True)


def held(run_id: str) -> AbstractContextManager[None]:
    """The lock of a run: one process is at it at a time, and another one waits and says so."""
    return locked(f"run-{run_id}", on_wait=lambda: note.print(f"Another process is at {run_id}; waiting for it ..."))


@contextmanager
def recorded(config: DistillConfig) -> Iterator[Manifest]:
    """The manifest of a run while it runs: held by one process at a time, and marked with how it ended."""
    run_id = config.run_id
    with held(run_id):
        before = load_manifest(run_id)
        manifest = Manifest(
            run_id=run_id,
            started=now(),
            config=config.model_dump(mode="json"),
            versions={name: version(name) for name in ("lion-distill", "prefect", "duckdb", "pyarrow")},
        )
        if before:
            manifest.begin_again(before)
        manifest.flow_runs = list(dict.fromkeys([*manifest.flow_runs, *filter(None, [flow_run.id])]))
        for warning in config.warnings():
            warn(manifest, warning)
        _warn_of_an_upgrade(config, manifest)
        manifest.save()
        try:
            yield manifest
        except BaseException as error:
            manifest.state, manifest.error = _ended_by(error)
            manifest.save()
            if isinstance(error, TransportError):
                raise LostServer(manifest.error) from error
            raise
        manifest.state, manifest.earlier = "completed", []
        manifest.save()


def _warn_of_an_upgrade(config: DistillConfig, manifest: Manifest) -> None:
    """Say so where an earlier version knew this run by another id: its caps do not count what was spent under that one."""
    if (earlier := before_upgrade(config)) and (paid := spend_of(earlier.run_id)):
        usd = sum(line.usd + line.lost_usd for line in paid)
        warn(
            manifest,
            f"{earlier.run_id} had these settings before an upgrade added to them. This is another run: what that one "
            f"paid for is found again, but caps do not count the {usd:.2f} dollars in "
            f"{sum(line.requests + line.lost_requests for line in paid):,} requests that it has spent.",
        )


def _ended_by(error: BaseException) -> tuple[RunState, str]:
    """The state of a run that ended with an error, and what the manifest says of it."""
    match error:
        case TerminationSignal() | KeyboardInterrupt() | SystemExit():
            return "interrupted", "cancelled, or ended by Ctrl-C or SIGTERM; everything finished is kept"
        case Pause():
            return "paused", "suspended in Prefect; Resume there goes on"
        case BudgetReached() | NotApproved():
            return "paused", str(error)
        case TransportError():
            return "failed", of_a_lost_server(error)
        case _:
            return "failed", f"{type(error).__name__}: {error}"
