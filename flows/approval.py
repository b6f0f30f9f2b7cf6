"""Waits for a person: the run pauses in Prefect, shows what it is about, and goes on with a typed answer.

`approve: spend` asks before each iteration, with what it will ask of models. `approve: iteration` asks after each
iteration that another one follows (also one of the night before), with what came of it. Answers are kept in the
manifest, so that a run which is started again does not ask the same question twice.
"""

from typing import Literal

from prefect.client.orchestration import get_client
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.runtime import flow_run
from prefect.states import Running
from pydantic import Field

from flows.config import ConfigError, DistillConfig
from flows.estimate import estimate_run, total_usd
from storage.journal import spend_of
from storage.runs import Manifest
from tasks.policies import on_a_server
from tasks.referee import LLMReferee
from tasks.refresh import Pools
from tasks.report import progress_rows

SECONDS_BETWEEN_LOOKS = 2


class NotApproved(RuntimeError):
    """Nobody answered in time."""


class Answer(RunInput):
    """What a person says to go on with."""

    decision: Literal["go on", "stop here"] = Field("go on", description="Stop here keeps everything and ends the run.")
    max_new_rows: int | None = Field(
        None, ge=1, description="Lower the number of new instructions, hard and easy together. Empty: as configured."
    )


class Approval:
    """The questions of one run.

    Raises:
        ConfigError: a person is to be asked, and there is no server where they could answer.
    """

    def __init__(self, config: DistillConfig):
        if config.approve != "none" and not on_a_server():
            raise ConfigError(f"approve: {config.approve} needs a Prefect server (`make up`), where one can answer.")
        self.asks, self.within = config.approve, config.approve_within
        self.is_over = False

    def before(
        self, config: DistillConfig, manifest: Manifest, iteration: int, pools: Pools, unanswered: int
    ) -> DistillConfig:
        """Ask, where this is to be asked; the settings to go on with. `is_over` says that the run shall end here.

        Args:
            config: as it was given, whatever was said before another iteration.
            unanswered: rows that the teacher has not answered.

        Raises:
            NotApproved: nobody answered within `approve_within` seconds.
        """
        known = manifest.approvals.get(iteration)
        asks = self.asks == "spend" or (self.asks == "iteration" and bool(manifest.iterations))
        # Whoever starts a run again that was to stop here may have changed their mind.
        if asks and (known is None or known["decision"] == "stop here"):
            text = forecast(config, manifest, pools, unanswered) if self.asks == "spend" else summary(manifest)
            manifest.save()  # one killed while it waits can be gone on from, too
            known = manifest.approvals[iteration] = self._ask(text, f"{manifest.run_id}-{iteration}").model_dump()
            manifest.save()
        if known is None:
            return config
        answer = Answer(**known)
        self.is_over = asks and answer.decision == "stop here"
        return config if answer.max_new_rows is None else lowered(config, answer.max_new_rows)

    def _ask(self, text: str, key: str) -> Answer:
        try:
            return pause_flow_run(
                wait_for_input=Answer.with_initial_data(description=text),
                timeout=self.within,
                poll_interval=SECONDS_BETWEEN_LOOKS,
                key=f"{key}-{flow_run.run_count}",  # Prefect's own begin anew with each retry, and it knows them already
            )
        except FlowPauseTimeout as error:
            with get_client(sync_client=True) as client:  # the server may have failed the run already: it ends well
                client.set_flow_run_state(flow_run.id, Running(), force=True)
            raise NotApproved(f"nobody answered within {self.within} s. The same run asks again.") from error


def lowered(config: DistillConfig, rows: int) -> DistillConfig:
    """The settings with at most so many new instructions, hard and easy in the same proportion."""
    hard, easy = config.generate.hard_rows, config.generate.easy_rows
    if hard + easy <= rows:
        return config
    fewer_hard = round(rows * hard / (hard + easy))
    generate = config.generate.model_copy(update={"hard_rows": fewer_hard, "easy_rows": rows - fewer_hard})
    return config.model_copy(update={"generate": generate})


def forecast(config: DistillConfig, manifest: Manifest, pools: Pools, unanswered: int) -> str:
    """What the next iteration will ask of models, as Markdown: requests, dollars paid so far, dollars to the run's end."""
    spent = spend_of(manifest.run_id)
    wanted = config.generate.hard_rows + config.generate.easy_rows
    requests = {
        "teacher": unanswered,
        "generator": f"{wanted} to {round(wanted * config.generate.max_attempts)}",
    }
    if isinstance(config.referee, LLMReferee):
        heldout = manifest.baseline.snapshots["heldout"].rows if config.evaluation.by_referee else 0
        requests["referee"] = config.referee.reviews_per_row * (pools.cache.rows + heldout)
    lines = ["| role | requests to come | paid so far |", "|---|---|---|"]
    for role, number in requests.items():
        paid = sum(line.usd for line in spent if line.role == role)
        asked = sum(line.requests for line in spent if line.role == role)
        lines.append(f"| {role} | {number} | ${paid:.2f} for {asked} requests |")
    if config.start_from == "base":  # else the rows that this run begins with are not those that it reckons with
        estimated, _ = estimate_run(config)
        to_come = total_usd(line for line in estimated if line.iteration > len(manifest.iterations))
        lines += ["", f"From here on the run is estimated at ${to_come:.2f} (`lion estimate` shows how)."]
    cap = config.budget.max_usd
    return "\n".join([*lines, "", "The budget has no cap." if cap is None else f"The budget ends at ${cap:.2f}."])


def summary(manifest: Manifest) -> str:
    """What came of the iterations so far, as Markdown."""
    lines = ["| iteration | loss | score | hard | new |", "|---|---|---|---|---|"]
    for row in progress_rows(manifest):
        record = row.record
        figures = ["" if figure is None else f"{figure:.3f}" for figure in (row.loss, row.score)]
        counts = [str(record.hard), str(record.generated.accepted)] if record else ["", ""]
        lines.append(f"| {row.iteration or 'start'} | {' | '.join(figures + counts)} |")
    return "\n".join([*lines, "", f"Report: {manifest.folder / 'report.html'}"])
