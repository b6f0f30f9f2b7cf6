"""What strangers wrote is shown in a terminal, and neither obeyed nor read as markup; a program reads it as it is."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from flows.terminal import _end_orphans
from storage.pools import instruction_id
from tests import recorded
from tests.lion import COMMAND, environment, lion

TITLE, CLIPBOARD, COLOUR, REVERSED = "\x1b]0;mine\x07", "\x1b]52;c;ZXZpbA==\x07", "\x9b31m", "\u202e"
HOSTILE = f"Why{TITLE}{CLIPBOARD}{COLOUR}{REVERSED}\x7f is\rthe [/] \\[/] [red]sky :smile:?\nNow\ttell."
SHOWN = r"\u001b]0;mine\u0007"


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home whose first seed is hostile."""
    monkeypatch.setattr(recorded, "SEEDS", [HOSTILE, *recorded.SEEDS[1:]])
    monkeypatch.setattr(recorded, "IDS", [instruction_id(text, None) for text in recorded.SEEDS])
    recorded.record_run()
    return home


def seen(home: Path, *args: str) -> str:
    """What a command writes into a terminal that knows no colours."""
    terminal, of_command = os.openpty()
    command = subprocess.Popen(
        [*COMMAND, *args],
        stdout=of_command,
        stderr=of_command,
        env=environment(home) | {"TERM": "dumb", "COLUMNS": "600"},
    )
    os.close(of_command)
    said = b""
    try:
        while piece := os.read(terminal, 65536):
            said += piece
    except OSError:  # the command has ended
        pass
    os.close(terminal)
    command.wait()
    return said.decode()


@pytest.mark.parametrize(
    "command",
    [
        ["row", instruction_id(HOSTILE, None)],
        ["sql", "select instruction from cache_pool"],
        ["sql", "--csv", "select instruction from cache_pool"],
        ["sql", "--json", "select instruction from cache_pool"],
        ["sql", f"select {HOSTILE}"],
        ["show", HOSTILE],
    ],
)
def test_a_text_cannot_steer_the_terminal_and_is_no_markup(run: Path, command: list[str]) -> None:
    said = seen(run, *command)
    assert not set(said.replace("\r\n", "\n")) & set("\x1b\x07\x9b\x7f\r\u202e")
    assert "Traceback" not in said
    if "cache_pool" in command[-1]:
        assert SHOWN in said and "[red]sky :smile:?" in said


def test_a_program_reads_a_text_as_it_is(run: Path) -> None:
    statement = "select instruction from cache_pool where contains(instruction, 'sky')"
    command = [*COMMAND, "sql", "--csv", statement]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment(run), check=True)
    assert list(csv.reader(io.StringIO(done.stdout.decode(), newline=""))) == [["instruction"], [HOSTILE]]
    assert json.loads(lion(run, "sql", "--json", statement).stdout) == [{"instruction": HOSTILE}]


def test_settings_with_control_characters_can_be_given_back(tmp_path: Path) -> None:
    from flows.config import resolve

    file = tmp_path / "mine.yaml"
    setting = "teacher.system_prompt=" + json.dumps(f"Be\x7f {COLOUR}{REVERSED} brief")
    file.write_text(lion(tmp_path, "config", "--set", setting).stdout)
    assert resolve(file=file) == resolve(overrides=[setting])


def test_a_models_name_is_no_markup(tmp_path: Path) -> None:
    name = "a[/] \\[red]b"
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "turns": ["Why?"], "category": "a"}')
    said = {"question_id": 1, "model_id": name, "choices": [{"turns": ["So."]}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(said))
    files = ["--questions", f"{tmp_path}/q.jsonl", "--answers", f"{tmp_path}/a.jsonl", f"{tmp_path}/a.jsonl"]
    lion(tmp_path, "human-eval", "new", *files)
    assert lion(tmp_path, "human-eval", "report").stdout.startswith(f"{name} against {name}, 1 items\n")


def test_what_a_killed_run_left_behind_is_ended_and_nothing_of_a_run_in_a_container(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_container = ["unshare", "--pid", "--fork", "--kill-child"]
    if not shutil.which("unshare") or subprocess.run([*in_container, "true"], capture_output=True).returncode:
        pytest.skip("no right to make a namespace of processes, as a container has")
    over = subprocess.Popen(["true"])
    over.wait()
    monkeypatch.setenv("LION_RUN_PID", str(over.pid))
    orphan = subprocess.Popen(["sleep", "60"])
    monkeypatch.setenv("LION_RUN_PID", str(os.getpid()))
    child = subprocess.Popen(["sleep", "60"])
    started = f"LION_RUN_PID={over.pid} sh -c 'echo; exec sleep 60'"
    contained = subprocess.Popen([*in_container, "sh", "-c", started], stdout=subprocess.PIPE)
    try:
        assert contained.stdout and contained.stdout.readline()
        _end_orphans()
        assert orphan.wait(10) == -signal.SIGTERM
        assert child.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            contained.wait(0.5)
    finally:
        for process in (orphan, child, contained):
            process.kill()
            process.wait()
