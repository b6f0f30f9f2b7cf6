"""A real Prefect server and worker on 127.0.0.1, started by `lion up`, and the few calls of its API that tests need."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx

from flows.config import resolve
from tasks.jobs.process import free_port
from tests.lion import COMMAND

ROOT = Path(__file__).parents[1]
# What tests/conftest.py says to the Prefect of the tests' own process.
NOT_FOR_THE_SERVER = {"PREFECT_LOGGING_LEVEL", "PREFECT_API_DATABASE_CONNECTION_URL"}


class Service:
    """`lion up` in a home of its own, at a free port, every role played by the tiny model."""

    def __init__(self, home: Path, tiny: Path, **environment: str):
        self.url = f"http://127.0.0.1:{free_port()}"
        self.home, self.tiny = home, tiny
        kept = {name: value for name, value in os.environ.items() if name not in NOT_FOR_THE_SERVER}
        own = {"LION_HOME": str(home), "PREFECT_API_URL": f"{self.url}/api", "COLUMNS": "200"}
        self.environment = kept | own | environment
        password = environment.get("PREFECT_SERVER_API_AUTH_STRING")
        auth = tuple(password.split(":")) if password else None
        self.api = httpx.Client(
            base_url=f"{self.url}/api",
            timeout=30,
            auth=auth,  # type: ignore[arg-type]
            event_hooks={"request": [self._with_token]},
        )

    def _with_token(self, request: httpx.Request) -> None:
        """Show the server that no page of somebody else's sends this, as Prefect's own clients do."""
        if request.method in {"POST", "PATCH", "DELETE"}:
            token = self.api.get("/csrf-token", params={"client": "tests"}).json()["token"]
            request.headers.update({"Prefect-Csrf-Client": "tests", "Prefect-Csrf-Token": token})

    def lion(self, *arguments: str) -> str:
        """Run a command of lion to its end."""
        done = subprocess.run([*COMMAND, *arguments], cwd=ROOT, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr + self.log("server") + self.log("worker")
        return done.stdout + done.stderr

    def log(self, name: str) -> str:
        file = self.home / "prefect" / f"{name}.log"
        return file.read_text()[-3000:] if file.exists() else ""

    def post(self, path: str, **body: Any) -> Any:
        reply = self.api.post(path, json=body)
        while reply.status_code == 503:  # SQLite was busy; Prefect's own client asks again too
            time.sleep(1)
            reply = self.api.post(path, json=body)
        assert reply.is_success, reply.text
        return reply.json() if reply.content else None

    def parameters(self, **parameters: Any) -> dict[str, Any]:
        """Parameters of a run of the smoke preset, one iteration by default, with the tiny model."""
        tiny = {"model": {"model_name_or_path": str(self.tiny)}}
        given = {"preset": "smoke", "iterations": 1, "teacher": tiny, "student": tiny, "generate": tiny}
        return given | parameters

    def use_the_tiny_model(self, deployment: str) -> None:
        """Let the deployment itself have it, for runs that are started by its form.

        The groups are said in full: the form would fill a group that is there with the paper's values.
        """
        path = f"model.model_name_or_path={self.tiny}"
        preset = resolve("smoke", [f"{role}.{path}" for role in ("teacher", "student", "generate")])
        groups = preset.model_dump(mode="json", include={"teacher", "student", "generate"})
        found = self.api.get(f"/deployments/name/distill/{deployment}").json()
        patch = {"parameters": found["parameters"] | groups}
        assert self.api.patch(f"/deployments/{found['id']}", json=patch).is_success

    def start(self, deployment: str = "smoke", **parameters: Any) -> str:
        """Ask for a run; its id."""
        found = self.api.get(f"/deployments/name/distill/{deployment}").json()
        return self.post(f"/deployments/{found['id']}/create_flow_run", parameters=self.parameters(**parameters))["id"]

    def state(self, run: str) -> dict[str, Any]:
        return self.api.get(f"/flow_runs/{run}").json()["state"]

    def wait(self, run: str, *names: str, seconds: float = 400, through: str = "") -> dict[str, Any]:
        """Wait until a run is in a state of one of these names, and fail at another end but `through`; that state."""
        deadline = time.monotonic() + seconds
        while (state := self.state(run))["name"] not in names:
            ended = state["type"] in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
            ended = ended and state["name"] != through
            assert not ended and time.monotonic() < deadline, f"{state}\n{self.log('worker')}"
            time.sleep(0.2)
        return state

    def tasks(self, run: str) -> dict[str, str]:
        """The latest state of each task run, by name."""
        found = self.post("/task_runs/filter", flow_runs={"id": {"any_": [run]}}, sort="EXPECTED_START_TIME_DESC")
        return {task["name"]: task["state"]["name"] for task in reversed(found)}

    def artifacts(self, run: str) -> dict[str, Any]:
        """The latest artifact of each key of a run."""
        found = self.post("/artifacts/filter", artifacts={"flow_run_id": {"any_": [run]}}, sort="CREATED_DESC")
        return {artifact["key"]: artifact for artifact in reversed(found)}

    def trainers(self) -> list[int]:
        """Processes of the trainer that work in this home."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                named = (folder / "comm").read_text().strip()
                if named == "tasks.jobs.sft" and f"LION_HOME={self.home}\0" in (folder / "environ").read_text():
                    found.append(int(folder.name))
            except OSError:
                continue
        return found

    def until_it_trains(self, seconds: float = 400) -> int:
        """Wait for a trainer that has a complete checkpoint (`save_steps: 1`) and goes on; its process."""
        deadline = time.monotonic() + seconds
        while not any(list(self.folder_of(one).glob("trainer/checkpoint-*/complete")) for one in self.trainers()):
            assert time.monotonic() < deadline, self.log("worker")
            time.sleep(0.1)
        return self.trainers()[0]

    def folder_of(self, trainer: int) -> Path:
        """Where a trainer keeps what it makes: the checkpoint whose files it has open."""
        checkpoints = self.home / "checkpoints"
        open_files = (line.split(maxsplit=5)[-1] for line in Path(f"/proc/{trainer}/maps").read_text().splitlines())
        kept = (Path(file).relative_to(checkpoints) for file in open_files if file.startswith(f"{checkpoints}/"))
        return next((checkpoints / file.parts[0] for file in kept if file.name == "rows.arrow"), checkpoints / "none")


def process_of_flow(trainer: int) -> int:
    """The process of the flow run that a trainer works for: its parent is the warm process, and the flow that one's."""
    for _ in range(2):
        trainer = int(Path(f"/proc/{trainer}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return trainer


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
