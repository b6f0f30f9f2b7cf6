"""Runs the command `lion` as a user does: a process of its own, a home of its own, the tiny model."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-c", "from flows.cli import main; main()"]


def arguments(tiny: Path, *more: str) -> list[str]:
    """`lion run --preset smoke` with the tiny model in every role."""
    roles = ("teacher", "student", "generate")
    models = [f"--set={role}.model.model_name_or_path={tiny}" for role in roles]
    return ["run", "--preset", "smoke", *models, *more]


def environment(home: Path) -> dict[str, str]:
    return os.environ | {"LION_HOME": str(home), "COLUMNS": "160"}


def lion(home: Path, *args: str, code: int = 0, typed: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with what a person types into it, and check its exit code."""
    done = subprocess.run([*COMMAND, *args], input=typed, capture_output=True, text=True, env=environment(home))
    assert done.returncode == code, done.stdout + done.stderr
    return done


def start(home: Path, *args: str, errors: int = subprocess.PIPE) -> "subprocess.Popen[str]":
    """A command that is not waited for."""
    return subprocess.Popen(
        [*COMMAND, *args], env=environment(home), stdout=subprocess.DEVNULL, stderr=errors, text=True
    )


def kill_after(seconds: float, home: Path, *args: str) -> None:
    """Start a command and `kill -9` it after a while, unless it has ended by then."""
    child = start(home, *args, errors=subprocess.DEVNULL)  # an orphan would keep a pipe open
    try:
        child.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
    child.wait()


def processes_of(home: Path) -> list[str]:
    """Command lines of the processes that still work for a home."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"LION_HOME={home}".encode() in environ.read_bytes().split(b"\0"):
                found.append(environ.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def shown(home: Path, *args: str) -> dict[str, Any]:
    """`lion show --json`."""
    return json.loads(lion(home, "show", "--json", *args).stdout)


def digests(home: Path, *run_id: str) -> dict[str, Any]:
    """All that a run made, by content: what must not depend on when it was interrupted."""
    run = shown(home, *run_id)
    return {
        "evaluation": run["baseline"]["evaluation"],
        "iterations": [
            {key: record[key] for key in ("snapshots", "student", "evaluation", "generated", "threshold")}
            for record in run["iterations"]
        ],
        "next": run["next_pools"],
    }
