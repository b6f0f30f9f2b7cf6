"""One Prefect server with a worker for all tests that need one: it takes half a minute to come up."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service import Service

KEY = "sk-test-0123456789abcdef"


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Service]:
    """A server and a worker with everything registered; the key is where a worker has it, in its environment."""
    running = Service(tmp_path_factory.mktemp("service") / "home", tiny_model, OPENAI_API_KEY=KEY)
    try:
        running.lion("up")
        running.use_the_tiny_model("smoke")
        yield running
    finally:
        running.lion("down")
