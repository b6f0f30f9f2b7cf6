"""How fast the engine answers beside servers of the same weights, with the embedded SmolLM2-135M on this machine.

    python -m tests.benchmarks.server

The prompts of `tests.benchmarks.inference`, all asked at once, at most 128 new tokens, greedy, fp32. Rates are
generated tokens per second, from the first request to the last reply; loading is not in it. The alternatives:

- *transformers serve --continuous-batching*, 64 requests at a time. Timed on every 4th prompt.
- *llama-server*, where it is installed: 16 slots of the same weights as GGUF (f32), on every 4th prompt.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tasks.jobs.convert import EMBEDDED, convert
from tasks.jobs.engine import Engine, Sampling
from tasks.jobs.served import Served, free_port, serve_command
from tests.benchmarks.inference import MAX_TOKENS, make_requests, seconds

ROWS, EVERY, PRECISION = 64, 4, "fp32"
TRANSFORMERS = Path(sys.executable).with_name("transformers")
SERVERS = {
    "transformers serve --continuous-batching": f"{TRANSFORMERS} serve {{model}} --host 127.0.0.1 --port {{port}} "
    "--device cpu --dtype float32 --continuous-batching",
}


def run() -> list[dict[str, Any]]:
    requests, sampling = make_requests(), Sampling(max_tokens=MAX_TOKENS)
    figures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        convert(EMBEDDED, folder)
        ours = rate(Engine(folder, PRECISION, ROWS), requests, sampling)
        for label, command in SERVERS.items():
            if shutil.which(command.split()[0]) is None:
                continue
            port = free_port()
            with Served(serve_command(str(folder), port, command, PRECISION, 1), port, str(folder), ROWS) as server:
                theirs = rate(server, requests[::EVERY], sampling)
            against = f"{label} ({theirs:.0f}/s)"
            figures.append(
                {
                    "name": "inference-vs-server",
                    "value": ours,
                    "unit": "tokens/s",
                    "against": against,
                    "ratio": ours / theirs,
                }
            )
    return figures


def rate(engine: Engine | Served, requests: list[dict[str, Any]], sampling: Sampling) -> float:
    """Generated tokens per second, after a short warm-up."""
    list(
        engine.generate(
            [{**request, "id": f"warm {request['id']}"} for request in requests[:4]], Sampling(max_tokens=8)
        )
    )
    took, batches = seconds(lambda: list(engine.generate(requests, sampling)))
    return sum(reply["completion_tokens"] for batch in batches for reply in batch) / took


if __name__ == "__main__":
    for row in run():
        print(json.dumps(row))
