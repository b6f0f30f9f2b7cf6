"""Processes of jobs: a fork runs a program as Python would, and neither it nor its warm process outlives anybody."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tasks.jobs import process
from tasks.jobs.process import lines_of, start_fork, stop

PROGRAM = {
    "good": "import os, sys, torch; print(sys.argv[1], os.environ['WORD'], os.getcwd(), flush=True)",
    "exits": "import sys; print('said'); sys.exit('out of luck')",
    "raises": "raise RuntimeError('broken')",
    "waits": "import os, time; print('begun', flush=True); time.sleep(60)",
}
PRELOADED = process.PRELOADED
needs_forks = pytest.mark.skipif(not process.can_fork(), reason="jobs are not forked where there is a GPU")


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Programs that a fork can run, and the environment in which it does; the warm process is this test's own."""
    for name, body in PROGRAM.items():
        (tmp_path / f"job_{name}.py").write_text(body)
    monkeypatch.setattr(process, "PRELOADED", ())
    monkeypatch.setattr(process, "_idle", [])
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parents[3]}")
    return {**os.environ, "WORD": "hello"}


@needs_forks
def test_a_fork_has_its_own_arguments_environment_and_folder(environment, tmp_path, monkeypatch) -> None:
    start_fork("job_exits", "", environment).wait()
    monkeypatch.chdir(tmp_path)
    job = start_fork("job_good", "an argument", environment)
    assert "".join(lines_of(job)) == f"an argument hello {tmp_path}\n"
    assert job.wait() == 0


@needs_forks
def test_a_second_job_is_a_fork_of_the_same_warm_process(environment) -> None:
    warm = []
    for _ in range(2):
        job = start_fork("job_waits", "", environment)
        warm.append(psutil.Process(job.pid).ppid())
        stop(job)
        assert job.returncode == -signal.SIGTERM
    assert warm[0] == warm[1]


@needs_forks
def test_a_warm_process_has_no_threads_that_its_forks_would_miss(environment, monkeypatch) -> None:
    monkeypatch.setattr(process, "PRELOADED", PRELOADED)
    job = start_fork("job_waits", "", environment)
    try:
        assert psutil.Process(job.pid).parent().num_threads() == 1
    finally:
        stop(job)


@needs_forks
def test_two_jobs_at_a_time_have_two_warm_processes(environment) -> None:
    jobs = [start_fork("job_waits", "", environment) for _ in range(2)]
    assert len({psutil.Process(job.pid).ppid() for job in jobs}) == 2
    for job in jobs:
        stop(job)


@needs_forks
@pytest.mark.parametrize(("program", "said"), [("exits", "said\nout of luck\n"), ("raises", "RuntimeError: broken\n")])
def test_a_fork_fails_as_python_does(environment, program: str, said: str) -> None:
    job = start_fork(f"job_{program}", "", environment)
    assert "".join(lines_of(job)).endswith(said)
    assert job.wait() == 1


@needs_forks
def test_a_killed_warm_process_takes_its_job_along_and_the_next_job_has_a_new_one(environment) -> None:
    job = start_fork("job_waits", "", environment)
    assert next(lines_of(job)) == "begun\n"
    child = psutil.Process(job.pid)
    child.parent().kill()
    assert job.wait() == -signal.SIGKILL
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert start_fork("job_exits", "", environment).wait() == 1


@needs_forks
def test_an_idle_warm_process_that_was_killed_is_replaced(environment) -> None:
    start_fork("job_exits", "", environment).wait()
    process._idle[0].process.kill()
    process._idle[0].process.wait()
    assert start_fork("job_exits", "", environment).wait() == 1


@needs_forks
def test_nothing_outlives_who_asked_for_it(environment) -> None:
    code = "import os; from tasks.jobs.process import start_fork; job = start_fork('job_waits', '', os.environ); print(job.pid, flush=True); input()"
    asking = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert asking.stdout
    int(asking.stdout.readline())
    below = psutil.Process(asking.pid).children(recursive=True)
    assert len(below) == 2, "a warm process and its job"
    asking.kill()
    asking.wait()
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive, f"still there: {alive}"
