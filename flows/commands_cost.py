"""Commands about money: estimate says what a run will cost, spend what runs have cost."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Column, Table

from flows.terminal import (
    LOOK,
    LOOP,
    AsJson,
    ConfigFile,
    Home,
    Overrides,
    Preset,
    Refusal,
    SeedFile,
    out,
    print_rows,
    use_home,
)

commands = typer.Typer()


@commands.command(rich_help_panel=LOOP)
def estimate(
    preset: Preset = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    seeds: SeedFile = None,
    assume: Annotated[
        list[str] | None,
        typer.Option("--assume", metavar="NAME=NUMBER", help="Change an assumption, as `teacher_tokens=120`."),
    ] = None,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Say what a run will ask and cost, by stage and iteration. Sends nothing and writes nothing."""
    use_home(home)
    from flows.config import resolve
    from flows.estimate import estimate_run, total_usd

    given = {"seeds": {"path": seeds}} if seeds else {}
    settings = resolve(preset, overrides or [], config, **given)
    lines, assumptions = estimate_run(settings, assume or [])
    total = total_usd(lines)
    if as_json:
        print(
            json.dumps({"usd": total, "lines": [asdict(line) for line in lines], "assumptions": assumptions}, indent=2)
        )
        return
    if not lines:
        out.print("Nothing in this run is paid for: all of its models are of this machine.")
        return
    table = _table(("", "stage", "model"), ("requests", "paid before", "tokens in", "out", "dollars"))
    for line in lines:
        counts = (line.requests, line.answered, line.prompt_tokens, line.completion_tokens)
        usd = "free" if line.usd is None else f"{line.usd:,.4f}"
        table.add_row(str(line.iteration or "start"), line.stage, line.model, *(f"{count:,}" for count in counts), usd)
    if not any(line.answered for line in lines):
        table.columns.pop(4)
    out.print(table)
    out.print(
        f"Total: [bold]{total:,.4f}[/bold] dollars, {sum(line.requests for line in lines):,} requests.", markup=True
    )
    cap = settings.budget.max_usd
    if cap is not None and total > cap:
        out.print(f"That is more than budget.max_usd = {cap:g}: the run would pause there, with everything kept.")
    out.print("Assumed (change with --assume NAME=NUMBER):")
    for name, (value, why) in assumptions.items():
        out.print(f"  {name} = {value:g} ", out.render_str(why, style="dim"), soft_wrap=True)


@commands.command(rich_help_panel=LOOK)
def spend(
    run_id: Annotated[str | None, typer.Option("--run", help="Only this run.")] = None,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Say what was paid: by run, role, iteration, model and day, straight from the journal."""
    use_home(home)
    from storage.journal import spend_of

    lines = spend_of()
    if run_id:
        payers = sorted({line.run_id for line in lines})
        lines = [line for line in lines if line.run_id.startswith(run_id)]
        if not lines:
            raise Refusal(f"nothing was paid by a run {run_id!r}. Paid for: {', '.join(payers) or 'nothing'}.")
    if as_json:
        print_rows([asdict(line) for line in lines], as_json=True)
        return
    if not lines:
        out.print("Nothing was paid for in this home.")
        return
    table = _table(("run", "", "role", "model", "day"), ("requests", "tokens in", "out", "dollars"))
    for line in lines:
        where = str(line.iteration) if line.iteration else "start"
        counts = (f"{count:,}" for count in (line.requests, line.prompt_tokens, line.completion_tokens))
        table.add_row(line.run_id, where, line.role, line.model, line.day, *counts, f"{line.usd:,.4f}")
    out.print(table)
    out.print(f"Total: [bold]{sum(line.usd for line in lines):,.4f}[/bold] dollars.", markup=True)
    if lost := sum(line.lost_usd for line in lines):
        out.print(
            f"At most {lost:,.4f} more may have been billed for {sum(line.lost_requests for line in lines)} lost answers."
        )


def _table(texts: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table whose texts are folded where the terminal is narrow, so that no number is ever cut."""
    folded = [Column(name, overflow="fold") for name in texts]
    whole = [Column(name, justify="right", no_wrap=True) for name in numbers]
    return Table(*folded, *whole, box=None, padding=(0, 2, 0, 0))
