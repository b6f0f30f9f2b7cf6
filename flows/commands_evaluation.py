"""Commands that say whether it helped: evaluate, best, contamination, compare, ablate."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.shown import print_study
from flows.terminal import (
    A_CHECKPOINT,
    HELPED,
    AsJson,
    ConfigFile,
    Home,
    Overrides,
    Preset,
    Refusal,
    RunName,
    check_says_what_to_run,
    find_run,
    note,
    out,
    prepare_for_a_flow,
    print_json,
    print_rows,
    use_home,
    with_bounds,
)

if TYPE_CHECKING:
    from flows.config import DistillConfig
    from storage.runs import Evaluation, Manifest
    from storage.studies import Study

commands = typer.Typer()

StudentName = Annotated[str | None, typer.Option("--student", metavar="CKPT", help=A_CHECKPOINT)]


@commands.command(rich_help_panel=HELPED)
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
    suite: Annotated[
        str | None,
        typer.Option("--suite", help="Instead: tasks of lm-eval, with commas: bbh, agieval, mmlu, arc_easy, ..."),
    ] = None,
    suite_tasks: Annotated[
        Path | None, typer.Option("--suite-tasks", help="A folder with task files of your own, in lm-eval's form.")
    ] = None,
    suite_limit: Annotated[int | None, typer.Option("--suite-limit", min=1, help="Rows of each task.")] = None,
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

    if suite is not None:
        from flows.suites import evaluate_on_suites

        found = find_student(student)
        names = [name.strip() for name in suite.split(",") if name.strip()]
        if not names:
            raise Refusal(f"--suite {suite!r}: name tasks of lm-eval, as in --suite bbh,agieval.")
        _show(evaluate_on_suites(found, names, suite_tasks, suite_limit, found.config.get("seed", 0)), as_json)
        return
    read_questions(questions, max_questions)  # a file that cannot be used is refused before anything is asked
    settings = _settings(find_student(student).config, preset, config, overrides or [], referee)
    from flows.evaluate import EvaluateConfig
    from flows.evaluate import evaluate as evaluate_flow

    prepare_for_a_flow()
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
    _show(study, as_json)


def _show(study: "Study", as_json: bool) -> None:
    if as_json:
        print_json(study.model_dump(mode="json"))
    elif study.relative is None:
        rows = [{"task": task, **figures} for task, figures in study.suite.items()]
        names = list(dict.fromkeys(name for row in rows for name in row))
        print_rows([{name: row.get(name) for name in names} for row in rows])
        out.print(f"lm-eval's own words: {study.folder / 'lm-eval.json'}", soft_wrap=True)
    else:
        print_study(study)


def _settings(
    of_run: dict[str, Any], preset: str | None, config: Path | None, overrides: list[str], referee: str | None
) -> "DistillConfig":
    """The settings that say who teaches and who judges: the run's own, unless others are named."""
    from flows.config import resolve

    if referee not in {None, "reference", "llm"}:
        raise Refusal(f"--referee {referee}: say reference or llm, and the model with --set referee.model=...")
    base = {} if preset or config else of_run
    kind = [f"referee.kind={referee}"] if referee else []  # first, so that what is set further is of this kind
    if referee == "llm" and not any(each.startswith(("referee=", "referee.model")) for each in overrides):
        others = [each for each in overrides if not each.startswith("referee.")]
        settings = resolve(preset, others, config, base=base)
        if settings.referee.kind != "llm":
            kind.append(f"referee.model={settings.teacher.model.model_dump_json()}")
            note.print("No referee model is set: the teacher judges. Another: --set referee.model=...")
    return resolve(preset, [*kind, *overrides], config, base=base)


