"""A student on public suites of tasks, by EleutherAI's lm-eval in a process of its own.

lion evaluate --suite arc_easy,hellaswag
"""

import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flows.students import Student
from flows.terminal import Refusal
from storage.files import digest_of, digest_of_file, home, write_atomic
from storage.studies import Study
from tasks.jobs.launch import run_job
from tasks.report import report_study


def evaluate_on_suites(
    student: Student, suites: list[str], include: Path | None, limit: int | None, seed: int
) -> Study:
    """Run the suites, keep lm-eval's figures with the run that made the student, and return them as a study.

    Args:
        include: a folder with task files of one's own, in lm-eval's form.
        limit: rows of each task; by default all.

    Raises:
        Refusal: lm-eval is not installed, or the folder is none.
        JobRefused: it knows no such task.
        JobError: it ended without a result.
    """
    if find_spec("lm_eval") is None:
        raise Refusal("suites need the extra: pip install 'lion-distill[suites]'")
    if include is not None and not include.is_dir():
        raise Refusal(f"{include}: no such folder. Name the one that holds your task files.")
    files = sorted(path for path in include.rglob("*") if path.is_file()) if include else []  # where lm-eval looks
    own = {str(path.relative_to(include)): digest_of_file(path) for path in files} if include else {}
    settings = {"suites": suites, "limit": limit, "seed": seed, "lm_eval": version("lm_eval"), "own_tasks": own}
    digest = digest_of([student.checkpoint.digest, settings])
    job = {
        "model": str(student.checkpoint.path),
        "suites": suites,
        "include": str(include.resolve()) if include else None,
        "limit": limit,
        "seed": seed,
    }
    found = run_job("tasks.jobs.suite", job, home() / "jobs" / digest)
    study = Study(
        study_id=f"suite-{digest[:8]}",
        student=student.name,
        checkpoint=student.checkpoint,
        run_id=student.run_id,
        iteration=student.iteration,
        reference="lm-eval",
        questions=",".join(suites),
        rows=0,
        settings=settings,
        suite={task: _figures(said) for task, said in found["results"].items()},
    )
    write_atomic(study.folder / "lm-eval.json", json.dumps(found, indent=2))
    study.save()
    report_study(study.run_id)
    return study


def _figures(said: dict[str, Any]) -> dict[str, Any]:
    """A task's metrics, `acc,none` called `acc`."""
    return {name.removesuffix(",none"): value for name, value in said.items() if isinstance(value, int | float)}
