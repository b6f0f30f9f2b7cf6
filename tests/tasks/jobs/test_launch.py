"""Jobs: complete means result.json; a failed one says why; nothing outlives its parent."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tasks.jobs import process
from tasks.jobs.launch import JobError, JobRefused, make_checkpoint, run_job
from tasks.jobs.process import warm_up

PROGRAM = """
import sys
from pathlib import Path
from tasks.jobs.launch import finish, report_progress
directory = Path(sys.argv[1]).parent
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a program that `python -m a_job` runs."""

    def write(body: str) -> str:
        (tmp_path / "a_job.py").write_text(PROGRAM + body)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parents[3]}")
        return "a_job"

    return write


def test_a_finished_job_is_not_run_again(program, tmp_path: Path) -> None:
    module = program("(directory / 'ran').open('a').write('x'); finish(directory, {'answer': 7})")
    for _ in range(2):
        assert run_job(module, {}, tmp_path / "job")["answer"] == 7
    assert (tmp_path / "job" / "ran").read_text() == "x"


def test_where_there_is_no_torch_a_job_says_so_and_nothing_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "find_spec", lambda name: None)
    monkeypatch.setattr(process, "_idle", [])
    warm_up()
    assert not process._idle
    with pytest.raises(ValueError, match=r"pip install -e '\.\[train\]'"):
        run_job("tasks.jobs.convert", {"source": "embedded"}, tmp_path / "job")
    assert not (tmp_path / "job" / "log.txt").exists()


def test_a_job_finds_the_programs_beside_its_python(program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")  # as of a shell that has not activated the environment
    module = program("import shutil; finish(directory, {'ninja': shutil.which('ninja')})")
    assert run_job(module, {}, tmp_path / "job")["ninja"] == str(Path(sys.executable).with_name("ninja"))


def test_a_failed_job_says_its_exit_code_and_last_lines(program, tmp_path: Path) -> None:
    module = program("print('half way'); sys.exit('out of luck')")
    with pytest.raises(JobError, match=r"exit code 1(.|\n)*half way(.|\n)*out of luck") as failure:
        run_job(module, {}, tmp_path / "job")
    assert str(pickle.loads(pickle.dumps(failure.value))) == str(failure.value)
    with pytest.raises(JobError, match="when memory runs out") as failure:
        run_job(program("import os; os.kill(os.getpid(), 9)"), {}, tmp_path / "job")
    assert not isinstance(failure.value, ValueError), "it may well end otherwise the next time"


def test_a_killed_job_is_over_though_what_it_had_started_holds_its_output_open(program, tmp_path: Path) -> None:
    module = program(
        "import os, subprocess\n"
        "orphan = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "(directory / 'orphan').write_text(str(orphan.pid))\n"
        "print('the last words, without an end of line: ü', end='', flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with pytest.raises(JobError, match="without an end of line: ü"):
        run_job(module, {}, tmp_path / "job")
    os.kill(int((tmp_path / "job" / "orphan").read_text()), signal.SIGKILL)  # it was there, and not waited for


def test_what_a_job_refuses_is_told_even_where_its_launcher_has_the_last_word(program, tmp_path: Path) -> None:
    module = program("print('refused: no row has a label'); print('rank 0 failed\\n' * 30); sys.exit(1)")
    with pytest.raises(JobRefused, match=r"^no row has a label\nWhole log: .*log.txt$"):
        run_job(module, {}, tmp_path / "job")


def test_exit_zero_without_a_result_is_a_failure(program, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="exit code 0 and no result"):
        run_job(program("pass"), {}, tmp_path / "job")


def test_who_stumbles_on_its_way_out_has_done_its_work(program, tmp_path: Path) -> None:
    said: list[str] = []
    module = program("finish(directory, {'answer': 7}); sys.exit(3)")
    assert run_job(module, {}, tmp_path / "job", on_notable_line=said.append)["answer"] == 7
    assert "exit code 3, after its result was written" in said[-1]


def test_progress_reaches_the_parent_and_stays_out_of_the_log(program, tmp_path: Path) -> None:
    seen, notable = [], []
    module = program("report_progress(1, 2, loss=0.5); print('a line\\nOut of memory'); finish(directory, {})")
    run_job(module, {}, tmp_path / "job", on_progress=seen.append, on_notable_line=notable.append)
    assert seen == [{"done": 1, "total": 2, "loss": 0.5}]
    assert (tmp_path / "job" / "log.txt").read_text() == "a line\nOut of memory\n"
    assert notable == ["Out of memory"]


def test_a_damaged_model_is_made_again_and_a_whole_one_is_not(home: Path, program) -> None:
    module = program("(directory / 'model.safetensors').write_text('w'); print('made'); finish(directory, {})")
    checkpoint, _ = make_checkpoint(module, {}, {"of": 1})
    make_checkpoint(module, {}, {"of": 1})
    assert (checkpoint.path / "log.txt").read_text() == "made\n"
    (checkpoint.path / "model.safetensors").write_text("x")
    again, _ = make_checkpoint(module, {}, {"of": 1})
    again.verify()
    assert again == checkpoint


def test_a_child_dies_with_its_parent(program, tmp_path: Path) -> None:
    module = program("import os, time; print(os.getpid()); time.sleep(60)")
    code = f"from pathlib import Path\nfrom tasks.jobs.launch import run_job\nrun_job({module!r}, {{}}, Path({str(tmp_path / 'job')!r}))"
    parent = subprocess.Popen([sys.executable, "-c", code])
    log = tmp_path / "job" / "log.txt"
    while not (log.exists() and log.read_text().strip()):
        time.sleep(0.05)
        assert parent.poll() is None
    child = psutil.Process(int(log.read_text()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    psutil.wait_procs([child], timeout=5)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
