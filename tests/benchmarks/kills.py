"""A training killed with -9 at ten random moments, and how far its losses are then from an undisturbed one's.

    python -m tests.benchmarks.kills

The tiny model in two processes (ddp). Killed is at random the process that asked for the training, its launcher or one
of its ranks, up to six seconds after the first step of that attempt, or while it still starts.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from storage.pools import write_snapshot
from tasks.jobs.process import ENVIRONMENT
from tasks.jobs.settings import SftSettings
from tests.benchmarks.run import figure
from tests.tiny import TEXTS, make_tiny_model

KILLS, STEPS_SECONDS, START_SECONDS = 10, 6.0, 8.0
SETTINGS = SftSettings(
    strategy="ddp",
    processes_per_node=2,
    num_train_epochs=24,
    precision="fp32",
    learning_rate=1e-3,
    max_length=128,
    global_batch_size=4,
    per_device_train_batch_size=2,
    save_steps=25,
)
FLOW = """
import json, sys
from pathlib import Path
from tasks.jobs.launch import run_job
from tasks.jobs.settings import SftSettings, launcher_command
job = json.loads(sys.argv[1])
run_job("tasks.jobs.sft", job, Path(sys.argv[2]), launcher=launcher_command(SftSettings(**job["config"])),
        on_progress=lambda report: print(report["done"], flush=True))
"""


def run() -> list[dict[str, Any]]:
    """The largest difference of any step's loss, and of the last one."""
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        os.environ["LION_HOME"] = name
        folder = Path(name)
        model = make_tiny_model(folder / "model")
        rows = [
            {
                "instruction_id": str(number),
                "messages": [{"role": "user", "content": text}],
                "response": TEXTS[-number],
                "whole": True,
            }
            for number, text in enumerate(TEXTS)
        ]
        data = write_snapshot("examples", rows, step="benchmark", version=1).path
        job = {"model": str(model), "data": str(data), "config": SETTINGS.model_dump(mode="json"), "seed": 0}
        expected = _whole(job, folder / "undisturbed")
        while_training = 0
        for _ in range(KILLS):
            while_training += _killed(job, folder / "killed", draw)
            assert not (folder / "killed" / "result.json").exists(), "it ended before its ten kills: train longer"
        result = _whole(job, folder / "killed")
    assert [step for step, _ in result["loss_by_step"]] == [step for step, _ in expected["loss_by_step"]]
    differences = [abs(a - b) for (_, a), (_, b) in zip(result["loss_by_step"], expected["loss_by_step"])]
    told = f"{KILLS} kills, {while_training} of them during steps; an undisturbed training"
    return [
        figure("training-kills-any-step", max(differences), "nats off", told),
        figure("training-kills-last-step", differences[-1], "nats off", told),
    ]


def _start(job: dict[str, Any], folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", FLOW, json.dumps(job), str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    return subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, **pipes)


def _whole(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    with _start(job, folder) as flow:
        assert flow.stdout is not None
        for _ in flow.stdout:
            pass
    return json.loads((folder / "result.json").read_text())


def _killed(job: dict[str, Any], folder: Path, draw: random.Random) -> bool:
    """Start a training and kill one of its processes, which must end them all; whether it was at its steps."""
    with _start(job, folder) as flow:
        assert flow.stdout is not None
        stepping = draw.random() < 0.8
        if stepping:
            flow.stdout.readline()  # the first report comes before the first step
        time.sleep(draw.uniform(0, STEPS_SECONDS if stepping else START_SECONDS))
        everyone = [psutil.Process(flow.pid), *psutil.Process(flow.pid).children(recursive=True)]
        os.kill(draw.choice(everyone).pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(everyone[1:], timeout=60)
        assert not alive, f"still there: {alive}"
    return stepping


if __name__ == "__main__":
    for row in run():
        print(json.dumps(row))
