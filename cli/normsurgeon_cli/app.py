"""The command line's front door: mounts one command a file and imports nothing heavy."""

from __future__ import annotations

import os
import sys

import typer

from normsurgeon_cli import analyze, convert, demo, evaluate, finetune, inspect, predict, study
from normsurgeon_cli.boundary import guarded, set_debug
from normsurgeon_cli.options import Command

app = typer.Typer(
    name="normsurgeon",
    help="Convert a network's BatchNorm layers to other norms, and keep its function.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        from normsurgeon import __version__

        typer.echo(f"normsurgeon {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and leave."
    ),
) -> None:
    """Convert a network's BatchNorm layers to other norms, and keep its function.

    Every command also takes --debug, for the whole traceback of an error.
    """


for module in (inspect, convert, evaluate, predict, analyze, finetune, study, demo):
    name = module.__name__.rpartition(".")[2]
    app.command(name, cls=Command)(guarded(getattr(module, name)))


def main() -> None:
    """Run the command line; ``--debug`` is taken wherever it stands."""
    sys.path.append(os.getcwd())  # for package.module:callable; last, so that it shadows nothing installed
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
        set_debug(True)
    app()
