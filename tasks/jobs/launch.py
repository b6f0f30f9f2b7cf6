"""Starts a program of `tasks.jobs` in a process of its own and waits for it.

A job is a folder: `job.json` says what to do, `log.txt` keeps all that the program printed, `result.json` is
written last by the program and means *complete*. A folder that is complete is not run again; one that is not
is run again, and the program finds in it what it had already made.

Imports no torch: the orchestrating process starts this.
"""

import json
import logging
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar, copy_context
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from typing import Any, Protocol

from storage.files import Checkpoint, digest_of, digest_of_model, home, locked, write_atomic
from tasks.jobs.process import ENVIRONMENT, Process, can_fork, gpus, has_torch, lines_of, start, start_fork, stop

PROGRESS = "@progress "  # a line of the program that starts so is a progress report, not a log line
REFUSED = "refused: "  # and one that starts so, its last, says what is wrong with what it was given
NOTABLE = re.compile(r"error|warning|\bnan\b|out of memory", re.IGNORECASE)
TAIL_LINES = 15
SECONDS_BETWEEN_LINES = 2
SECONDS_BETWEEN_LOOKS = 1  # at how far shards are

_logger = logging.getLogger("lion.jobs")  # Prefect shows it with the run: `logging.extra_loggers` in prefect.toml
_logger.addHandler(logging.NullHandler())  # without one, Python prints warnings
_last_line = 0.0


def log_now_and_then(line: str) -> None:
    """Log a line of a job, one every two seconds at most: thousands of warnings are in `log.txt`, not in a database."""
    global _last_line
    if time.monotonic() - _last_line >= SECONDS_BETWEEN_LINES:
        _last_line = time.monotonic()
        _logger.warning(line)


class JobError(RuntimeError):
    """A job ended without a result. Carries its exit code and its last lines; picklable, as Prefect needs."""

    def __init__(self, module: str, directory: str, returncode: int, tail: str):
        self.module, self.directory, self.returncode, self.tail = module, directory, returncode, tail
        super().__init__(module, directory, returncode, tail)

    def __str__(self) -> str:
        killed = self.returncode == -signal.SIGKILL or "SIGKILL" in self.tail
        why = "Killed: the system does that to whoever holds most memory when memory runs out.\n" if killed else ""
        return (
            f"{self.module} ended with exit code {self.returncode} and no result.\n{why}"
            f"Whole log: {Path(self.directory) / 'log.txt'}. Its last lines:\n{self.tail}"
        )


class JobRefused(JobError, ValueError):
    """What a job was given cannot be used: it would end in the same way each time."""

    def __str__(self) -> str:
        reason = next(line for line in self.tail.split("\n") if line.startswith(REFUSED))
        return f"{reason.removeprefix(REFUSED)}\nWhole log: {Path(self.directory) / 'log.txt'}"


class NoTorch(ValueError):
    """Nothing can be computed here: this Python has no torch. The message names the ways out."""


def run_job(
    module: str,
    job: dict[str, Any],
    directory: Path,
    *,
    launcher: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    on_start: Callable[[Process], None] = lambda process: None,
    on_progress: Callable[[dict[str, Any]], None] = lambda figures: None,
    on_notable_line: Callable[[str], None] = log_now_and_then,
) -> dict[str, Any]:
    """Run `<launcher> -m <module> <directory>/job.json` to its end and return its `result.json`.

    Args:
        module: a program of tasks.jobs, as `python -m` takes it.
        job: what `job.json` says; JSON-like.
        directory: the job's folder, named by what the job is made from. Made if missing.
        launcher: what starts it where python alone does not: torchrun, deepspeed.
        environment: variables of its own.
        on_start: called with its process, unless the job is complete already.
        on_progress: called with each progress report of the program.
        on_notable_line: called with each line that speaks of an error, a warning, NaN or memory.

    Raises:
        NoTorch: it cannot even be started.
        JobRefused: the program cannot do what it was given.
        JobError: it ended without a result for another reason.
    """
    result = directory / "result.json"
    if not result.exists():
        # Two who want the same: one makes it, one waits for it.
        waiting = partial(on_notable_line, "another process is at this job; waiting for it")
        with locked(f"job-{directory.name}", on_wait=waiting):
            if not result.exists():
                write_atomic(directory / "job.json", json.dumps(job, indent=2, ensure_ascii=False))
                child = _started(module, directory / "job.json", launcher, environment)
                on_start(child)
                returncode, tail = _run(child, directory / "log.txt", on_progress, on_notable_line)
                if not result.exists():
                    kind = JobRefused if any(line.startswith(REFUSED) for line in tail.split("\n")) else JobError
                    raise kind(module, str(directory), returncode, tail)
                if returncode != 0:  # a library's threads can bring a rank down as it leaves
                    on_notable_line(f"{module} ended with exit code {returncode}, after its result was written")
    return json.loads(result.read_bytes())


