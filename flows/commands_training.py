"""Commands around training: `lion finetune` on a file of one's own, `lion diff` to pass on what was tuned."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from flows.terminal import (
    ALONE,
    USE,
    ConfigFile,
    Home,
    Overrides,
    Preset,
    check_is_new,
    note,
    out,
    print_rows,
    use_home,
)
from storage.files import whole_folder

commands = typer.Typer()
diff = typer.Typer(help="A tuned model as its exact difference to a base: make it, and recover the model from it.")
commands.add_typer(diff, name="diff", rich_help_panel=USE)

NAMED = 5  # rows named by reason in the terminal; result.json names all

Base = Annotated[str, typer.Option("--base", help="The base model: a folder, a Hub id, or `embedded`.")]
NewFolder = Annotated[Path, typer.Option("--out", help="A new folder for the result.")]


@commands.command(rich_help_panel=ALONE)
def finetune(
    data: Annotated[
        str,
        typer.Option("--data", help="Rows with answers: Alpaca or messages as .json, .jsonl, .csv, .parquet, or hf:…"),
    ],
    preset: Preset = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    copy_to: Annotated[Path | None, typer.Option("--out", help="Copy the model into this new folder.")] = None,
    home: Home = None,
) -> None:
    """Fine-tune the student on a file, without the loop. Interrupted, the same command goes on."""
    use_home(home)
    from flows.config import resolve
    from flows.finetune import finetune_on_file

    if copy_to:
        check_is_new(copy_to)
    settings = resolve(preset, overrides or [], config)
    trained = finetune_on_file(settings, data)

    figures = trained.figures
    for reason, ids in figures["left_out"].items():
        if ids:
            more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
            note.print(f"not trained on, {reason}: {', '.join(ids[:NAMED])}{more}", soft_wrap=True)
    if figures["cut"]:
        note.print(f"{len(figures['cut'])} answers were cut at {settings.finetune.training.max_length} tokens")
    names = (
        "rows",
        "steps",
        "train_loss",
        "validation_rows",
        "validation_loss",
        "tokens",
        "padding_share",
        "tokens_per_second",
        "seconds",
    )
    print_rows([{"figure": name.replace("_", " "), "value": figures[name]} for name in names])
    if copy_to:
        with whole_folder(copy_to) as folder:
            beside = shutil.ignore_patterns("job.json", "log.txt")
            shutil.copytree(trained.checkpoint.path, folder, ignore=beside, dirs_exist_ok=True)
    else:
        note.print("No run refers to this model, so that `lion gc` would take it; --out FOLDER keeps a copy.")
    out.print(str(copy_to or trained.checkpoint.path), soft_wrap=True)


@diff.command()
def make(
    base: Base,
    tuned: Annotated[Path, typer.Option("--tuned", exists=True, file_okay=False, help="The tuned model's folder.")],
    to: NewFolder,
    home: Home = None,
) -> None:
    """Write the difference of a tuned model to its base, with checksums of both."""
    from tasks.weight_diff import make_diff

    told = make_diff(_folder(base, home), tuned, to, base if not Path(base).is_dir() else Path(base).resolve().name)
    new = f"{len(told['tuned']['files'])} files, {len(told['base']['tensors'])} tensors as differences"
    out.print(f"{to}: {new} to {told['base']['name']}", soft_wrap=True)


@diff.command()
def recover(
    base: Base,
    difference: Annotated[
        Path, typer.Option("--diff", exists=True, file_okay=False, help="The folder that `lion diff make` wrote.")
    ],
    to: NewFolder,
    home: Home = None,
) -> None:
    """Recover the tuned model from its base and the difference, and check it against its checksums."""
    from tasks.weight_diff import recover as recover_model

    told = recover_model(_folder(base, home), difference, to)
    out.print(f"{to}: {len(told['tuned']['files'])} files, all checksums right", soft_wrap=True)


def _folder(base: str, home: Path | None) -> Path:
    """Where a base model is on this machine; one that is no folder is fetched into the home."""
    if Path(base).is_dir():
        return Path(base)
    use_home(home)
    from tasks.models.local import LocalModel
    from tasks.prepare import base_model

    return base_model(LocalModel(model_name_or_path=base)).path
