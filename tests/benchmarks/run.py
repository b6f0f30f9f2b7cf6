"""Runs benchmarks and keeps their history: `python -m tests.benchmarks.run [NAME]`.

A benchmark is a module beside this one with `run()`, which returns figures: name, value, unit, against, ratio.
`ratio` says how many times better than the named alternative, measured in the same run. Each figure becomes a line
of `history.jsonl`, negative results too.
"""

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).parent
NOT_BENCHMARKS = {"__init__", "run"}


def main(only: str | None) -> None:
    names = sorted({path.stem for path in HERE.glob("*.py")} - NOT_BENCHMARKS)
    if only is not None and only not in names:
        sys.exit(f"no benchmark {only!r}. There are: {', '.join(names)}.")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
    ).stdout.strip()
    where = {"commit": commit, "date": datetime.now(UTC).date().isoformat(), "machine": machine()}
    for name in [only] if only else names:
        for figure in importlib.import_module(f"tests.benchmarks.{name}").run():
            ratio = "" if figure["ratio"] is None else f"{figure['ratio']:,.2f}x {figure['against']}"
            print(f"{figure['name']:<28} {figure['value']:>12,.4g} {figure['unit']:<16} {ratio}", flush=True)
            with (HERE / "history.jsonl").open("a") as history:
                history.write(json.dumps(figure | where) + "\n")


def machine() -> str:
    """Processor, number of cores, and GPUs: enough to know which lines can be compared."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return ", ".join([model, f"{os.cpu_count()} cores", *gpu_names()])


def gpu_names() -> list[str]:
    """What the driver calls them."""
    if shutil.which("nvidia-smi") is None:
        return []
    asked = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    return asked.stdout.splitlines()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
