"""A server for a team: its records in a real PostgreSQL, and a password before it answers anybody."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tasks.jobs.process import free_port
from tests.service import Service

PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
AUTH = "lion:a-password-of-the-tests"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.flaky(reruns=1),
    pytest.mark.timeout(900),
    pytest.mark.skipif(PROGRAMS is None, reason="needs PostgreSQL (apt-get install postgresql)"),
]


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """URL of an empty database. PostgreSQL does not run as root, so root lends it the user postgres."""
    assert PROGRAMS is not None
    user = "postgres" if os.geteuid() == 0 else None
    folder = Path(
        subprocess.run(["mktemp", "-d"], user=user, capture_output=True, text=True, check=True).stdout.strip()
    )
    port = free_port()

    def run(program: str, *arguments: str) -> None:
        subprocess.run([PROGRAMS / program, *arguments], user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL)

    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder} -c fsync=off"
    run("initdb", "-D", f"{folder}/data", "-U", "prefect", "--auth=trust")
    run("pg_ctl", "-D", f"{folder}/data", "-o", options, "-l", f"{folder}/log", "-w", "start")
    try:
        yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"
    finally:
        run("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")
        shutil.rmtree(folder)


def test_a_run_on_postgres_behind_a_password(service: Service, database: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(service.home, home, ignore=shutil.ignore_patterns("prefect", "runs", "locks"))  # what is cached
    team = Service(
        home,
        service.tiny,
        PREFECT_SERVER_DATABASE_CONNECTION_URL=database,
        PREFECT_SERVER_API_AUTH_STRING=AUTH,
    )
    try:
        team.lion("up")
        assert httpx.get(f"{team.url}/api/admin/version").status_code == 401
        run = team.start()
        team.wait(run, "Completed")
        assert team.artifacts(run)["smoke-iterations"]
        assert not list(home.glob("prefect/*.db"))
    finally:
        started = time.monotonic()
        team.lion("down")
        assert time.monotonic() - started < 60


def test_a_server_is_not_opened_to_the_network_without_a_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.service import ServiceError, start_server

    monkeypatch.setenv("LION_HOME", str(tmp_path))
    monkeypatch.delenv("PREFECT_SERVER_API_AUTH_STRING", raising=False)
    with pytest.raises(ServiceError, match="password"):
        start_server("0.0.0.0")
    assert not list(tmp_path.iterdir())