def _started(module: str, job_file: Path, launcher: Sequence[str], environment: Mapping[str, str] | None) -> Process:
    variables = {**os.environ, **ENVIRONMENT, **(environment or {})}
    # DeepSpeed compiles with the ninja beside this Python, which need not be on the path.
    variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), variables.get("PATH", os.defpath)])
    ours = module.startswith(__package__)  # only what a warm process can import, wherever this one found it
    if ours and not has_torch():
        raise NoTorch(
            "Models of this machine need torch, and this Python has none: pip install -e '.[train]'. Of the images, the "
            "trainer has it."
        )
    if launcher or not ours or not can_fork():
        return start([*(launcher or [sys.executable]), "-m", module, str(job_file)], variables)
    return start_fork(module, str(job_file), variables)


def _run(
    child: Process,
    log: Path,
    on_progress: Callable[[dict[str, Any]], None],
    on_notable_line: Callable[[str], None],
) -> tuple[int, str]:
    """Exit code and last lines of a process whose output goes to `log`.

    The program's own last word, a line that begins with "error: " or REFUSED, is among them even where a launcher says
    more.
    """
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    last_word = ""
    try:
        with log.open("a", buffering=1, encoding="utf-8") as file:  # a line at a time: it is read while the job runs
            for line in lines_of(child):
                if line.startswith(PROGRESS):
                    on_progress(json.loads(line.removeprefix(PROGRESS)))
                    continue
                file.write(line)
                tail.append(line.rstrip())
                if line.startswith(("error: ", REFUSED)):
                    last_word = line.rstrip()
                if NOTABLE.search(line):
                    on_notable_line(line.rstrip())
        if last_word and last_word not in tail:
            tail.append(last_word)
        return child.wait(), "\n".join(tail)
    finally:
        stop(child)


def run_shard(module: str, job: dict[str, Any], directory: str, environment: Mapping[str, str]) -> None:
    """Run one job of several, wherever that is; how far it is stands in `progress.json` in its folder.

    Raises:
        JobError: as for `run_job`.
    """
    folder = Path(directory)

    def tell(report: dict[str, Any]) -> None:
        write_atomic(folder / "progress.json", json.dumps(report))

    run_job(module, job, folder, environment=environment, on_start=_on_start.get(), on_progress=tell)


class Pending(Protocol):
    """A shard that was submitted: a Future of Python's or of Prefect's."""

    def add_done_callback(self, fn: Callable[[Any], Any], /) -> Any:
        """Have a function called once the shard has ended, however it ended."""

    def result(self) -> Any:
        """Nothing, once it has ended; raises what it raised."""


class Threads:
    """Runs shards in threads of this process, on the GPUs of this machine. Others are in `tasks/shards.py`."""

    here = True  # with a single shard there is nothing to share: the thread that asks can run it

    def devices(self, gpus_each: int) -> int:
        """How many shards can have GPUs of their own, so many each."""
        return len(gpus()) // gpus_each

    def submit(self, place: int, count: int, gpus_each: int, job: tuple[str, dict[str, Any], str]) -> Pending:
        """Begin shard `place` of `count`: module, job and folder."""
        pool = ThreadPoolExecutor(1)
        shard = pool.submit(copy_context().run, run_shard, *job, self.environment(place, gpus_each))
        pool.shutdown(wait=False)
        return shard

    def cancel(self, shards: Sequence[Any]) -> None:
        """End shards whose processes are not children of this one."""

    def environment(self, place: int, gpus_each: int) -> dict[str, str]:
        """Variables of a shard: which GPUs are its own."""
        groups = self.devices(gpus_each)
        first = place % groups * gpus_each if groups else 0
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus()[first : first + gpus_each])} if groups else {}


