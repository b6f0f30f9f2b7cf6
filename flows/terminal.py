"""What every command of `lion` shares: its options, the two consoles, the way to a home, how rows are printed."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from storage import files

if TYPE_CHECKING:
    from storage.runs import Interval, Manifest

# What steers a terminal or lets a line read as another one: control characters, the Unicode ones that turn the direction
# of writing, and the halves of characters that Python makes of file names that are no UTF-8.
STEERING = re.compile(r"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with what would steer a terminal shown as JSON escapes it, so that JSON stays the same JSON."""
    return STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class Terminal(Console):
    """A console that shows every text as it is: seeds, answers, names and errors are written by strangers."""

    def __init__(self, **options: Any):
        super().__init__(**options, markup=False, highlight=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """What Rich makes of each text that it is given, in a line or in a table."""
        return super().render_str(printable(text), **options)


out = Terminal()
note = Terminal(stderr=True)
if not out.is_terminal and "COLUMNS" not in os.environ:
    out.width = 10_000  # a table is as wide as its rows: whoever reads a pipe looks for an id on one line

# Under what `lion --help` lists a command.
LOOP, LOOK, HELPED = "The loop", "What there is", "Did it help?"
USE, ALONE, SERVER = "The student in use", "One stage alone", "A Prefect server on this machine"

Home = Annotated[Path | None, typer.Option("--home", help="Where everything is kept. [LION_HOME, default ./.lion]")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change one setting.")]
Preset = Annotated[
    str | None, typer.Option("--preset", help="offline, smoke or lion-7b; without it the paper's defaults.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="Settings from a YAML file, on top of the preset.")]
SeedFile = Annotated[
    str | None,
    typer.Option("--seeds", help="Your instructions: .json, .jsonl, .csv, .parquet, .txt, or hf:dataset[:split]."),
]

RunName = Annotated[
    str | None, typer.Argument(metavar="[RUN]", help="A run's id or its beginning; by default the last.")
]
A_CHECKPOINT = "RUN, RUN/ITERATION, a folder, a Hub id; by default the last run's best."
CheckpointName = Annotated[str | None, typer.Argument(metavar="[CKPT]", help=A_CHECKPOINT)]

QUIET_PREFECT = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",  # nothing is sent as it is; now it does not say that it might
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_ROOT_LEVEL": "CRITICAL",  # what jobs say is in their own logs
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "50",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "50",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
}


class Refusal(ValueError):
    """What was asked cannot be done. The message says what can."""


def settle_home(home: Path | None) -> None:
    """Settle where everything is kept.

    Raises:
        Refusal: DuckDB could not open a catalog there.
    """
    if home:
        os.environ["LION_HOME"] = str(home)
    settled = str(files.home())
    if "?" in settled or "\\" in settled:
        raise Refusal(f"{settled}: DuckDB opens nothing in a folder with ? or \\ in its path. Name another home.")
    os.environ["LION_HOME"] = settled


def use_home(home: Path | None) -> None:
    """Settle the home, and keep Prefect quiet and to itself; before anything of Prefect is imported."""
    settle_home(home)
    for name, value in QUIET_PREFECT.items():
        os.environ.setdefault(name, value)
    if not os.environ.get("PREFECT_API_URL"):  # a server of our own, gone with the process
        os.environ["PREFECT_PROFILES_PATH"] = os.devnull  # in place of the one in prefect.toml, which names a server
        os.environ.setdefault("PREFECT_API_DATABASE_CONNECTION_URL", "sqlite+aiosqlite:///:memory:")


def prepare_for_a_flow() -> None:
    """What comes before a flow that may get a temporary Prefect server: see the two."""
    _end_orphans()
    _give_the_server_a_session()


def _end_orphans() -> None:
    """End the temporary Prefect servers of runs that were killed: `kill -9` leaves them behind, idle, for ever.

    A run marks itself and all that it starts in the environment. Linux only; elsewhere nothing is found.
    """
    import psutil

    for process in psutil.process_iter():
        with suppress(OSError, ValueError, psutil.Error):  # another user's, or gone by now
            mark = process.environ().get("LION_RUN_PID")
            here = Path(f"/proc/{process.pid}/ns/pid").samefile("/proc/self/ns/pid")  # a container numbers its own
            if mark and here and not psutil.pid_exists(int(mark)):
                process.terminate()
    os.environ["LION_RUN_PID"] = str(os.getpid())


def _give_the_server_a_session() -> None:
    """Keep Ctrl-C, which a terminal sends to all processes of a command, from the temporary Prefect server: without it
    the run, which writes down where it stopped, would wait for an answer for a minute."""
    from prefect.server.api import server

    started = partial(subprocess.Popen, start_new_session=True)
    server.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": started})  # type: ignore[assignment]


def of_a_lost_server(error: Exception) -> str:
    """What there is to say where Prefect's client says no more than "Connection refused", as of an endpoint."""
    return f"the Prefect server of this run does not answer any more ({error or type(error).__name__})"


def find_run(run_id: str | None) -> "Manifest":
    """The manifest of the run whose id begins so; without one, of the run touched last.

    Raises:
        Refusal: there is no such run.
    """
    from storage.runs import list_manifests

    manifests = list_manifests()
    if not manifests:
        raise Refusal(f"no run in {os.environ['LION_HOME']} yet. Start one: lion run --preset offline")
    found = [manifest for manifest in manifests if manifest.run_id.startswith(run_id or "")]
    if not found:
        raise Refusal(f"no run {run_id!r}. There are: {', '.join(manifest.run_id for manifest in manifests)}.")
    return found[0]


def check_says_what_to_run(preset: str | None, config: Path | None, overrides: list[str] | None) -> None:
    """See that a run is not started by a command that says nothing of it.

    Raises:
        Refusal: it says nothing.
    """
    if preset is None and config is None and not overrides:
        raise Refusal("Say what to run: --preset offline needs no key, no GPU and no network.")


def check_is_new(to: Path) -> None:
    """See, before any work is done for it, that something new can be written there.

    Raises:
        Refusal: it is there already, or its folder cannot be written.
    """
    if to.exists():
        raise Refusal(f"{to} is there already. Name a new path.")
    there = next(folder for folder in to.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise Refusal(f"{to}: {there} is no folder that can be written. Name another path.")


def with_bounds(interval: "Interval | None", form: str = ".3f", scale: float = 1, unit: str = "") -> str:
    """A figure and its 95 % interval, as in `68.3 % [64.1, 72.0]`; empty where there is none."""
    if interval is None:
        return ""
    value, low, high = (format(scale * figure, form) for figure in (interval.value, interval.low, interval.high))
    return f"{value}{unit} [{low}, {high}]"


def print_json(value: Any) -> None:
    """A value as JSON."""
    print(printable(json.dumps(value, indent=2, ensure_ascii=False, default=str)))


def print_text(text: str) -> None:
    """A text for other programs: exact where one reads it, and printable in a terminal."""
    print(printable(text) if sys.stdout.isatty() else text, end="")


def print_rows(rows: list[dict[str, Any]], *, as_json: bool = False) -> None:
    """Rows as a table or as JSON."""
    if as_json:
        # JSON has no NaN, which SQL gives for a correlation of what is all the same.
        whole = json.loads(json.dumps(rows, default=str), parse_constant=lambda name: None)
        print_json(whole)
    elif rows:
        table = Table()
        for name in rows[0]:  # an id that is cut cannot be typed again, and one that is folded is not copied
            table.add_column(name, overflow="fold", no_wrap=name == "run" or name.endswith("_id"))
        for line in rows:
            table.add_row(*("" if value is None else _shown(value) for value in line.values()))
        out.print(table)
    else:
        out.print("no rows")


def print_csv(names: list[str], rows: list[dict[str, Any]]) -> None:
    """Rows as CSV, with their names where there are no rows, too."""
    sheet = io.StringIO(newline="")
    writer = csv.DictWriter(sheet, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    print_text(sheet.getvalue())


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