@commands.command(rich_help_panel=HELPED)
def best(
    run_id: RunName = None,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Print the checkpoint to use: the student that no later one of its run improved upon."""
    use_home(home)
    from flows.students import best_student, check_is_there

    manifest = find_run(run_id)
    found = best_student(manifest)
    check_is_there(found)
    if as_json:
        print(json.dumps({"run": manifest.run_id, "iteration": found.iteration, "path": str(found.checkpoint.path)}))
        return
    for record in manifest.iterations:
        for line in record.notes:
            note.print(f"Iteration {record.iteration}: {line}")
    measured = any(record.evaluation for record in manifest.iterations)
    start = ": the student before any training" + (" was never beaten" if measured else "; none was measured since")
    note.print(found.name + ("" if found.iteration else start))
    print(found.checkpoint.path)


@commands.command(rich_help_panel=HELPED)
def contamination(
    against: Annotated[
        str, typer.Option("--against", help="Instructions of an evaluation, in any form; bundled: the held-out set.")
    ],
    run_id: Annotated[str | None, typer.Option("--run", help="Only this run's pools.")] = None,
    max_similarity: Annotated[
        float, typer.Option("--max-similarity", min=0.01, max=1, help="ROUGE-L F above which an instruction is near.")
    ] = 0.7,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Find instructions of the pools that are near those of an evaluation."""
    use_home(home)
    from storage.catalog import ask
    from storage.pools import read_rows
    from tasks.contamination import find_near
    from tasks.questions import read_questions

    turns = read_rows(read_questions(against).turns)
    statement = """
    select run_id, instruction_id, instruction, input, origin, min(iteration) as iteration
    from cache_pool where $run is null or starts_with(run_id, $run) group by all order by all
    """
    pool = ask(statement, {"run": run_id and find_run(run_id).run_id})
    rows = [
        {
            "run_id": row["run_id"],
            "iteration": row["iteration"],
            "origin": row["origin"],
            "instruction_id": row["instruction_id"],
            "similarity": round(near.similarity, 3),
            "instruction": row["instruction"],
            "near": turns[int(near.key)]["instruction"],
        }
        for row, near in find_near(pool, turns, max_similarity)
    ]
    print_rows(rows, as_json=as_json)
    note.print(f"{len(rows)} of {len(pool)} instructions in pools are near one of the {len(turns)} of {against}.")


@commands.command(rich_help_panel=HELPED)
def compare(
    run_ids: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Ids of runs, or their beginnings.")],
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Put runs side by side: the best student of each, the gain over the first with its interval, the settings."""
    use_home(home)
    if len(run_ids) < 2:
        raise Refusal("name two runs or more: lion compare RUN RUN. `lion runs` lists them.")
    manifests = [find_run(name) for name in run_ids]
    rows, notes = _side_by_side(manifests)
    if as_json:
        print_json(rows)
        return
    # A column a run.
    print_rows([{"": name, **{row["run"]: row[name] for row in rows}} for name in rows[0] if name != "run"])
    for line in notes:
        note.print(line, soft_wrap=True)
    differing = _settings_that_differ(manifests)
    note.print("Settings that differ:" if differing else "The settings are the same.")
    if differing:
        print_rows(differing)


def _side_by_side(manifests: list["Manifest"]) -> tuple[list[dict[str, Any]], list[str]]:
    """The best student of each run and its gain over the first run's, a row each; and why some have no gain or score.

    Raises:
        Refusal: a run was not evaluated yet.
    """
    from flows.chain import paid_in_chain
    from tasks.selection import compare as compare_students
    from tasks.selection import same_reference

    best = [_best_evaluation(manifest) for manifest in manifests]
    rows, notes, first, other = [], [], best[0][1], manifests[0].run_id
    for manifest, (iteration, evaluation) in zip(manifests, best, strict=True):
        gain = compare_students(evaluation, first, best[0][0], manifest.config["seed"])
        if not same_reference(evaluation, first):
            notes.append(f"No gain: {manifest.run_id} was held against other held-out answers than {other}.")
        elif gain.loss_gain is None and None not in (evaluation.loss, first.loss):
            notes.append(
                f"No gain in loss: to {manifest.run_id} the held-out answers are other tokens than to {other}."
            )
        alike = evaluation.is_judged == first.is_judged
        if not alike:
            notes.append(f"No relative score: {manifest.run_id} has another kind of referee than {other}.")
        taught = sum(record.trained_rows for record in manifest.lineage(iteration))
        rows.append(
            {
                "run": manifest.run_id,
                "best iteration": f"{iteration} of {len(manifest.iterations)}",
                "rows trained on": taught,
                "loss": evaluation.loss,
                "gain in loss over the first": with_bounds(gain.loss_gain),
                "score": evaluation.score,
                "gain in score": with_bounds(gain.score_gain),
                "relative": with_bounds(gain.relative if alike else None),
                "usd": paid_in_chain(manifest),
            }
        )
    return rows, notes


def _best_evaluation(manifest: "Manifest") -> tuple[int, "Evaluation"]:
    from flows.students import best_student

    iteration = best_student(manifest).iteration
    assert iteration is not None
    evaluation = manifest.evaluations().get(iteration)
    if evaluation is None:
        raise Refusal(f"{manifest.run_id} was not evaluated yet. The same command that started it goes on.")
    return iteration, evaluation


def _settings_that_differ(manifests: list["Manifest"]) -> list[dict[str, str]]:
    """A row a setting, with a column a run."""
    settings = {manifest.run_id: dict(_flat(manifest.config)) for manifest in manifests}
    rows = []
    for key in sorted({key for one in settings.values() for key in one}):
        values = {run_id: json.dumps(one.get(key)) for run_id, one in settings.items()}
        if len(set(values.values())) > 1:
            rows.append({"": key, **values})
    return rows


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@commands.command(rich_help_panel=HELPED)
def ablate(
    arms: Annotated[
        str, typer.Option("--arms", help="Some of adversarial, random-generation, imitation-only; with commas.")
    ] = "adversarial,random-generation,imitation-only",
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=20, help="Runs of each arm.")] = 3,
    preset: Preset = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Ask whether the method helps: the loop beside simpler ways to spend the same teacher tokens."""
    use_home(home)
    from flows.config import resolve

    check_says_what_to_run(preset, config, overrides)
    settings = resolve(preset, overrides or [], config)
    prepare_for_a_flow()
    from flows.ablate import ablate as run_arms

    rows = run_arms(settings, [arm.strip() for arm in arms.split(",") if arm.strip()], seeds)
    if as_json:
        print(json.dumps(rows, indent=2, default=lambda interval: interval.model_dump()))
        return
    columns = ("loss", "score", "loss_over_adversarial", "score_over_adversarial")
    print_rows([row | {name: with_bounds(row[name]) for name in columns} for row in rows])
    out.print(
        "Means over seeds, with 95 % intervals over the held-out questions. Lower loss and higher score are better."
    )
