"""The flows that deployments run: typed parameters for the form in the Prefect UI and for `--param`.

    prefect deployment run distill/offline --param iterations=1
    prefect deployment run distill/offline --param 'discriminate={"threshold": 0.4}'

What is changed from run to run stands at the top. Beneath are the groups of settings, a stage each, folded while they
are None, which means: as in the preset. What a group says is laid upon the preset's, as `--set` does. The form of the
UI says all of a group once it is opened, and fills it with the paper's values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.exceptions import Pause
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed
from pydantic import BaseModel, Field

from flows.approval import NotApproved
from flows.chain import begun_by, is_begun, settled
from flows.config import Approve, ApproveWithin, Iterations, StartFrom, resolve
from flows.distill import distill as loop
from flows.evaluate import EvaluateConfig
from flows.evaluate import evaluate as study
from flows.finetune import finetune_on_file
from tasks.discriminate import DiscriminateConfig
from tasks.evaluate import EvaluationConfig
from tasks.finetune import FinetuneConfig
from tasks.generate import GenerateConfig
from tasks.models.budget import Budget
from tasks.models.errors import BudgetReached
from tasks.referee import RefereeConfig
from tasks.seed import SeedConfig
from tasks.selection import StopConfig
from tasks.shards import TaskRunner
from tasks.student import StudentConfig
from tasks.teacher import TeacherConfig


@contextmanager
def _says_when_it_leaves() -> Iterator[None]:
    """Tell the server when a run that was suspended ends its process. Until the end of its stage it sent heartbeats, and
    `lion marks what died` would take it for dead without the next."""
    try:
        yield
    except Pause:
        emit_event("lion.flow-run.left", {"prefect.resource.id": f"prefect.flow-run.{flow_run.id}"})
        raise


# What a form or a command says is part of a preset's settings, and is checked once it is laid upon them (`resolve`).
@flow(name="distill", flow_run_name="{preset} · iterations {iterations} · from {start_from}", validate_parameters=False)
@_says_when_it_leaves()
def distill(
    iterations: Iterations = 3,
    start_from: StartFrom = "base",
    approve: Approve = "none",
    approve_within: ApproveWithin = 86_400,
    preset: str = "lion-7b",
    name: str | None = None,
    seed: int | None = None,
    seeds: SeedConfig | None = None,
    teacher: TeacherConfig | None = None,
    student: StudentConfig | None = None,
    finetune: FinetuneConfig | None = None,
    referee: RefereeConfig | None = None,
    discriminate: DiscriminateConfig | None = None,
    generate: GenerateConfig | None = None,
    budget: Budget | None = None,
    evaluation: EvaluationConfig | None = None,
    keep: Literal["best", "last"] | None = None,
    stop: StopConfig | None = None,
    task_runner: TaskRunner | None = None,
) -> State[Any]:
    """Turn the loop of imitation, discrimination and generation. What is already done is found again.

    Args:
        iterations: How often the loop turns.
        start_from: base; latest (where the last run of this name ended; one that failed is resumed first); run:ID or
            run:ID:ITERATION.
        approve: Wait for a person before each iteration, with what it will ask of models (spend), or after each, with
            what came of it (iteration).
        approve_within: Seconds that a question to a person stays open. Then the run ends, with everything kept.
        preset: Where all settings come from that are not said here.
        name: The run's name; runs of one name make a chain with start_from latest.
        seed: Of everything random.
        seeds: The first instructions, and the held-out ones.
        teacher: The model that is learned from.
        student: The compact model that learns.
        finetune: Imitation. How the student is trained.
        referee: Who compares the two models' answers.
        discriminate: Where hard begins.
        generate: Who writes new instructions, and how many.
        budget: What a run may spend at most.
        evaluation: The held-out check after each iteration.
        keep: Whether a student that is worse than an earlier one is built upon (last) or not (best).
        stop: When the loop ends before its last iteration.
        task_runner: What runs the shards of a local model: threads on the worker's machine, or Ray.
    """
    config = resolve(preset, **_said(locals()))
    begun = begun_by(flow_run.id) if start_from == "latest" else []
    if begun and all(run.state == "completed" for run in begun):
        done = ", ".join(run.run_id for run in begun)
        return Completed(message=f"Runs: {done}, which are done by now. A flow run of its own turns the loop further.")
    tonight = settled(config)
    runs = []
    try:
        if start_from == "latest" and is_begun(tonight):
            runs.append(loop.fn(tonight))  # what failed last night comes first
            tonight = settled(config)
        # Who goes on with what it had begun, retried or resumed, asks for no further iterations. A run that somebody has
        # just stopped before its first iteration ended where it began.
        if not runs or (not begun and tonight.run_id not in runs):
            runs.append(loop.fn(tonight))
    except BudgetReached as error:
        return Failed(name="BudgetReached", message=str(error))
    except NotApproved as error:
        return Cancelled(message=str(error))
    return Completed(message=f"Runs: {', '.join(runs)}")


@flow(name="evaluate", flow_run_name="evaluate {student} on {questions}", validate_parameters=False)
@_says_when_it_leaves()
def evaluate(
    student: str | None = None,
    questions: str = "bundled",
    reference: str = "teacher",
    max_questions: Annotated[int, Field(ge=1)] | None = None,
    preset: str = "lion-7b",
    referee: RefereeConfig | None = None,
) -> State[Any]:
    """Score one student against a reference. The same question again is answered from what is there.

    Args:
        student: RUN, RUN/ITERATION, a folder or a Hub id; None is the last run's best.
        questions: The held-out instructions (bundled), FastChat's question.jsonl, or any form of seeds.
        reference: teacher (the preset's), a file of answers, or a checkpoint, named as a student is.
        max_questions: Only the first so many.
        preset: Teacher, sampling and seed.
        referee: Who judges; None is the preset's.
    """
    asked = {"student": student, "questions": questions, "reference": reference, "max_questions": max_questions}
    config = EvaluateConfig(**asked, distill=resolve(preset, **_said({"referee": referee})))
    return Completed(message=f"Study: {study.fn(config)}")


@flow(name="finetune", flow_run_name="finetune on {data}", validate_parameters=False)
@_says_when_it_leaves()
def finetune(
    data: str, preset: str = "lion-7b", student: StudentConfig | None = None, finetune: FinetuneConfig | None = None
) -> State[Any]:
    """Train on a file of answers, without the loop.

    Args:
        data: Rows with answers, Alpaca or messages, on the worker's machine.
        preset: Where all settings come from that are not said here.
        student: The compact model that learns.
        finetune: How it is trained.
    """
    trained = finetune_on_file(resolve(preset, **_said({"student": student, "finetune": finetune})), data)
    return Completed(message=f"Model: {trained.checkpoint.path}")


def _said(parameters: dict[str, Any]) -> dict[str, Any]:
    """The settings among the parameters that somebody gave."""
    return {
        name: value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value
        for name, value in parameters.items()
        if value is not None and name != "preset"
    }
