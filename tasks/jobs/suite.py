"""Runs suites of EleutherAI's lm-eval on a checkpoint: `python -m tasks.jobs.suite FOLDER/job.json`.

`job.json`: {"model", "suites", "include": folder with task files or null, "limit": rows a task or null, "seed"}.
`result.json` holds what lm-eval says of each task, in its own words.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from tasks.jobs.launch import REFUSED, finish


def main(job_file: Path) -> None:
    """Run one job: see the module's docstring."""
    job = json.loads(job_file.read_bytes())
    tasks = TaskManager(include_path=job["include"])
    known = set(tasks.all_tasks)
    if unknown := [name for name in job["suites"] if name not in known]:
        raise SystemExit(f"{REFUSED}lm-eval knows no task {unknown[0]!r}; `lm-eval ls tasks` lists them")
    found: dict[str, Any] = simple_evaluate(
        model="hf",
        model_args={"pretrained": job["model"], "dtype": "auto"},
        tasks=job["suites"],
        task_manager=tasks,
        limit=job["limit"],
        device="cuda" if torch.cuda.is_available() else "cpu",
        batch_size=8,
        random_seed=job["seed"],
        numpy_random_seed=job["seed"],
        torch_random_seed=job["seed"],
        fewshot_random_seed=job["seed"],
        log_samples=False,
    )
    said = {key: found[key] for key in ("results", "versions", "n-shot", "n-samples") if key in found}
    finish(job_file.parent, json.loads(json.dumps(said, default=str)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
