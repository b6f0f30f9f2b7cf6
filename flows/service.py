"""A Prefect server and a worker on this machine, and what is registered there: pool, deployments, automations.

Everything is idempotent: what is there is left, or brought up to date. The server keeps its records in
`$LION_HOME/prefect/server.db`, or where PREFECT_SERVER_DATABASE_CONNECTION_URL says (PostgreSQL for a team).
"""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import yaml
from prefect.automations import Automation
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import PREFECT_API_URL

from storage.files import home, write_atomic
from tasks.jobs.process import stop as end

DEPLOYMENTS = Path("deployments/prefect.yaml")  # in the repository's root
AUTOMATIONS = Path("deployments/automations.yaml")
START_SECONDS, STOP_SECONDS = 120, 20
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SERVER_AUTH = "PREFECT_SERVER_API_AUTH_STRING"  # the password that the server asks for
# Which variables a process keeps as they were when it was started, though they may be others by now.
MATTERS = {"server": re.compile("^PREFECT_SERVER_"), "worker": re.compile("^LION_|^PREFECT_API_|_KEY$|_TOKEN$")}


class ServiceError(RuntimeError):
    """The server or the worker cannot be started, or nothing can be registered. The message says why."""


def environment() -> dict[str, str]:
    """What the server, the worker and the worker's flow runs get to see."""
    own = {
        "LION_HOME": str(home()),
        "LION_ROOT": str(Path.cwd()),
        "LION_WORK_POOL": "lion",
        "PREFECT_SERVER_UI_API_URL": "/api",  # of the page's own host, whoever looks at it from wherever
        # Without these two any page that a browser here has open could start runs, which may name a command (`serve`).
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ui_url(),
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_LOCAL_STORAGE_PATH": str(home() / "prefect" / "storage"),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home() / 'prefect' / 'server.db'}",
    }
    return own | os.environ | {"PREFECT_API_URL": PREFECT_API_URL.value()}


def start_server(host: str | None = None) -> bool:
    """Start the server where the API's URL says, and wait until it answers; False where one answers already.

    Args:
        host: the address to listen at, where others shall reach it too.

    Raises:
        ServiceError: it does not come up, would not be heard at that URL, would be open to the network without a
            password, or one that answers there is another home's.
    """
    if _answers():
        if _process("server") is None and "PREFECT_API_URL" not in os.environ:
            raise ServiceError(
                f"{ui_url()} is answered by a server that was not started for {home()}. Its own `lion down` ends it. To use "
                f"it in its place: export PREFECT_API_URL={PREFECT_API_URL.value()}, and LION_WORK_POOL=ANOTHER, as workers of "
                "one pool take each other's runs; all deployments then go there. Or name another port in PREFECT_API_URL."
            )
        return False
    url = urlsplit(PREFECT_API_URL.value())
    listen = host or url.hostname or "127.0.0.1"
    if listen not in LOOPBACK and SERVER_AUTH not in os.environ:
        raise ServiceError(f"Open to the network only with a password: export {SERVER_AUTH}=NAME:PASSWORD")
    if url.path != "/api":  # one that starts would never be heard there
        at = url._replace(path="/api").geturl()
        raise ServiceError(f"A server that is started here has its API at /api: export PREFECT_API_URL={at}")
    _start("server", ["server", "start", "--host", listen, "--port", str(url.port)])
    deadline = time.monotonic() + START_SECONDS
    while not _answers():
        if _process("server") is None or time.monotonic() > deadline:
            raise ServiceError(
                f"the server does not come up at {ui_url()}; another port can be named in PREFECT_API_URL. "
                f"Its log: {_file('server', 'log')}\n{_tail('server')}"
            )
        time.sleep(0.2)
    return True


