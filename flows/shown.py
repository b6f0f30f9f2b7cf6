"""A run and a study, as the terminal shows them."""

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from flows.terminal import out
from storage.files import StorageError

if TYPE_CHECKING:
    from storage.runs import Manifest
    from storage.studies import Study
    from tasks.report import ProgressRow


def print_run(manifest: "Manifest") -> None:
    """What each iteration of a run did, whether it helped, and how long the stages took."""
    from tasks.report import progress_rows, verdict

    lines = progress_rows(manifest)
    _print_iterations(f"{manifest.run_id} · {manifest.state_now()}", lines)
    try:
        said = verdict(manifest)
    except StorageError as error:  # all else is in the manifest
        said = str(error)
    if said:
        out.print(Text(said, "bold"), soft_wrap=True)
    _print_what_figures_mean(lines)
    _print_seconds(lines)
    for record in manifest.iterations:
        for told in (*record.notes, *record.generated.notes):
            out.print(f"Iteration {record.iteration}: {told}")
        if (judge := record.judge) and judge.pairs:
            out.print(
                f"Iteration {record.iteration}: the referee's winner changes with the order in {judge.flip_share:.0%} "
                f"of {judge.pairs} pairs, {judge.tie_share:.0%} ties, {judge.unusable_share:.0%} unusable reviews"
            )
    if manifest.error:
        out.print(f"Last error: {manifest.error}")
    out.print(f"Report: {manifest.folder / 'report.html'}", soft_wrap=True)


def _print_iterations(title: str, lines: list["ProgressRow"]) -> None:
    from tasks.report import counts

    table = Table(title=title, title_justify="left", title_style="bold")
    judged = any(line.relative for line in lines)
    for name in ("iteration", *counts(None), "loss", "score", *(["judged"] if judged else [])):
        table.add_column(name, justify="right")
    for line in lines:
        record = line.record
        table.add_row(
            str(line.iteration or "start"),
            *counts(record).values(),
            _figure(line.loss, 3) + (" (rolled back)" if record and record.rolled_back else ""),
            _figure(line.score, 2),
            *([f"{line.relative.value:.1%} of {line.judged}" if line.relative else ""] if judged else []),
        )
    out.print(table)


def _print_what_figures_mean(lines: list["ProgressRow"]) -> None:
    if measured := lines[0].measured:
        scored = dict.fromkeys(str(line.scored) for line in lines if line.measured)
        out.print(
            f"Loss: nats per token of the teacher's answers to {measured} of {lines[0].heldout} held-out instructions. "
            f"Score: 1 to 10, mean of {' or '.join(scored)} answers."
        )
    if any(line.relative for line in lines):
        out.print(
            "Judged: the referee's scores of the student's held-out answers, in % of the teacher's, of so many with "
            "valid reviews."
        )


def _print_seconds(lines: list["ProgressRow"]) -> None:
    table = Table(title="Seconds by stage", title_justify="left", title_style="bold")
    table.add_column("stage")
    for line in lines:
        table.add_column(str(line.iteration or "start"), justify="right")
    for stage in dict.fromkeys(name for line in lines for name in line.seconds):
        table.add_row(stage, *(_time(line, stage) for line in lines))
    out.print(table)


def _time(line: "ProgressRow", stage: str) -> str:
    if stage not in line.seconds:
        return ""
    return "cached" if line.cached[stage] else f"{line.seconds[stage]:.1f}"


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def print_study(study: "Study") -> None:
    """A study's figures as a table: over all questions, and by category."""
    relative = study.relative
    assert relative is not None, "a suite has figures of its own"
    title = (
        f"{study.student} against {study.reference} · {study.questions} · referee {study.settings['referee']['kind']}"
    )
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("category", "turns", *relative.overall.by_order, "mean", "95 % interval", "win/tie/lose"):
        table.add_column(name.replace("teacher", "reference"), justify="left" if name == "category" else "right")
    for name, part in [("all", relative.overall), *relative.by_category.items()]:
        orders = [_percent(part.by_order[order].value) for order in relative.overall.by_order if order in part.by_order]
        several = (part.drawn or part.questions) > 1  # of one conversation there is nothing to draw
        interval = f"{_percent(part.mean.low)} to {_percent(part.mean.high)}" if part.mean and several else ""
        mean = _percent(part.mean.value) if part.mean else ""
        table.add_row(
            name, str(part.questions), *orders, mean, interval, f"{part.wins}/{part.ties}/{part.losses}",
            end_section=name == "all",
        )  # fmt: skip
    out.print(table)
    out.print(
        "Relative score: the student's summed scores in % of the reference's. A tie is a difference of at most "
        f"{relative.tie_margin:g} points."
    )
    if effect := relative.overall.position_effect:
        out.print(
            f"Standing first is worth {effect.value:+.2f} points ({effect.low:+.2f} to {effect.high:+.2f}) of a score."
        )
    for line in study.notes:
        out.print(f"Note: {line}")
    out.print(f"Answers and reviews: {study.folder}", soft_wrap=True)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
