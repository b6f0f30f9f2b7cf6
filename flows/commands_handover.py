"""Commands that hand the work over: export, card, push."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flows.terminal import (
    USE,
    CheckpointName,
    Home,
    Refusal,
    RunName,
    check_is_new,
    find_run,
    note,
    out,
    print_text,
    use_home,
    with_bounds,
)

if TYPE_CHECKING:
    from flows.students import Student
    from storage.runs import Evaluation

commands = typer.Typer()


# As in `tasks.export`, which `lion --help` would be slow to import; the types of its arguments hold the two together.
Form = Literal["alpaca", "sharegpt", "messages", "dpo", "parquet", "hf"]
What = Literal["training", "train_pool", "cache_pool"]


@commands.command(rich_help_panel=USE)
def export(
    to: Annotated[Path, typer.Option("--to", help="The file to write; for hf a folder.")],
    run_id: RunName = None,
    form: Annotated[
        Form,
        typer.Option("--format", help="dpo: the teacher's answer over the student's where all reviews say so."),
    ] = "messages",
    what: Annotated[What, typer.Option("--what", help="training: what the student was trained on.")] = "training",
    iteration: Annotated[
        int | None, typer.Option("--iteration", help="Only this one's; by default all that count.")
    ] = None,
    home: Home = None,
) -> None:
    """Write a run's training set or a pool for other programs, each row with its lineage and licence."""
    use_home(home)
    from tasks.export import export as write

    check_is_new(to)
    manifest = find_run(run_id)
    rows = write(manifest, form, to, what, iteration)
    note.print(f"{rows} rows of {manifest.run_id} in {to}", soft_wrap=True)
    if not manifest.config["teacher"].get("license"):
        note.print("The settings name no terms for the teacher's text: --set teacher.license=... Look them up.")


@commands.command(rich_help_panel=USE)
def card(
    student: CheckpointName = None,
    to: Annotated[Path | None, typer.Option("--to", help="The file to write; by default it is printed.")] = None,
    home: Home = None,
) -> None:
    """Write the model card: data, method, settings, scores with intervals, licence terms, limits."""
    use_home(home)
    from flows.students import find_student
    from storage.files import write_atomic

    text = card_of(find_student(student))
    if to is None:
        print_text(text + "\n")
    else:
        check_is_new(to)
        write_atomic(to, text)
        note.print(f"Card in {to}", soft_wrap=True)


@commands.command(rich_help_panel=USE)
def push(
    repository: Annotated[str, typer.Argument(metavar="REPOSITORY", help="On the Hub, as in my-name/my-student.")],
    student: CheckpointName = None,
    public: Annotated[bool, typer.Option("--public", help="For everyone to see; by default it is private.")] = False,
    home: Home = None,
) -> None:
    """Put a student with its card on the Hub. Without HF_TOKEN in the environment only say what would go there."""
    use_home(home)
    from flows.students import find_student
    from storage.files import model_files

    if repository.count("/") != 1:
        raise Refusal(f"{repository}: a repository is called OWNER/NAME.")
    found = find_student(student)
    files = model_files(found.checkpoint.path)
    text = card_of(found)
    for path in files:
        out.print(f"{path.stat().st_size / 1e6:10.1f} MB  {path.name}", soft_wrap=True)
    out.print(f"{len(text.encode()) / 1e6:10.1f} MB  README.md")
    token = os.environ.get("HF_TOKEN")
    if not token:
        note.print(f"Dry run: HF_TOKEN is not set, so nothing was sent. These files would go to {repository}.")
        return
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise Refusal("pushing needs the extra: pip install 'lion-distill[hub]'") from None
    api = HfApi(token=token)
    api.create_repo(repository, private=not public, exist_ok=True)
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=repository)
    api.upload_folder(
        repo_id=repository, folder_path=found.checkpoint.path, allow_patterns=[path.name for path in files]
    )
    note.print(f"{found.name} is at {repository}")


def card_of(student: "Student") -> str:
    """The model card of a student that a run of this home made.

    Raises:
        Refusal: no run of this home made it, so nothing is known of it.
    """
    from storage.studies import studies_of
    from tasks.export import render_card
    from tasks.selection import relative_to_teacher

    manifest, iteration = student.manifest, student.iteration
    if manifest is None or iteration is None:
        raise Refusal(f"{student.name}: no run of this home made this model, so there is nothing to write on its card.")
    config = manifest.config
    mine = manifest.evaluations().get(iteration)

    def relative(evaluation: "Evaluation | None") -> str:
        if evaluation is None or mine is None or evaluation.is_judged != mine.is_judged:
            return ""  # a column is of one yardstick
        return with_bounds(relative_to_teacher(evaluation, config["seed"]), ".1f", 100, " %")

    start = {
        "iteration": 0,
        "evaluation": manifest.baseline.evaluation,
        "rolled_back": False,
        "relative": relative(manifest.baseline.evaluation),
        "gain": "",
    }
    rows = [start] + [
        {
            "iteration": record.iteration,
            "evaluation": record.evaluation,
            "rolled_back": record.rolled_back,
            "relative": relative(record.evaluation),
            # An earlier run's figures of other answers are left out, and the gains between them.
            "gain": with_bounds(
                record.comparison.loss_gain if record.evaluation and record.comparison else None, "+.3f"
            ),
        }
        for record in manifest.iterations
        if record.iteration <= iteration
    ]
    init = config["student"]["start"]
    pruned = f", pruned to {init['layers']} layers" if init["init"] == "pruned" else ""
    return render_card(
        "model.md.jinja",
        manifest=manifest,
        iteration=iteration,
        checkpoint=student.checkpoint,
        license=config["teacher"].get("license"),
        base=config["student"]["model"]["model_name_or_path"] + pruned,
        rows=rows,
        studies=[study for study in studies_of(manifest) if study.iteration == iteration],
        training=config["finetune"]["training"],
        truncated=config["finetune"]["train_on_truncated"],
    )
