"""How the process of a job begins and ends: fresh or forked, and never outliving whoever asked for it.

Importing torch and transformers takes six seconds of a processor and leaving Python with both two more, a dozen times a
run. So a *warm* process imports them once, and each job of ours is a fork of it. What a fork inherits is code alone: the
warm process computes nothing and starts no threads. Where there is a GPU each job is a fresh Python instead, as a driver
that was once looked at does not survive a fork.

Imports no torch: the orchestrating process imports this. Only the warm process itself does.
"""

import codecs
import ctypes
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NoReturn

GRACE_SECONDS = 5
AFTERMATH_SECONDS = 1
ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "PYTHONIOENCODING": "utf-8",  # as their output is read, whatever the locale
    "TOKENIZERS_PARALLELISM": "false",
    # Threads that spin at a barrier make a shared CPU twenty times slower; sleeping costs microseconds.
    "OMP_WAIT_POLICY": "PASSIVE",
}
# Libraries that are imported start threads, of which a fork has none; Python 3.12 and later warn of each such fork.
WITHOUT_THREADS = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
PRELOADED = ("tasks.jobs.engine", "tasks.jobs.trainer", "transformers.models.llama.modeling_llama")
GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # CUDA, ROCm, either of them under WSL
LONGEST_MESSAGE = 2**20  # bytes


def has_torch() -> bool:
    """Whether this Python has torch, as all jobs of ours need it: who only orchestrates goes without."""
    return find_spec("torch") is not None


def can_fork() -> bool:
    """Whether jobs may be forks: this is a Linux that can, and no driver of a GPU would be forked with them."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return not any(Path(device).exists() for device in GPUS)


def gpus() -> list[str]:
    """Names of NVIDIA's GPUs that this process may use, as CUDA_VISIBLE_DEVICES says them; none elsewhere."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name]
    return [str(number) for number, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


def warm_up() -> None:
    """Have a warm process ready for the first job, while something else is still being started."""
    if has_torch() and can_fork() and not _idle:
        _idle.append(_Warm())


def start(command: list[str], environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """A fresh process that ends with this one, its output as one stream."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        preexec_fn=die_with_parent,
    )


def start_fork(module: str, argument: str, environment: Mapping[str, str]) -> "Fork":
    """`python -m <module> <argument>` as a fork of an idle warm process, or of a new one."""
    while _idle:
        try:
            return Fork(_idle.pop(), module, argument, environment)
        except OSError:
            continue  # it ended meanwhile
    return Fork(_Warm(), module, argument, environment)


def lines_of(process: "Process") -> Iterator[str]:
    """What a process prints, line by line, as it comes. To be read by nobody else.

    What a killed process had started may live on, with its output open: once the process is over, only what still comes
    within a second is waited for, not for the end of all who could write.
    """
    assert process.stdout is not None
    output = process.stdout.fileno()
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")("replace"), translate=True)
    begun = ""
    while True:
        if select.select([output], [], [], AFTERMATH_SECONDS)[0]:
            if not (data := os.read(output, LONGEST_MESSAGE)):
                break
            *lines, begun = (begun + decoder.decode(data)).split("\n")
            yield from (line + "\n" for line in lines)
        elif process.poll() is not None:
            break
    if begun := begun + decoder.decode(b"", final=True):
        yield begun


def stop(process: "subprocess.Popen[Any] | Fork", grace: float = GRACE_SECONDS) -> None:
    """Terminate a process if it still runs, then kill it. A launcher passes the signal on to its ranks."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


_libc = ctypes.CDLL(None)
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15


def die_with_parent() -> None:
    """In the child: be terminated when the parent dies, even by `kill -9`, so that no orphan holds the GPU."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class _Warm:
    """A warm process, seen from whoever asks. It runs one job at a time, and ends when this object's socket closes."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.socket, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LONGEST_MESSAGE)
        with theirs:
            command = [sys.executable, "-m", __name__, str(theirs.fileno()), *PRELOADED]
            environment = {**os.environ, **ENVIRONMENT, **WITHOUT_THREADS}
            self.process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])


_idle: list[_Warm] = []


class Fork:
    """A job that runs as a fork; as much like `subprocess.Popen` as is needed."""

    def __init__(self, warm: _Warm, module: str, argument: str, environment: Mapping[str, str]):
        self._warm = warm
        self.returncode: int | None = None
        output, theirs = os.pipe()
        self.stdout: IO[bytes] = os.fdopen(output, "rb")
        asked = {"module": module, "argument": argument, "environment": dict(environment), "folder": str(Path.cwd())}
        try:
            socket.send_fds(warm.socket, [json.dumps(asked).encode()], [theirs])
        finally:
            os.close(theirs)
        self.pid = int(self._told())

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code, at most so many seconds.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if self.returncode is None:
            if not select.select([self._warm.socket], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            try:
                self.returncode = int(self._told())
                _idle.append(self._warm)
            except OSError:  # the warm process was killed, and its fork with it
                self.returncode = -signal.SIGKILL
        return self.returncode

    def terminate(self) -> None:
        """Ask it to end, unless it has."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        os.kill(self.pid, signal.SIGKILL)

    def _told(self) -> bytes:
        message = self._warm.socket.recv(64)
        if not message:
            raise ConnectionResetError("the warm process ended")
        return message


Process = subprocess.Popen[bytes] | Fork  # of a job


def _serve(control: socket.socket, preloaded: list[str]) -> NoReturn:
    """The warm process: import, then fork once for each message, and tell the fork's number and then its exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever asks, and for the job
    for name in preloaded:
        import_module(name)
    while True:
        message, outputs, _, _ = socket.recv_fds(control, LONGEST_MESSAGE, 1)
        if not message:
            os._exit(0)  # whoever asked is gone
        pid = os.fork()
        if not pid:
            control.close()
            _become(json.loads(message), outputs[0])
        os.close(outputs[0])
        control.send(str(pid).encode())
        ended = os.pidfd_open(pid)
        if control in select.select([control, ended], [], [])[0]:  # nothing is asked while a job runs: it was closed
            os._exit(0)  # and the fork is told by the kernel
        os.close(ended)
        control.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())


def _become(asked: dict, output: int) -> NoReturn:
    """The fork: run the module as `python -m` does, and end as Python does, but at once."""
    code: object = 1
    try:
        die_with_parent()
        _libc.prctl(PR_SET_NAME, asked["module"].encode())  # what `ps` and `top` show
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["folder"])
        sys.argv = [asked["module"], asked["argument"]]
        runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
