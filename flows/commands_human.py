"""Commands of human evaluation: new, serve, sheet, read, report."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.terminal import (
    HELPED,
    AsJson,
    Home,
    Refusal,
    check_is_new,
    note,
    out,
    print_rows,
    use_home,
    with_bounds,
)

if TYPE_CHECKING:
    from tasks.human import AspectResult

commands = typer.Typer()
human = typer.Typer(help="Let people judge: blind, in random order, by aspect.", no_args_is_help=True)
commands.add_typer(human, name="human-eval", rich_help_panel=HELPED)

StudyId = Annotated[
    str | None, typer.Argument(metavar="[STUDY]", help="A study's id or its beginning; by default the last.")
]
Voter = Annotated[str, typer.Option("--voter", help="Whose sheet it is.")]


@human.command()
def new(
    answers: Annotated[
        tuple[Path, Path],
        typer.Option("--answers", metavar="A B", help="Two files of answers, as `lion evaluate` writes."),
    ],
    questions: Annotated[str, typer.Option("--questions", help="The questions that both answer, in any form.")],
    seed: Annotated[int, typer.Option("--seed", help="Of the order in which the answers stand.")] = 0,
    home: Home = None,
) -> None:
    """Make a study of two models' answers to the same questions."""
    use_home(home)
    from storage.pools import by_id
    from tasks.human import Item, new_study
    from tasks.questions import read_answers, read_questions

    asked = read_questions(questions)
    turns = by_id(asked.turns)
    said = [by_id(read_answers(path, asked)[0]) for path in answers]
    rows = [turns[keys[0]] for keys in asked.conversations]  # a person judges the first turn
    both = [row for row in rows if all(one[row["instruction_id"]]["response"] for one in said)]
    items = [
        Item(
            item=row["instruction_id"],
            instruction=row["instruction"],
            input=row["input"],
            a=said[0][row["instruction_id"]]["response"],
            b=said[1][row["instruction_id"]]["response"],
        )
        for row in both
    ]
    a, b = (next(iter(one.values()))["model"] for one in said)  # as the file says, else the file's name
    study = new_study(a, b, items, seed)
    if asked.left_out:
        note.print(f"{asked.left_out} questions begin as an earlier one does: left out.")
    if len(items) < len(rows):
        note.print(f"{len(rows) - len(items)} of {len(rows)} questions lack an answer in one of the files: left out.")
    if any(len(keys) > 1 for keys in asked.conversations):
        note.print("Only the first turn of each question is judged.")
    note.print(f"{len(items)} items. Vote: lion human-eval serve {study.study_id}")
    print(study.study_id)


@human.command()
def serve(
    study_id: StudyId = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8765,
    home: Home = None,
) -> None:
    """Open the page on which people vote. Every vote is kept at once; several people may vote."""
    use_home(home)
    from flows.web import human_app
    from flows.web import serve as serve_page
    from tasks.human import find_study

    study = find_study(study_id)
    note.print(f"{study.study_id}: http://127.0.0.1:{port}  (Ctrl-C ends; votes are in {study.folder})", soft_wrap=True)
    serve_page(human_app(study), port)


@human.command()
def sheet(
    to: Annotated[Path, typer.Option("--to", help="The CSV file to write.")],
    voter: Voter,
    study_id: StudyId = None,
    home: Home = None,
) -> None:
    """Write a CSV sheet to fill in: first, tie or second under each aspect. `read` takes it back."""
    use_home(home)
    from tasks.human import find_study, write_sheet

    check_is_new(to)
    write_sheet(find_study(study_id), voter, to)
    note.print(f"Fill in {to}, then: lion human-eval read {to} --voter {voter}", soft_wrap=True)


@human.command()
def read(
    file: Annotated[Path, typer.Argument(metavar="CSV", help="A sheet that was filled in.")],
    voter: Voter,
    study_id: Annotated[str | None, typer.Option("--study", help="By default the last.")] = None,
    home: Home = None,
) -> None:
    """Take the votes of a sheet."""
    use_home(home)
    from tasks.human import find_study, read_sheet

    if not file.is_file():
        raise Refusal(f"{file}: no such file. `lion human-eval sheet` writes one.")
    note.print(f"{read_sheet(find_study(study_id), voter, file)} votes of {voter}")


@human.command()
def report(study_id: StudyId = None, as_json: AsJson = False, home: Home = None) -> None:
    """Win/tie/lose with intervals, and how far the voters agree."""
    use_home(home)
    from tasks.human import find_study, results, results_as_json

    study = find_study(study_id)
    if as_json:
        print(results_as_json(study))
        return
    found = results(study)
    out.print(f"{study.model_a} against {study.model_b}, {len(study.items)} items")
    print_rows(
        [
            {
                "aspect": aspect,
                "votes": result.votes,
                "win/tie/lose": f"{result.wins}/{result.ties}/{result.losses}",
                "won": with_bounds(result.win_share, ".0f", 100, " %"),
                "lost": with_bounds(result.loss_share, ".0f", 100, " %"),
                "agreement": _agreement(result),
                "on items": result.shared_items,
            }
            for aspect, result in found.items()
        ]
    )


def _agreement(result: "AspectResult") -> str:
    if result.voters < 2:
        return "one voter" if result.voters else ""
    if result.agreement is None:
        return "all votes alike: no kappa" if result.shared_items else "no item that all voted on"
    return f"{result.kappa}'s kappa {result.agreement:.2f}"
