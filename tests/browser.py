"""A headless Chromium, spoken to by its DevTools protocol: keys, text, screenshots, and every request it makes."""

import base64
import json
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest
import uvicorn
from websockets.sync.client import connect

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
KEYS = {"ArrowLeft": 37, "ArrowDown": 40, "ArrowRight": 39, "Backspace": 8, "Enter": 13}


class Browser:
    """One page. `requested` has the address of every request."""

    def __init__(self, profile: Path):
        assert CHROMIUM
        self._child = subprocess.Popen(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run",
             "--disable-background-networking", f"--user-data-dir={profile}", "--window-size=1200,900", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        port = wait_for(lambda: (profile / "DevToolsActivePort").read_text().split("\n")[0], OSError)
        pages = wait_for(lambda: json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json")), OSError)
        page = next(page for page in pages if page["type"] == "page")
        self._socket = connect(page["webSocketDebuggerUrl"], max_size=None)
        self._id = 0
        self.requested: list[str] = []
        for domain in ("Network", "Page", "Runtime"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()
        self._child.terminate()
        self._child.wait(20)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._id += 1
        self._socket.send(json.dumps({"id": self._id, "method": method, "params": params}))
        while True:
            heard = json.loads(self._socket.recv(timeout=60))
            if heard.get("method") == "Network.requestWillBeSent":
                self.requested.append(heard["params"]["request"]["url"])
            if heard.get("id") == self._id:
                assert "error" not in heard, heard
                return heard["result"]

    def open(self, address: str) -> None:
        self.js("window.left = true")  # so that the page before is not taken for the new one
        self.call("Page.navigate", url=address)
        self.until("!window.left && document.readyState === 'complete'")

    def js(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def until(self, expression: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not self.js(expression):
            assert time.monotonic() < end, f"never became true: {expression}"
            time.sleep(0.05)

    def key(self, key: str) -> None:
        code = KEYS.get(key, ord(key.upper()[0]))
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def strangers(self, own: str) -> list[str]:
        """Requests that went elsewhere."""
        return [address for address in self.requested if not address.startswith((own, "about:", "data:"))]


def wait_for(look: Callable[[], Any], *errors: type[Exception], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while True:
        try:
            return look()
        except errors:
            assert time.monotonic() < end
            time.sleep(0.05)


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The app at an address of this machine."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    port = wait_for(lambda: server.servers[0].sockets[0].getsockname()[1], AttributeError, IndexError)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(20)