RUNNER: ContextVar[Threads] = ContextVar("runner", default=Threads())  # noqa: B039, it has no state
_on_start: ContextVar[Callable[[Process], None]] = ContextVar("on_start", default=lambda process: None)


def run_together(
    module: str,
    jobs: Sequence[tuple[dict[str, Any], Path]],
    gpus_each: int,
    on_progress: Callable[[dict[str, Any]], None],
) -> None:
    """Run jobs, each in its folder and on GPUs of its own, at the same time. Their progress is told as one.

    Raises:
        JobError: one of them ended without a result. What the others had begun is finished first.
    """
    runner = RUNNER.get()
    if len(jobs) == 1 and runner.here:  # in this thread, whose end a process of the job would not outlive
        ((job, directory),) = jobs
        environment = runner.environment(0, gpus_each)
        run_job(module, job, directory, environment=environment, on_progress=on_progress)
        return
    running: list[Process] = []
    cancelled = threading.Event()

    def begun(process: Process) -> None:
        running.append(process)
        if cancelled.is_set():  # meanwhile: starting one may take seconds
            process.terminate()

    shards: list[Pending] = []
    ended: Queue[Pending] = Queue()
    token = _on_start.set(begun)
    try:
        for place, (job, directory) in enumerate(jobs):
            shards.append(runner.submit(place, len(jobs), gpus_each, (module, job, str(directory))))
            shards[-1].add_done_callback(ended.put)
        left = len(shards)
        while left:
            with suppress(Empty):
                ended.get(timeout=SECONDS_BETWEEN_LOOKS)
                left -= 1
            if reports := [report for _, directory in jobs if (report := _progress_in(directory))]:
                on_progress({name: sum(each.get(name, 0) for each in reports) for name in reports[-1]})
    except BaseException:  # what runs elsewhere would not hear of it
        cancelled.set()
        for process in running:
            with suppress(ProcessLookupError):
                process.terminate()
        runner.cancel(shards)
        raise
    finally:
        _on_start.reset(token)
    for shard in shards:
        shard.result()


def _progress_in(directory: Path) -> dict[str, Any] | None:
    try:
        return json.loads((directory / "progress.json").read_bytes())
    except FileNotFoundError:
        return None


def make_checkpoint(
    module: str, job: dict[str, Any], identity: dict[str, Any], **options: Any
) -> tuple[Checkpoint, dict[str, Any]]:
    """Run a job that makes a model, in the folder that its identity names; the model and the job's result.

    Args:
        identity: what the model is made from, by content: no path, no device, no wish about speed.
        options: as for `run_job`.

    Raises:
        JobError: the program ended without a result.
    """
    directory = checkpoint_folder(module, identity)
    digest = directory.name
    result = directory / "result.json"
    with locked(f"checkpoint-{digest}"):  # two who want the same model: one makes it, one waits for it
        if result.exists() and json.loads(result.read_bytes())["content"] != digest_of_model(directory):
            shutil.rmtree(directory)  # damaged: what is left of it is worth nothing
        made = run_job(module, job, directory, **options)
    return Checkpoint(digest=digest, content=made["content"]), made


def checkpoint_folder(module: str, identity: dict[str, Any]) -> Path:
    """Where `make_checkpoint` makes it."""
    return home() / "checkpoints" / digest_of({"module": module, **identity})


def report_progress(done: int, total: int, **figures: Any) -> None:
    """For the program: tell the parent how far it is."""
    print(PROGRESS + json.dumps({"done": done, "total": total, **figures}), flush=True)


def finish(directory: Path, result: dict[str, Any]) -> None:
    """For the program: write its result, which makes the job complete, with the digest of the model it made."""
    result = {**result, "content": digest_of_model(directory)}
    write_atomic(directory / "result.json", json.dumps(result, indent=2, ensure_ascii=False))