def is_outdated(name: str) -> bool:
    """Whether our `server` or `worker` was started with other settings than it would be now, as by an earlier version."""
    process = _process(name)
    if process is None:
        return False
    told = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")  # as bytes: psutil turns the ends of lines
    wanted = [setting for setting in environment().items() if MATTERS[name].search(setting[0])]
    return any(os.fsencode("=".join(setting)) not in told for setting in wanted)


def start_worker() -> bool:
    """Start a worker for the pool; False where ours runs already."""
    if _process("worker"):
        return False
    _start("worker", _worker())
    return True


def run_worker(healthcheck: bool = False) -> int:
    """Run a worker in the foreground, as a container does; its exit code. Whatever ends the wait for it ends its runs.

    Prefect's worker kills its flow runs as soon as it is told to stop. In a session of its own Ctrl-C does not tell it.
    """
    command = [*_prefect(), *_worker(), *(["--with-healthcheck"] if healthcheck else [])]
    worker = subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        return worker.wait()
    finally:
        _end_runs(worker.pid)
        end(worker)  # at times it does not hear, and would take the next run


def ui_url() -> str:
    return PREFECT_API_URL.value().removesuffix("/api")


def stop(name: str) -> bool:
    """Stop what was started as `server` or `worker`, with all of its children; False where it does not run."""
    process = _process(name)
    if process is None:
        return False
    _end_runs(process.pid)
    with suppress(psutil.NoSuchProcess):
        process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    while _process(name) and time.monotonic() < deadline:
        time.sleep(0.1)
    if _process(name):
        os.killpg(process.pid, signal.SIGKILL)
    _file(name, "pid").unlink(missing_ok=True)
    return True


def register() -> list[str]:
    """Bring the pool, the deployments and the automations up to date; the names of all that is there now.

    Raises:
        ServiceError: no server answers, or Prefect refuses.
    """
    seen = environment()
    try:
        with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=seen["LION_WORK_POOL"], type="process"))
    except httpx.ConnectError as error:
        raise ServiceError(f"no Prefect server answers at {ui_url()} ({error}). `lion up` starts one.") from None
    entries = yaml.safe_load(DEPLOYMENTS.read_bytes())["deployments"]
    names = [f"{entry['entrypoint'].partition(':')[2]}/{entry['name']}" for entry in entries]
    there = {name: _deployed(name) for name in names}
    command = [*_prefect(), "--no-prompt", "deploy", "--all", "--prefect-file", str(DEPLOYMENTS)]
    done = subprocess.run(command, env=seen, capture_output=True, text=True)
    if done.returncode:
        raise ServiceError(f"Prefect refuses {DEPLOYMENTS}:\n{done.stdout}{done.stderr}")
    for before in filter(None, there.values()):
        _restore_schedules(before)
    told = [name + _no_longer(was, _deployed(name)) for name, was in there.items()]
    return [*told, *(_keep_automation(wanted) for wanted in yaml.safe_load(AUTOMATIONS.read_bytes()))]


def _deployed(deployment: str) -> DeploymentResponse | None:
    """A deployment as it is on the server; null where there is none of this name."""
    with get_client(sync_client=True) as client:
        try:
            return client.read_deployment_by_name(deployment)
        except ObjectNotFound:
            return None


def _no_longer(was: DeploymentResponse | None, now: DeploymentResponse | None) -> str:
    """What a deployment was until it was registered anew, beside its schedules: somebody may count on it."""
    if was is None or now is None:
        return ""
    told = []
    if was.work_pool_name != now.work_pool_name:
        told.append(f"its runs go to pool {now.work_pool_name}, no longer to {was.work_pool_name}")
    names = was.parameters.keys() | now.parameters.keys()
    if changed := sorted(name for name in names if was.parameters.get(name) != now.parameters.get(name)):
        told.append(f"its parameters are those of {DEPLOYMENTS} again: {', '.join(changed)}")
    return f" ({'; '.join(told)})" if told else ""


