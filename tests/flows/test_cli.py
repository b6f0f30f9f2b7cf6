"""The whole loop on a tiny model through the command line: run, look, go on, change, damage, refuse."""

import errno
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import duckdb
import httpx
import psutil
import pytest
from fastapi import FastAPI

from flows.commands_talk import serve_lines
from flows.terminal import Refusal, print_csv, settle_home
from storage import files
from storage.runs import Manifest
from tasks.report import verdict
from tests.lion import COMMAND, arguments, digests, environment, lion, shown


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A home in which one iteration has been run."""
    home = tmp_path_factory.mktemp("ran")
    lion(home, *arguments(tiny_model, "--set", "iterations=1"))
    return home


def test_show_tells_what_each_iteration_did(ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LION_HOME", str(ran))
    run = shown(ran)
    (iteration,) = run["iterations"]
    assert run["state"] == "completed"
    assert iteration["train_rows"] == iteration["cache_rows"] == 12
    assert iteration["hard"] + iteration["easy"] + iteration["undecided"] == 12
    assert iteration["generated"]["accepted"] + sum(iteration["generated"]["rejected"].values()) > 0
    assert iteration["evaluation"]["loss"] < run["baseline"]["evaluation"]["loss"]
    assert set(iteration["seconds"]) == set(iteration["cached"]) >= {"teacher", "finetune", "student", "generate"}
    assert run["config"]["discriminate"]["threshold_kind"] == "quantile"
    assert f"\n{verdict(Manifest.model_validate(run))}\n" in lion(ran, "show").stdout


def test_show_tells_what_it_can_where_an_object_is_gone(ran: Path, tmp_path: Path) -> None:
    shutil.copytree(ran, tmp_path / "home")
    shutil.rmtree(tmp_path / "home" / "objects" / "evaluations")
    said = lion(tmp_path / "home", "show").stdout
    assert "is gone or damaged. The same command" in said and "Seconds by stage" in said


def test_the_report_needs_no_network(ran: Path) -> None:
    page = (ran / "runs" / shown(ran)["run_id"] / "report.html").read_text()
    assert page.count("<svg") >= 4
    assert page.count("with 95 % intervals") == 3, "loss, score, relative score"
    assert "widest gaps" in page
    fetched = re.findall(r"""(?:src|href)=["'](?!#)([^"']+)""", page)
    assert [link for link in fetched if not link.startswith("#")] == []


def test_the_same_command_again_does_nothing_and_starts_no_server(ran: Path, tiny_model: Path) -> None:
    code = (
        "import sys; from flows.cli import app; app(sys.argv[1:], standalone_mode=False);"
        "print(sorted(set(sys.modules) & {'torch', 'flows.distill', 'prefect.server.api.server'}))"
    )
    command = [sys.executable, "-c", code, *arguments(tiny_model, "--set", "iterations=1")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(ran), check=True)
    assert "nothing to do" in done.stderr
    assert done.stdout.strip().endswith("[]")


def test_a_run_that_a_person_stopped_asks_again_and_is_not_said_to_be_complete(
    ran: Path, tmp_path: Path, tiny_model: Path
) -> None:
    shutil.copytree(ran, tmp_path / "home")
    file = tmp_path / "home" / "runs" / shown(ran)["run_id"] / "manifest.json"
    stopped = json.loads(file.read_bytes()) | {"approvals": {"2": {"decision": "stop here", "max_new_rows": None}}}
    file.write_text(json.dumps(stopped), encoding="utf-8")
    again = arguments(tiny_model, "--set", "iterations=1", "--set", "approve=spend")
    done = subprocess.run([*COMMAND, *again], capture_output=True, text=True, env=environment(tmp_path / "home"))
    assert "nothing to do" not in done.stderr
    assert done.returncode == 2 and "needs a Prefect server" in done.stderr


def test_duckdb_alone_reads_the_pools(ran: Path) -> None:
    with duckdb.connect(str(ran / "catalog.duckdb"), read_only=True) as connection:
        (counted,) = connection.execute("select count(*) from train_pool where iteration = 1").fetchall()
    assert counted == (12,)


def test_sql_row_runs_and_pools_answer(ran: Path) -> None:
    rows = json.loads(lion(ran, "sql", "--json", "select instruction_id from verdicts order by 1").stdout)
    assert len(rows) == 12
    life = json.loads(lion(ran, "row", rows[0]["instruction_id"], "--json").stdout)
    assert len(life["responses"]) == 2
    assert len(life["verdicts"]) == 1
    assert lion(ran, "sql", "--csv", "select 1 as one").stdout.split() == ["one", "1"]
    assert lion(ran, "sql", "--csv", "select 1 as one where false").stdout == "one\n", "a table without rows is one"
    assert json.loads(lion(ran, "runs", "--json").stdout)[0]["state"] == "completed"
    assert json.loads(lion(ran, "pools", "--json").stdout)[0]["rows"] == 12


@pytest.mark.parametrize("ends", [signal.SIGINT, signal.SIGTERM])
def test_a_statement_without_end_is_ended_by_a_signal(tmp_path: Path, ends: signal.Signals) -> None:
    endless = "select sum(sin(a.range * b.range)) from range(3000000) a, range(3000000) b"
    command = [*COMMAND, "sql", endless]
    child = subprocess.Popen(
        command, env=environment(tmp_path), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    )
    try:
        cpu = psutil.Process(child.pid)
        while cpu.cpu_times().user < 4:  # by then it is in the statement
            time.sleep(0.1)
        child.send_signal(ends)
        assert child.wait(timeout=20) == -ends
    finally:
        child.kill()


def test_a_line_of_csv_ends_as_lines_do_here(capsys: pytest.CaptureFixture[str]) -> None:
    print_csv(["id"], [{"id": "a"}])
    assert capsys.readouterr().out == "id\na\n", "what a shell takes from it can be given to another command"


def test_what_sql_prints_as_json_is_json(tmp_path: Path) -> None:
    select = "select 'nan'::double as a, ['inf'::double, 1] as b, date '2026-01-31' as c"
    (row,) = json.loads(lion(tmp_path, "sql", select, "--json").stdout, parse_constant=pytest.fail)
    assert row == {"a": None, "b": [None, 1], "c": "2026-01-31"}


def test_a_letter_that_a_terminal_has_not_ends_no_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    assert "\\u2026" in lion(tmp_path, "sql", "select '…' as said").stdout
    assert json.loads(lion(tmp_path, "sql", "select '…' as said", "--json").stdout) == [{"said": "…"}]


def test_a_table_that_is_piped_has_a_row_a_line(ran: Path) -> None:
    unset = {name: value for name, value in environment(ran).items() if name != "COLUMNS"}
    done = subprocess.run([*COMMAND, "runs"], capture_output=True, text=True, env=unset, check=True)
    (line,) = [line for line in done.stdout.splitlines() if "completed" in line]
    assert shown(ran)["run_id"] in line
    assert "\x1b" not in done.stdout


def test_gc_finds_nothing_to_take_from_a_finished_run_but_its_job_folders(ran: Path) -> None:
    lines = lion(ran, "gc").stdout.splitlines()
    assert all("/jobs/" in line for line in lines[:-1])
    assert "would go" in lines[-1]


def test_a_changed_threshold_reruns_discrimination_and_what_follows_alone(ran: Path, tiny_model: Path) -> None:
    lion(ran, *arguments(tiny_model, "--set", "iterations=1", "--set", "discriminate.threshold=0.9"))
    cached = shown(ran)["iterations"][0]["cached"]
    assert all(cached[stage] for stage in ("teacher", "finetune", "student", "referee", "evaluate"))
    assert not cached["discriminate"]


def test_the_stage_that_could_not_be_done_is_named(ran: Path, tiny_model: Path) -> None:
    done = lion(ran, *arguments(tiny_model, "--set=evaluation.sampling.max_tokens=512"), code=2)
    lines = done.stderr.split("\n")
    stopped = next(at for at, line in enumerate(lines) if line.endswith("stopped"))
    assert lines[stopped].split() == ["baseline", "evaluate", "stopped"]
    assert lines[stopped + 1].startswith("error: max_tokens 512 leaves no room")


def test_a_run_that_goes_on_where_no_new_instruction_was_found_says_so(ran: Path, tiny_model: Path) -> None:
    command = arguments(tiny_model, "--set", "generate.sampling.max_tokens=1")  # no candidate is long enough
    said = lion(ran, *command, "--set", "iterations=1").stderr
    assert "nothing to learn from" not in said
    goes_on = lion(ran, *command, "--set", "iterations=1", "--set", f"start_from=run:{shown(ran)['run_id']}").stderr
    assert "Iteration 2 has nothing to learn from" in goes_on
    (warning,) = shown(ran)["warnings"]
    assert "Iteration 2 has nothing to learn from" in warning


def test_a_lost_and_a_damaged_object_are_made_again_and_nothing_else(ran: Path, tiny_model: Path) -> None:
    command = arguments(tiny_model, "--set", "iterations=1")
    (run_id,) = re.findall(r"runs/([\w-]+)/report", lion(ran, *command).stdout)
    before, made = digests(ran, run_id), shown(ran, run_id)["iterations"][0]["snapshots"]
    lost, damaged = (
        ran / "objects" / made[name]["table"] / f"{made[name]['digest']}.parquet"
        for name in ("student_responses", "reviews")
    )
    lost.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    lion(ran, *command)
    run = shown(ran, run_id)
    assert [stage for stage, cached in run["iterations"][0]["cached"].items() if not cached] == ["student", "referee"]
    assert all(run["baseline"]["cached"].values())
    assert digests(ran, run_id) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run"], "Say what to run"),
        (["run", "--preset", "ofline"], "no preset 'ofline'. There are: lion-7b, offline, smoke."),
        (
            ["run", "--preset", "smoke", "--set", "iterations=0"],
            "iterations: input should be greater than or equal to 1",
        ),
        (["run", "--preset", "smoke", "--set", "teacher.modle=1"], "teacher.modle: no such setting"),
        (["run", "--preset", "smoke", "--set", "iterations=[1"], "--set iterations=[1: not YAML"),
        (["run", "--preset", "smoke", "--set", "teacher.model=gpt-4.1-mini"], "teacher.model"),
        (["run", "--config", "/"], "/: is a directory"),
        (["run", "--preset", "smoke", "--set", "iterations"], "write it as key.path=value"),
        (["run", "--preset", "smoke", "--seeds", "gone.jsonl"], "gone.jsonl: no such file"),
        (["run", "--preset", "smoke", "--seeds", "~no-such-user/gone.jsonl"], "~no-such-user/gone.jsonl: no such file"),
        (["run", "--preset", "smoke", "--set", "finetune.training.global_batch_size=3"], "no multiple of the 4 rows"),
        (["run", "--config", "gone.yaml"], "gone.yaml: no such file"),
        (["run", "--preset", "smoke", "--set", "teacher.model.model_name_or_path=./gone"], "./gone: no such folder"),
        (["show"], "no run in"),
        (["row", "abc"], "no instruction 'abc'"),
        (["sql", "select * from nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_two_and_writes_nothing(
    tmp_path: Path, args: list[str], message: str
) -> None:
    done = lion(tmp_path / "home", *args, code=2)
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("command", ["up", "deploy"])
def test_outside_of_a_checkout_no_server_is_started(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.chdir(tmp_path)
    done = lion(tmp_path / "home", command, code=2)
    assert "type this in the root of a checkout" in done.stderr
    assert not (tmp_path / "home").exists()


def test_settings_that_lion_config_prints_are_the_settings(tmp_path: Path) -> None:
    from flows.config import resolve

    file = tmp_path / "mine.yaml"
    file.write_text(lion(tmp_path, "config", "--preset", "offline").stdout)
    assert resolve(file=file) == resolve("offline")


def test_of_two_settings_of_one_name_none_is_passed_over_in_silence(tmp_path: Path) -> None:
    from flows.config import ConfigError, resolve

    file = tmp_path / "mine.yaml"
    file.write_text("budget: {max_usd: 5}\niterations: 1\nbudget: {max_requests: 9}\n")
    with pytest.raises(ConfigError, match=r"budget is there twice.* line 3"):
        resolve(file=file)
    with pytest.raises(ConfigError, match="max_usd is there twice"):
        resolve(overrides=["budget={max_usd: 5, max_usd: 50}"])
    file.write_text(
        "teacher: {sampling: &warm {temperature: 0.7, top_p: 0.9}}\nstudent: {sampling: {<<: *warm, top_p: 1}}\n"
    )
    sampling = resolve(file=file).student.sampling  # what is merged in is no second time
    assert (sampling.temperature, sampling.top_p) == (0.7, 1)


@pytest.mark.parametrize(
    "setting", ["finetune.training.max_grad_norm=.inf", "stop.min_gain=.inf", f"name={'[' * 3000}"]
)
def test_a_setting_that_cannot_be_written_down_is_refused_by_name(setting: str) -> None:
    from flows.config import ConfigError, resolve

    with pytest.raises(ConfigError, match=setting.partition("=")[0]):
        resolve(overrides=[setting])


@pytest.mark.parametrize("url", ["https://me:hunter2@host/v1", "https://host/v1?key=hunter2", "hunter2"])
def test_an_address_that_is_refused_is_not_told_as_a_key_may_be_in_it(url: str) -> None:
    from flows.config import ConfigError, resolve

    with pytest.raises(ConfigError, match="base_url: ") as refused:
        resolve(overrides=[f"teacher.model={{kind: openai, model: m, base_url: '{url}'}}"])
    assert "hunter2" not in str(refused.value)


def test_lion_config_prints_several_teachers_and_caps_by_role_as_they_were_given(tmp_path: Path) -> None:
    from flows.config import resolve

    settings = [
        "teacher.further=[{share: 0.2, model: {kind: openai, model: o4-mini}}]",
        "budget.by_role={teacher: {max_requests: 5}}",
        "teacher.model.extra_body={min_p: 0.00005, logit_bias: {a: 1.0e+20}}",
    ]
    file = tmp_path / "mine.yaml"
    shown = lion(tmp_path, "config", "--preset", "lion-7b", *(f"--set={setting}" for setting in settings))
    file.write_text(shown.stdout)
    assert resolve(file=file) == resolve("lion-7b", settings)


def test_ctrl_c_in_a_terminal_ends_a_run_at_once_and_it_goes_on(tmp_path: Path, tiny_model: Path) -> None:
    command = [*COMMAND, *arguments(tiny_model, "--set", "iterations=1")]
    child = subprocess.Popen(
        command, env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert child.stderr is not None
    said = ""
    while "heldout" not in said and "teacher" not in said and (line := child.stderr.readline()):
        said += line
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does
    _, rest = child.communicate(timeout=60)  # it would wait for a server that is gone for longer
    assert child.returncode == 130, said + rest
    assert "Interrupted. The same command goes on from here." in rest and "Traceback" not in rest
    assert shown(tmp_path)["state"] == "interrupted"
    lion(tmp_path, *arguments(tiny_model, "--set", "iterations=1"))
    assert shown(tmp_path)["state"] == "completed"


@pytest.mark.parametrize("ends", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_while_a_command_ends_disturbs_nothing(ends: signal.Signals) -> None:
    code = """
import atexit, sys
from flows import cli
def ended_by_the_first():
    atexit.register(lambda: (print("ending what was started", flush=True), sys.stdin.read(), print("ended")))
    sys.exit(130)
cli._main = ended_by_the_first
cli.main()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout and child.stdout.readline() == "ending what was started\n"
    child.send_signal(ends)
    said, errors = child.communicate("")
    assert (child.returncode, said, errors) == (130, "ended\n", "")


def test_a_home_may_be_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LION_HOME", "~/named")
    assert files.home() == tmp_path / "named"
    settle_home(Path("~/given"))  # as a shell leaves it in --home=~/given
    assert files.home() == tmp_path / "given"


@pytest.mark.parametrize("name", ["what?", "a\\b"])
def test_a_home_that_duckdb_cannot_open_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(Refusal, match="Name another home"):
        settle_home(tmp_path / name)


@pytest.mark.parametrize("preset", ["offline", "smoke", "lion-7b"])
def test_every_preset_is_valid(preset: str) -> None:
    from flows.config import resolve

    assert resolve(preset).name == preset


def test_a_model_is_local_unless_it_says_otherwise() -> None:
    from flows.config import resolve

    assert resolve("smoke", ["teacher.model.model_name_or_path=here"]).teacher.model.kind == "local"
    assert resolve("lion-7b").teacher.model.kind == "openai"


def test_to_say_that_a_model_is_local_changes_nothing_else_of_a_local_one() -> None:
    from flows.config import resolve

    student = resolve("lion-7b", ["student.model={kind: local, quantization: 8bit}"]).student.model
    assert (student.model_name_or_path, student.quantization) == ("huggyllama/llama-7b", "8bit")
    teacher = resolve("lion-7b", ["teacher.model={kind: local}"]).teacher.model
    assert (teacher.kind, teacher.model_name_or_path) == ("local", "embedded"), "nothing is left of the endpoint"


def test_a_file_is_laid_upon_a_preset_and_a_setting_upon_both(tmp_path: Path) -> None:
    from flows.config import resolve

    file = tmp_path / "mine.yaml"
    file.write_text("iterations: 7\nseed: 5\ndiscriminate: {threshold: 0.25}\n")
    found = resolve("smoke", ["seed=6"], file)
    assert (found.iterations, found.seed, found.discriminate.threshold) == (7, 6, 0.25)
    assert found.generate == resolve("smoke").generate != resolve().generate, "what neither says is the preset's"


def test_who_approves_of_a_run_and_what_it_may_spend_make_no_other_run_of_it() -> None:
    from flows.config import resolve

    same = ["approve=spend", "approve_within=60", "task_runner=ray", "budget.max_usd=5", "teacher.license=MIT"]
    assert resolve("smoke", same).run_id == resolve("smoke").run_id != resolve("smoke", ["seed=6"]).run_id


def test_a_referee_that_is_one_of_the_teachers_is_remarked_upon() -> None:
    from flows.config import resolve

    def remarked(*settings: str) -> list[str]:
        return [warning.partition(" are the same model.")[0] for warning in resolve("lion-7b", settings).warnings()]

    also = "teacher.further=[{share: 0.5, model: {kind: openai, model: gpt-4.1-mini}}]"
    assert remarked("referee.model.max_concurrency=3") == ["The referee and the teacher"]
    assert remarked("teacher.model.model=another", also) == ["The referee and the teacher 2"]
    assert remarked("teacher.model.model=another") == [] == resolve("offline").warnings()


def test_a_narrow_terminal_cuts_no_id(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.terminal import out, print_rows

    monkeypatch.setattr(out, "_width", 30)
    print_rows([{"run": "offline-94556779", "state": "completed", "goes on from": ""}])
    lines = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert "".join(line.split("│")[1].strip() for line in lines) == "offline-94556779"


def test_a_full_disk_is_told_in_one_line(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import cli

    def fills_the_disk() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # as Python and Arrow say it: without a file

    monkeypatch.setattr(cli, "app", fills_the_disk)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        cli._main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {home}: No space left on device\n"


def test_a_prefect_server_that_is_gone_is_told_in_one_message(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import cli

    def loses_its_server() -> None:
        raise httpx.ConnectError("[Errno 111] Connection refused")  # as Prefect's client leaves it

    monkeypatch.setattr(cli, "app", loses_its_server)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        cli._main()
    assert ended.value.code == 1
    said, way_out = capsys.readouterr().err.splitlines()
    assert said == "failed: the Prefect server of this run does not answer any more ([Errno 111] Connection refused)."
    assert "the same command goes on from here" in way_out


def test_a_narrow_terminal_cuts_no_figure_of_an_estimate(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.commands_cost import estimate
    from flows.terminal import out

    monkeypatch.setattr(out, "_width", 70)
    estimate(preset="lion-7b", home=home)
    told = capsys.readouterr().out
    assert "Total: " in told and "…" not in told


def test_a_port_that_is_taken_is_bad_input_and_no_cap_that_was_reached() -> None:
    from flows.web import serve

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(Refusal, match="Name another port"):
        serve(FastAPI(), taken.getsockname()[1])


def test_the_help_lists_every_command_under_a_heading(tmp_path: Path) -> None:
    said = lion(tmp_path, "--help").stdout
    assert "─ The loop ─" in said
    assert "─ Commands ─" not in said, "what has no heading"


def test_lion_tells_its_version(tmp_path: Path) -> None:
    assert lion(tmp_path, "--version").stdout == f"lion {version('lion-distill')}\n"


def test_the_lines_that_serve_a_student_can_be_typed_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "my students" / "the first"
    assert [shlex.split(line)[2] for line in serve_lines(str(folder))] == [str(folder)] * 2
