"""Runs benchmarks and keeps their history: `python -m tests.benchmarks.run [NAME]`.

A benchmark is a module beside this one with `run()`, which returns figures. Each becomes a line of `history.jsonl`,
negative results too. What benchmarks share is here: how a figure looks, and how an alternative is installed.
"""

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import venv
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NOT_BENCHMARKS = {"__init__", "run"}
INSTALL_SECONDS = 500


def figure(
    name: str, value: float, unit: str, against: str | None = None, ratio: float | None = None
) -> dict[str, Any]:
    """What was measured; `ratio` times better than the named alternative, measured in the same run."""
    return {"name": name, "value": value, "unit": unit, "against": against, "ratio": ratio}


def install(package: str, folder: Path, *, with_ours: bool = False) -> str | None:
    """Make a virtual environment with a package, unless it is there. Says why where it cannot be made.

    Args:
        with_ours: it sees what this Python has, too.
    """
    done = folder / "installed"
    if done.exists():
        return None
    try:
        venv.create(folder, with_pip=True, clear=True)
        if with_ours:
            packages = next((folder / "lib").glob("python3.*")) / "site-packages"
            (packages / "parent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", package]
        subprocess.run(command, check=True, capture_output=True, timeout=INSTALL_SECONDS, stdin=subprocess.DEVNULL)
    except (subprocess.SubprocessError, OSError) as error:
        return f"it cannot be installed here ({type(error).__name__})"
    done.touch()
    return None


def main(only: str | None) -> None:
    names = sorted({path.stem for path in HERE.glob("*.py")} - NOT_BENCHMARKS)
    if only is not None and only not in names:
        sys.exit(f"no benchmark {only!r}. There are: {', '.join(names)}.")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
    ).stdout.strip()
    where = {"commit": commit, "date": datetime.now(UTC).date().isoformat(), "machine": machine()}
    for name in [only] if only else names:
        for found in importlib.import_module(f"tests.benchmarks.{name}").run():
            ratio = "" if found["ratio"] is None else f"{found['ratio']:,.2f}x {found['against']}"
            print(f"{found['name']:<28} {found['value']:>12,.4g} {found['unit']:<16} {ratio}", flush=True)
            with (HERE / "history.jsonl").open("a") as history:
                history.write(json.dumps(found | where) + "\n")


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