def _restore_schedules(before: DeploymentResponse) -> None:
    """Give a deployment back the schedules that it had, switched on or off as they were: Prefect replaces them all.

    What is there is changed, as with a schedule that is deleted go the runs that are due and wait for a worker.
    """
    fields = set(DeploymentScheduleCreate.model_fields)
    wanted = [each.model_dump(include=fields) for each in before.schedules]
    with get_client(sync_client=True) as client:
        made = client.read_deployment_schedules(before.id)
        for there, settings in zip(made, wanted):
            client.update_deployment_schedule(before.id, there.id, **settings)
        for surplus in made[len(wanted) :]:
            client.delete_deployment_schedule(before.id, surplus.id)
        if lacking := wanted[len(made) :]:
            client.create_deployment_schedules(before.id, [DeploymentScheduleCreate(**each) for each in lacking])


def _keep_automation(wanted: dict[str, Any]) -> str:
    """Make an automation, or bring it up to date; switched off while the block that it notifies by is not there.

    One that is as it should be is left alone: updated, it would forget the runs whose next heartbeat it waits for.
    """
    actions, enabled = [], True
    for action in wanted["actions"]:
        if block := action.get("block"):
            try:
                found = Block.load(block)
                assert isinstance(found, Block)
                action = {key: value for key, value in action.items() if key != "block"}
                action["block_document_id"] = found._block_document_id
            except ValueError:  # no such block
                action, enabled = {"type": "do-nothing"}, False
        actions.append(action)
    automation = Automation.model_validate(wanted | {"actions": actions, "enabled": enabled})
    with get_client(sync_client=True) as client:
        there = client.read_automations_by_name(automation.name)
        for surplus in there[1:]:
            client.delete_automation(surplus.id)
    if not there:
        automation.create()
    elif there[0].model_dump(exclude={"id"}) != automation.model_dump(exclude={"id"}):
        automation.id = there[0].id
        automation.update()
    return automation.name + ("" if enabled else " (off: there is no block to notify by)")


def _answers() -> bool:
    """Whether a Prefect server answers at the API's URL: in JSON, where others have a page for any address."""
    try:
        reply = httpx.get(f"{PREFECT_API_URL.value()}/health", timeout=2)
    except httpx.HTTPError:
        return False
    return reply.status_code in (200, 401) and reply.headers.get("content-type", "").startswith("application/json")


def _prefect() -> list[str]:
    return [sys.executable, "-m", "prefect"]


def _worker() -> list[str]:
    pool = environment()["LION_WORK_POOL"]
    return ["worker", "start", "--pool", pool, "--type", "process", "--install-policy", "never"]


def _end_runs(worker: int) -> None:
    """End a worker's flow runs, before it.

    They write down what they have and keep the answers under way, for which a worker leaves no time.
    """
    with suppress(psutil.NoSuchProcess):
        runs = psutil.Process(worker).children()
        for run in runs:
            with suppress(psutil.NoSuchProcess):
                run.terminate()
        psutil.wait_procs(runs, timeout=STOP_SECONDS)


def _start(name: str, arguments: list[str]) -> None:
    """Start a Prefect process that outlives this one, in a session of its own."""
    _file(name, "log").parent.mkdir(parents=True, exist_ok=True)
    with _file(name, "log").open("a") as log:
        child = subprocess.Popen(
            [*_prefect(), *arguments],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    write_atomic(_file(name, "pid"), str(child.pid))


def _process(name: str) -> psutil.Process | None:
    """The process that was started by this name, if it still runs and is what it was."""
    with suppress(OSError, ValueError, psutil.Error):
        process = psutil.Process(int(_file(name, "pid").read_bytes()))
        command, ours = " ".join(process.cmdline()), process.environ().get("LION_HOME") == str(home())
        if ours and "prefect" in command and name in command:
            return process
    return None


def _file(name: str, ending: str) -> Path:
    return home() / "prefect" / f"{name}.{ending}"


def _tail(name: str) -> str:
    return "\n".join(_file(name, "log").read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
