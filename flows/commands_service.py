"""`lion up`, `lion deploy`, `lion worker`, `lion down`: the loop behind a Prefect server of this machine."""

import os
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer
from rich.text import Text

from flows.terminal import SERVER, Home, Refusal, note, settle_home

commands = typer.Typer()


@commands.command(rich_help_panel=SERVER)
def up(
    host: Annotated[
        str | None, typer.Option("--host", help="Listen here, for others. Wants PREFECT_SERVER_API_AUTH_STRING.")
    ] = None,
    home: Home = None,
) -> None:
    """Start a Prefect server and a worker on this machine, and register all deployments. Again: nothing twice."""
    _settle(home)
    service = _at_the_root()

    with _alone():
        note.print("Server started." if service.start_server(host) else "A server answers already.")
        _warn_if_outdated(service, "server")  # it may lack what keeps strangers' pages out
        deploy(home)
        note.print("Worker started." if service.start_worker() else "The worker runs already.")
        _warn_if_outdated(service, "worker")  # it may lack a key, or take runs from another pool
    note.print(f"UI: {service.ui_url()}", soft_wrap=True)


@commands.command(rich_help_panel=SERVER)
def deploy(home: Home = None) -> None:
    """Bring the work pool, the deployments and the automations on the server up to date."""
    _settle(home)
    service = _at_the_root()

    for name in service.register():
        note.print(f"  {name}")


@commands.command(rich_help_panel=SERVER)
def worker(
    healthcheck: Annotated[
        bool, typer.Option("--healthcheck", help="Tell by HTTP, port 8080, whether it polls.")
    ] = False,
    home: Home = None,
) -> None:
    """Run a worker alone, in the foreground, as containers do. At its end flow runs keep the answers under way."""
    _settle(home)
    from flows import service

    raise typer.Exit(service.run_worker(healthcheck))


@commands.command(rich_help_panel=SERVER)
def down(home: Home = None) -> None:
    """Stop the worker and the server that `lion up` has started. Flow runs under way are ended, and can go on."""
    _settle(home)
    from flows import service

    with _alone():
        for name in ("worker", "server"):
            note.print(f"{name} " + ("stopped" if service.stop(name) else "was not running"))


def _alone() -> AbstractContextManager[None]:
    """One `lion up` or `lion down` of a home at a time: of two that start a server, the one kept might be the other."""
    from storage.files import locked

    return locked("service", on_wait=lambda: note.print("Another `lion up` or `down` is at it; waiting for it ..."))


def _warn_if_outdated(service: ModuleType, name: str) -> None:
    if service.is_outdated(name):
        note.print(
            Text("note:", "yellow"),
            "It was started with other settings than it would be now, as by an earlier version or without a key. `lion down`, "
            "then `lion up`, starts it anew; flow runs under way are ended, and can go on.",
            soft_wrap=True,
        )


def _at_the_root() -> ModuleType:
    """The service, where it can be set up: what is registered are files of a checkout, and so is what names the server."""
    from flows import service

    if not service.DEPLOYMENTS.is_file():
        raise Refusal(f"no {service.DEPLOYMENTS} here: type this in the root of a checkout of lion-distill.")
    return service


def _settle(home: Path | None) -> None:
    """The home, and the password: whoever starts the server may also speak to it."""
    settle_home(home)
    if password := os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):
        os.environ.setdefault("PREFECT_API_AUTH_STRING", password)
