"""The paid client against bespokelabs-curator: requests a second on one core, and how memory grows.

One server at zero latency has a core of its own; each client has the other. Ours keeps its journal durable.
curator lives in a virtual environment of its own under ~/.cache/lion-bench, made at the first run.

    python -m tests.benchmarks.client
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.benchmarks.run import figure, install

ROOT = Path(__file__).parents[2]
CURATOR = Path.home() / ".cache" / "lion-bench" / "curator"
REQUESTS, MANY, CONCURRENCY = 10_000, 100_000, 128
CLIENT_CORE, SERVER_CORE = 0, (os.cpu_count() or 1) - 1
RUN_SECONDS = 500

OURS = """
import json, resource, sys, time
from tasks.models.budget import Account
from tasks.models.chat import Request, Sampling
from tasks.models.client import answer_all
from tasks.models.endpoint import OpenAIModel
url, count, concurrency = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
ask = lambda n, what: answer_all(
    OpenAIModel(model="gpt-4.1-mini", base_url=url, max_concurrency=concurrency),
    [Request(str(i), ({"role": "user", "content": f"{what} {i}: what is the capital of Australia?"},)) for i in range(n)],
    Sampling(), Account(run_id="bench", role="teacher"), lambda done, total, figures: None)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
ask(500, "warm")
before, started = peak(), time.perf_counter()
replies = ask(count, "row")
seconds = time.perf_counter() - started
assert len(replies) == count and all(reply.status == "ok" for reply in replies)
print(json.dumps({"seconds": seconds, "growth": peak() - before}))
"""

# tiktoken would download its vocabulary: a stand-in that counts as fast as can be.
THEIRS = """
import json, os, sys, time, types
stub = types.ModuleType("tiktoken")
class Encoding:
    name = "stub"
    def encode(self, text, **options): return [0] * (len(text) // 4 + 1)
    encode_ordinary = encode
stub.Encoding = Encoding
stub.encoding_for_model = stub.get_encoding = lambda name: Encoding()
stub.encoding_name_for_model = lambda name: "stub"
import importlib.machinery
stub.__spec__ = importlib.machinery.ModuleSpec("tiktoken", None)
sys.modules["tiktoken"] = stub
from bespokelabs import curator
url, count, concurrency = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def ask(n, what):
    model = curator.LLM(model_name="gpt-4.1-mini", backend="openai", backend_params={
        "base_url": url, "api_key": "none", "max_concurrent_requests": concurrency,
        "max_requests_per_minute": 10**8, "max_tokens_per_minute": 10**10, "require_all_responses": True})
    return model([f"{what} {i}: what is the capital of Australia?" for i in range(n)])
ask(500, "warm")
started = time.perf_counter()
answers = ask(count, "row")
seconds = time.perf_counter() - started
assert len(getattr(answers, "dataset", answers)) == count
print(json.dumps({"seconds": seconds}))
"""


def run() -> list[dict[str, Any]]:
    """Throughput, against curator's in the same run, and the growth of memory."""
    with _server() as url:
        ours = _measured([sys.executable, "-c", OURS, url, str(REQUESTS), str(CONCURRENCY)])
        rate = REQUESTS / ours["seconds"]
        theirs, why_not = None, install("bespokelabs-curator", CURATOR)
        if why_not is None:
            command = [str(CURATOR / "bin" / "python"), "-c", THEIRS, url, str(REQUESTS), str(CONCURRENCY)]
            try:
                theirs = REQUESTS / _measured(command)["seconds"]
            except (subprocess.SubprocessError, ValueError) as error:
                why_not = f"it failed: {str(getattr(error, 'stderr', '') or error).strip()[-200:]}"
        grown = _measured([sys.executable, "-c", OURS, url, str(MANY), str(CONCURRENCY)])["growth"]
    against = f"bespokelabs-curator ({theirs:.0f} requests/s)" if theirs else f"bespokelabs-curator not run: {why_not}"
    return [
        figure("client", rate, "requests/s", against, rate / theirs if theirs else None),
        figure("client-memory", grown, f"MB for {MANY:,} requests", "the limit of 100 MB", 100 / max(grown, 1)),
    ]


@contextmanager
def _server() -> Iterator[str]:
    """The fake server on its core; its URL."""
    command = ["taskset", "-c", str(SERVER_CORE), sys.executable, "-m", "tests.fake_openai", "--quick"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.kill()


def _measured(command: list[str]) -> dict[str, Any]:
    """What a client printed last, run on its core in a home of its own."""
    with tempfile.TemporaryDirectory() as home:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "LION_HOME": home,
            "OPENAI_API_KEY": "none",
            "CURATOR_CACHE_DIR": home,
            "CURATOR_DISABLE_RICH_DISPLAY": "1",
            "TELEMETRY_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        }
        done = subprocess.run(
            ["taskset", "-c", str(CLIENT_CORE), *command],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=RUN_SECONDS,
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    for row in run():
        print(json.dumps(row))
