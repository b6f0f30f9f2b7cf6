"""The command `lion`. Settings and words for people; everything it does is a call into flows or storage.

lion run --preset offline
"""

import atexit
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.text import Text

from flows import (
    commands_cost,
    commands_evaluation,
    commands_handover,
    commands_human,
    commands_service,
    commands_talk,
    commands_training,
)
from flows.shown import print_run
from flows.terminal import (
    LOOK,
    LOOP,
    AsJson,
    ConfigFile,
    Home,
    Overrides,
    Preset,
    Refusal,
    RunName,
    SeedFile,
    check_says_what_to_run,
    find_run,
    note,
    of_a_lost_server,
    out,
    prepare_for_a_flow,
    print_csv,
    print_json,
    print_rows,
    use_home,
)

if TYPE_CHECKING:
    from flows.config import DistillConfig

INTERRUPTED = 128 + signal.SIGINT

app = typer.Typer(
    help="Adversarial distillation: a compact student learns from a large teacher, and from where it still fails.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(commands_cost.commands)
app.add_typer(commands_evaluation.commands)
app.add_typer(commands_handover.commands)
app.add_typer(commands_service.commands)
app.add_typer(commands_talk.commands)
app.add_typer(commands_human.commands)
app.add_typer(commands_training.commands)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"lion {version('lion-distill')}")
        raise typer.Exit()


