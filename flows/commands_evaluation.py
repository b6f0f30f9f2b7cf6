"""Commands that say whether it helped: evaluate, best, contamination, compare."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from flows.terminal import AsJson, ConfigFile, Home, Overrides, Preset, Refusal, find_run, note, out, use_home

commands = typer.Typer()

StudentName = Annotated[
    str | None,
    typer.Option(
        "--student", metavar="CKPT", help="RUN, RUN/ITERATION, a folder, a Hub id; by default the last run's best."
    ),
]


@commands.command()
def evaluate(
    student: StudentName = None,
    reference: Annotated[
        str, typer.Option("--reference", help="teacher, a file of answers, or a checkpoint, named as a student is.")
    ] = "teacher",
    questions: Annotated[
        str,
        typer.Option("--questions", help="FastChat's question.jsonl, or any form of seeds. bundled: the held-out set."),
    ] = "bundled",
    referee: Annotated[
        str | None,
        typer.Option("--referee", help="reference: ROUGE-L to the reference. llm: the settings' referee, both orders."),
    ] = None,
    tie_margin: Annotated[
        float, typer.Option("--tie-margin", min=0, max=9, help="Points within which two scores are a tie.")
    ] = 0.5,
    max_questions: Annotated[int | None, typer.Option("--max-questions", min=1, help="Only the first so many.")] = None,
    preset: Preset = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Score a student against a reference: relative score with intervals, win/tie/lose, position effect.

    Teacher, referee and sampling are those of the student's run, or of --preset, --config and --set.
    """
    use_home(home)
    from flows.students import find_student
    from storage.studies import load_study
    from tasks.questions import read_questions

    read_questions(questions, max_questions)  # a file that cannot be used is refused before anything is asked
    settings = _settings(find_student(student).config, preset, config, overrides or [], referee)
    from flows.evaluate import EvaluateConfig
    from flows.evaluate import evaluate as evaluate_flow

    study_id = evaluate_flow(
        EvaluateConfig(
            student=student,
            reference=reference,
            questions=questions,
            max_questions=max_questions,
            tie_margin=tie_margin,
            distill=settings,
        )
    )
    study = load_study(study_id)
    assert study is not None, "a study that was made is there"
    if as_json:
        print(json.dumps(study.model_dump(mode="json"), indent=2, ensure_ascii=False))
    else:
        print_study(study)


def _settings(
    of_run: dict[str, Any], preset: str | None, config: Path | None, overrides: list[str], referee: str | None
) -> Any:
    """The settings that say who teaches and who judges: the run's own, unless others are named."""
    from flows.config import resolve

    base = {} if preset or config else of_run
    settings = resolve(preset, overrides, config, base=base)
    if referee is None or referee == settings.referee.kind:
        return settings
    if referee == "reference":
        judge: dict[str, Any] = {"kind": "reference"}
    elif referee == "llm":
        judge = {"kind": "llm", "model": settings.teacher.model.model_dump()}
        note.print("No referee model is set: the teacher judges. Another: --set referee.model=...")
    else:
        raise Refusal(f"--referee {referee}: say reference or llm, and the model with --set referee.model=...")
    return type(settings).model_validate(settings.model_dump() | {"referee": judge})


@commands.command()
def best(
    run_id: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run's id or its beginning; by default the last.")
    ] = None,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Print the checkpoint to use: the student that no later one of its run improved upon."""
    use_home(home)
    from flows.students import best_student

    manifest = find_run(run_id)
    found = best_student(manifest)
    if as_json:
        print(json.dumps({"run": manifest.run_id, "iteration": found.iteration, "path": str(found.checkpoint.path)}))
        return
    for record in manifest.iterations:
        for line in record.notes:
            note.print(f"Iteration {record.iteration}: {line}")
    note.print(f"{found.name}" + ("" if found.iteration else ": the student before any training was never beaten"))
    print(found.checkpoint.path)


def print_study(study: Any) -> None:
    """A study's figures as a table: over all questions, and by category."""
    relative = study.relative
    title = (
        f"{study.student} against {study.reference} · {study.questions} · referee {study.settings['referee']['kind']}"
    )
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("category", "turns", *relative.overall.by_order, "mean", "95 % interval", "win/tie/lose"):
        table.add_column(name.replace("teacher", "reference"), justify="left" if name == "category" else "right")
    for name, part in [("all", relative.overall), *relative.by_category.items()]:
        orders = [_percent(part.by_order[order].value) for order in relative.overall.by_order if order in part.by_order]
        interval = f"{_percent(part.mean.low)} to {_percent(part.mean.high)}" if part.mean else ""
        mean = _percent(part.mean.value) if part.mean else ""
        table.add_row(
            name, str(part.questions), *orders, mean, interval, f"{part.wins}/{part.ties}/{part.losses}",
            end_section=name == "all",
        )  # fmt: skip
    out.print(table)
    out.print("Relative score: the student's summed scores in % of the reference's.")
    if effect := relative.overall.position_effect:
        out.print(
            f"Standing first is worth {effect.value:+.2f} points ({effect.low:+.2f} to {effect.high:+.2f}) of a score."
        )
    for line in study.notes:
        out.print(f"Note: {line}")
    out.print(f"Answers and reviews: {study.folder}", soft_wrap=True)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
