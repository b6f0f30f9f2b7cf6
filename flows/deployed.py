"""The flows that deployments run: typed parameters for the form in the Prefect UI and for `--param`.

    prefect deployment run distill/offline --param iterations=1

What is changed from run to run stands at the top; the settings are folded beneath, a group for each stage. A
deployment holds its preset's settings in full, so that the form shows what will run. A nested group that is given by
`--param settings={...}` replaces all settings: take them from `lion config`.
"""

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed

from flows.approval import NotApproved
from flows.chain import is_begun, settled
from flows.config import Approve, DistillConfig, Iterations, Settings, StartFrom, resolve
from flows.distill import distill as loop
from tasks.models.errors import BudgetReached


@flow(name="distill", flow_run_name="{settings.name} · iterations: {iterations} · from {start_from}")
def distill(
    iterations: Iterations = 3,
    start_from: StartFrom = "base",
    approve: Approve = "none",
    settings: Settings = Settings(),
) -> State[Any]:
    """Turn the loop of imitation, discrimination and generation. What is already done is found again.

    Args:
        iterations: How often the loop turns.
        start_from: base, latest (the end of the last run of this name; a failed one is resumed first), or
            run:ID[:ITERATION].
        approve: Wait for a person before each iteration, with what it will ask of models (spend), or after each, with
            what came of it (iteration).
        settings: Who takes part, and how; a group for each stage.
    """
    config = DistillConfig(**dict(settings), iterations=iterations, start_from=start_from, approve=approve)
    tonight = settled(config)
    runs = []
    try:
        if start_from == "latest" and is_begun(tonight):
            runs.append(loop.fn(tonight))  # what failed last night comes first
            tonight = settled(config)
        if not runs or flow_run.run_count == 1:  # a retry was for what failed, and asks for no further iterations
            runs.append(loop.fn(tonight))
    except BudgetReached as error:
        return Failed(name="BudgetReached", message=str(error))
    except NotApproved as error:
        return Cancelled(message=str(error))
    return Completed(message=f"Runs: {', '.join(runs)}")


def preset_parameters(preset: str, name: str | None = None) -> dict[str, Any]:
    """For deployments/prefect.yaml: the parameters of a preset's deployment, complete.

    Args:
        name: of its runs, where they shall be told from other runs of the preset.

    Raises:
        ConfigError: there is no such preset, or it is not valid.
    """
    config = resolve(preset, [f"name={name}"] if name else [])
    top = ("iterations", "start_from", "approve")
    settings = Settings(**{key: value for key, value in dict(config).items() if key not in top})
    return {key: getattr(config, key) for key in top} | {"settings": settings.model_dump(mode="json")}
