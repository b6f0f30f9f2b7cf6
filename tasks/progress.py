"""How far a long stage is: a bar in a terminal, a line now and then in Prefect's log, or a plain line.

On a Prefect server also a progress artifact.
"""

import logging
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tasks.models.chat import OnProgress
from tasks.policies import on_a_server

SECONDS_BETWEEN_LINES = 15
SECONDS_BETWEEN_UPDATES = 3  # of the artifact


@contextmanager
def progress(what: str) -> Iterator[OnProgress]:
    """Show the progress of `what` while the block runs; call the given function with done, total, figures."""
    console = Console(stderr=True)
    with _bar(console, what) if console.is_terminal else _lines(what) as show:
        if on_a_server() and TaskRunContext.get():
            with _artifact(what, show) as show_there_too:
                yield show_there_too
        else:
            yield show


@contextmanager
def _artifact(what: str, show: OnProgress) -> Iterator[OnProgress]:
    """A progress artifact under the key `progress-WHAT`; it ends at 100 only where the stage does."""
    artifact: Any = create_progress_artifact(
        0.0, key=f"progress-{re.sub('[^a-z0-9]+', '-', what.lower())}", description=what
    )
    last = time.monotonic()

    def show_there_too(done: int, total: int, figures: dict[str, Any]) -> None:
        nonlocal last
        show(done, total, figures)
        if total and time.monotonic() - last >= SECONDS_BETWEEN_UPDATES:
            last = time.monotonic()
            update_progress_artifact(artifact, 100 * done / total, f"{what} {done}/{total} {_written(figures)}")

    yield show_there_too
    update_progress_artifact(artifact, 100.0)


@contextmanager
def _bar(console: Console, what: str) -> Iterator[OnProgress]:
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[figures]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        row = bar.add_task(what, total=None, figures="")

        def show(done: int, total: int, figures: dict[str, Any]) -> None:
            bar.update(row, completed=done, total=total, figures=_written(figures))

        yield show


@contextmanager
def _lines(what: str) -> Iterator[OnProgress]:
    last = time.monotonic()
    first: tuple[float, int] | None = None  # when, and how much: what came before is start-up, or was there already

    def show(done: int, total: int, figures: dict[str, Any]) -> None:
        nonlocal last, first
        now = time.monotonic()
        first = first or (now, done)
        if now - last >= SECONDS_BETWEEN_LINES and 0 < done < total:
            last = now
            since, before = first
            left = f", about {(now - since) / (done - before) * (total - done):.0f} s left" if done > before else ""
            tell(f"{what} {done}/{total}{left} {_written(figures)}")

    yield show


def tell(line: str) -> None:
    """Say something in Prefect's log; where nobody reads that, on stderr."""
    logger = run_logger()
    if logger.isEnabledFor(logging.INFO):
        logger.info(line)
    else:
        print(f"  {line}", file=sys.stderr, flush=True)


def run_logger() -> logging.Logger | logging.LoggerAdapter[Any]:
    """The log of the run in Prefect; outside of any run, Python's."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger(__name__)


def _written(figures: dict[str, Any]) -> str:
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
    )
