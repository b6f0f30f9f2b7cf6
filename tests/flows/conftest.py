"""What several tests of flows need: a browser's page; one Prefect server with a worker, which takes half a minute."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser import open_page
from tests.service import Service

if TYPE_CHECKING:
    from playwright.sync_api import Page

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


@pytest.fixture
def page() -> Iterator["Page"]:
    """A page of a headless Chromium."""
    with open_page() as page:
        yield page