@app.callback()
def lion(
    asked_for_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(rich_help_panel=LOOP)
def run(
    preset: Preset = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    seeds: SeedFile = None,
    home: Home = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make every stage of this run again.")] = False,
) -> None:
    """Run the loop. The same command again goes on where it was interrupted, or says that all is done."""
    use_home(home)
    check_says_what_to_run(preset, config, overrides)
    from flows.chain import settled
    from flows.config import resolve
    from storage.runs import load_manifest

    given = {"seeds": {"path": seeds}} if seeds else {}
    settings = settled(resolve(preset, overrides or [], config, **given))
    _check_what_is_named(settings)
    run_id = settings.run_id
    manifest = load_manifest(run_id)
    if fresh and manifest:
        from flows.steps import held
        from storage.gc import forget

        with held(run_id):
            forget(manifest)
    elif fresh:
        note.print("--fresh: this run is new; stages that another run has made in the same way stay as they are.")
    elif manifest and manifest.state == "completed" and not manifest.is_stopped_by_hand() and manifest.is_whole():
        note.print(f"{run_id} is complete: nothing to do. (--fresh makes it again.)")
        print_run(manifest)
        return
    note.print(f"Run {run_id} in {os.environ['LION_HOME']}")
    prepare_for_a_flow()
    from tasks.jobs.process import warm_up

    warm_up()
    from flows.distill import distill

    distill(settings)
    finished = load_manifest(run_id)
    assert finished is not None
    print_run(finished)


def _check_what_is_named(settings: "DistillConfig") -> None:
    """Refuse what leads nowhere before anything is written: a task runner, files of instructions, models, keys, prices.

    Raises:
        ValueError, FatalEndpointError, UnknownPrice: the message names the setting and the way out.
    """
    from tasks.models.endpoint import key_of
    from tasks.models.prices import price_of
    from tasks.prepare import source_digest
    from tasks.seed import read_seeds
    from tasks.shards import check_is_there

    check_is_there(settings.task_runner)
    read_seeds(settings.seeds.path)
    read_seeds(settings.seeds.heldout, bundled="heldout.jsonl")
    for model in settings.models().values():
        if model.kind == "local":
            source_digest(model)
        else:
            key_of(model)
            price_of(model.model, model.price)


@app.command(rich_help_panel=LOOK)
def show(
    run_id: RunName = None,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Show a run: what each iteration did and whether it helped."""
    use_home(home)
    manifest = find_run(run_id)
    if as_json:
        print_json(manifest.model_dump(mode="json"))
    else:
        print_run(manifest)


@app.command(rich_help_panel=LOOK)
def runs(as_json: AsJson = False, home: Home = None) -> None:
    """List the runs of this home, the latest first. Runs that go on from each other are one line.

    The loss is of the student to use: an iteration that was rolled back does not count.
    """
    use_home(home)
    from storage.runs import chains, list_manifests

    rows = [
        {
            "run": last.run_id,
            "state": last.state_now(),
            "iterations": len(last.iterations),
            "loss": last.loss(),
            "updated": last.updated if as_json else f"{last.updated[:10]} {last.updated[11:16]} UTC",
            "goes on from": ", ".join(manifest.run_id for manifest in earlier),
        }
        for last, *earlier in chains(list_manifests())
    ]
    print_rows(rows, as_json=as_json)


@app.command(rich_help_panel=LOOK)
def pools(as_json: AsJson = False, home: Home = None) -> None:
    """Count the rows of every pool, by run, iteration and origin."""
    use_home(home)
    from storage.catalog import ask

    sql = """
    select run_id, iteration, pool, origin, count(*) as rows
    from (select 'train' as pool, run_id, iteration, origin from train_pool
          union all select 'cache', run_id, iteration, origin from cache_pool)
    group by all order by all
    """
    print_rows(ask(sql), as_json=as_json)


@app.command(rich_help_panel=LOOK)
def sql(
    statement: Annotated[
        str,
        typer.Argument(
            help="A SELECT over train_pool, cache_pool, responses, reviews, verdicts, candidates, evaluations."
        ),
    ],
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    home: Home = None,
) -> None:
    """Ask the pools in SQL (DuckDB). Every view has run_id and iteration."""
    use_home(home)
    from storage.catalog import ask_with_names

    with _ended_at_once():
        names, rows = ask_with_names(statement)
    if as_csv:
        print_csv(names, rows)
    else:
        print_rows(rows, as_json=as_json)


@app.command(rich_help_panel=LOOK)
def row(
    instruction_id: Annotated[str, typer.Argument(metavar="ID", help="An instruction_id.")],
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Show the life of one instruction: parent, responses, reviews, verdicts, children, evaluations."""
    use_home(home)
    from storage.catalog import life_of

    life = life_of(instruction_id)
    if not any(life.values()):
        raise Refusal(f"no instruction {instruction_id!r} in {os.environ['LION_HOME']}. `lion sql` finds ids.")
    if as_json:
        print_json(life)
        return
    for what, rows in life.items():
        out.print(f"\n[bold]{what}[/bold]" + ("" if rows else "  none"), markup=True)
        if rows:
            print_rows(rows)


@app.command(rich_help_panel=LOOK)
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Really delete. Without it only say what would go.")] = False,
    home: Home = None,
) -> None:
    """Find what no run refers to: old snapshots, checkpoints, half-done jobs."""
    use_home(home)
    from storage.gc import collect

    found = collect(delete=delete)
    for path, size in found:
        out.print(f"{size / 1e6:10.1f} MB  {path}", soft_wrap=True)
    total = sum(size for _, size in found) / 1e6
    out.print(f"{len(found)} things, {total:.1f} MB " + ("deleted" if delete else "would go; --delete does it"))


@app.command(rich_help_panel=LOOP)
def config(preset: Preset = None, file: ConfigFile = None, overrides: Overrides = None) -> None:
    """Print the complete settings that a run would have, with the meaning of each."""
    from flows.config import explain, resolve

    out.print(explain(resolve(preset, overrides or [], file)), soft_wrap=True)


@contextmanager
def _ended_at_once() -> Iterator[None]:
    """While a statement runs a signal ends the process by itself: DuckDB swallows what Python would make of it, and there
    is nothing to be kept."""
    ours = {ends: handler for ends in (signal.SIGINT, signal.SIGTERM) if callable(handler := signal.getsignal(ends))}
    for ends in ours:
        signal.signal(ends, signal.SIG_DFL)
    try:
        yield
    finally:
        for ends, handler in ours.items():
            signal.signal(ends, handler)


def _terminated(*_: Any) -> None:
    note.print("Terminated. The same command goes on from here.")
    sys.exit(128 + signal.SIGTERM)


def _hung_up(terminals: list[int], *_: Any) -> None:
    """The terminal is gone, with a connection perhaps: what would be written there goes nowhere, and the command ends as
    it does after SIGTERM."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in terminals:
        os.dup2(nowhere, stream)
    signal.raise_signal(signal.SIGTERM)


def main() -> None:
    """Run the command line. Bad input ends in one clear message and exit code 2."""
    code = [1]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a letter that a terminal of another encoding has not
    atexit.register(_leave, code)  # the first to be registered is the last to run
    try:
        _main()
    except SystemExit as leaving:
        code[0] = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        raise
    finally:
        atexit.register(_let_nothing_disturb)  # the last to be registered is the first to run


def _let_nothing_disturb() -> None:
    """Pass over a second Ctrl-C or SIGTERM: what is left is to end the temporary server, and takes seconds. Half of that
    would leave the server, and a traceback."""
    for ends in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ends, signal.SIG_IGN)


def _leave(code: list[int]) -> None:
    """End at once: Prefect's threads run on while Python takes itself apart, and DuckDB's binding would then print
    a page about what it could not free."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code[0])


def _main() -> None:
    from storage.files import StorageError
    from tasks.models.errors import BudgetReached, FatalEndpointError, ModelError, UnknownPrice

    signal.signal(signal.SIGTERM, _terminated)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup has it ignored
        signal.signal(signal.SIGHUP, partial(_hung_up, [stream for stream in (1, 2) if os.isatty(stream)]))
    try:
        app()
    except (ValueError, StorageError, FatalEndpointError, UnknownPrice) as error:
        note.print(Text("error:", "red"), str(error), soft_wrap=True)
        sys.exit(2)
    except OSError as error:
        place = error.filename or (os.environ["LION_HOME"] if error.errno == errno.ENOSPC else None)
        if place is None:
            raise
        note.print(Text("error:", "red"), f"{place}: {error.strerror}", soft_wrap=True)
        sys.exit(2)
    except SystemExit as leaving:
        if leaving.code == INTERRUPTED:  # what Typer makes of Ctrl-C
            note.print("Interrupted. The same command goes on from here.")
        raise
    except BudgetReached as error:
        note.print(Text("paused:", "yellow"), str(error), soft_wrap=True)
        sys.exit(3)
    except (RuntimeError, ModelError) as error:  # of a job the message has the log's last lines, and where the whole is
        _fail(str(error))
    except _lost_server() as error:
        _fail(f"{of_a_lost_server(error)}.")


def _lost_server() -> type[Exception]:
    """What Prefect's client raises where its server is gone; imported once something was raised, as it costs time."""
    from httpx import TransportError

    return TransportError


def _fail(reason: str) -> NoReturn:
    note.print(Text("failed:", "red"), reason, soft_wrap=True)
    note.print("Nothing that was finished is lost: the same command goes on from here.")
    sys.exit(1)
