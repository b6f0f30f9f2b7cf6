"""A headless Chromium for tests, by playwright. With LION_SCREENSHOTS=FOLDER its pictures are left there."""

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")


@contextmanager
def open_page() -> Iterator["Page"]:
    """One page of a browser of its own."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install -e '.[dev]')")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


@contextmanager
def by_itself(page: "Page", own: str) -> Iterator[None]:
    """Every request that the page makes meanwhile goes to addresses that begin with `own`."""
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    yield
    strangers = [address for address in requested if not address.startswith((own, "about:", "data:"))]
    assert requested and not strangers, strangers


def picture(page: "Page", name: str, folder: Path) -> None:
    """Take a picture of the whole page, into `folder` unless pictures are wanted elsewhere."""
    page.screenshot(path=Path(os.environ.get("LION_SCREENSHOTS") or folder) / f"{name}.png", full_page=True)


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The app at an address of this machine."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(20)
