"""What all tests share: a home of their own, a quiet Prefect, and a tiny model."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tasks.jobs.process import gpus

NOBODYS = tempfile.mkdtemp(prefix="lion-tests-")  # the home of a test that names none; nobody's own is touched
atexit.register(shutil.rmtree, NOBODYS, ignore_errors=True)

os.environ |= {
    "LION_HOME": NOBODYS,
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_API_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:///:memory:",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # as the command line has it: a busy machine takes long
    "HF_HUB_OFFLINE": "1",
    "PREFECT_PROFILES_PATH": os.devnull,  # a server of the tests' own, not the one that prefect.toml leads to
}
if not gpus():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels of a GPU run as they can; read where they are defined

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home."""
    monkeypatch.setenv("LION_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised Llama of four layers with a tokenizer of its own."""
    from tests.tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def shared_data() -> Path:
    """Public instruction sets beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("needs the public instruction sets in ../shared/data")
    return SHARED
