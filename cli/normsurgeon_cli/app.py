"""The command line's front door: mounts one command a file and imports nothing heavy."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from normsurgeon._util.parts import something_was_written
from normsurgeon_cli import analyze, compare, convert, demo, evaluate, finetune, inspect, predict, study
from normsurgeon_cli.boundary import guarded, set_debug
from normsurgeon_cli.console import error_line, print_message
from normsurgeon_cli.options import Command
from normsurgeon_cli.streams import why_nothing_was_shown


def _unwrapped(text: str | None) -> str:
    """A docstring whose paragraphs are one line each, to be broken where the terminal ends."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (text or "").split("\n\n"))


def _listed(examples: Sequence[str]) -> str:
    return "\n\n".join(("Examples:", *examples))


EXAMPLES = ("normsurgeon demo", "normsurgeon convert resnet50 --to gn -o resnet50-gn.safetensors")

COMMANDS = (inspect, compare, convert, evaluate, predict, analyze, finetune, study, demo)

app = typer.Typer(
    name="normsurgeon",
    help="Convert a network's BatchNorm layers to other norms, and keep its function.",
    epilog=_listed(EXAMPLES),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
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
    debug: bool = typer.Option(False, "--debug", help="Show the whole traceback of an error; after a command, too."),
) -> None:
    """Convert a network's BatchNorm layers to other norms, and keep its function."""
    if debug:
        set_debug(True)


for module in COMMANDS:
    name = module.__name__.rpartition(".")[2]
    function = getattr(module, name)
    app.command(name, cls=Command, help=_unwrapped(function.__doc__), epilog=_listed(module.EXAMPLES))(
        guarded(function)
    )


def main() -> int:
    """Run the command line, and return its exit code; ``--debug`` is taken wherever it stands."""
    try:
        sys.path.append(os.getcwd())  # for package.module:callable; last, so that it shadows nothing installed
    except FileNotFoundError:  # torch's libraries do not load there
        error_line("the current folder has been removed: change to one that is there")
        return 1
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
        set_debug(True)
    code = 0
    try:
        app()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    reason = why_nothing_was_shown()
    if reason is None:
        return code
    if code == 0 and something_was_written():
        print_message(f"the files are written; standard output could not be shown: {reason}")
        return 0
    error_line(f"cannot write to standard output: {reason}")
    return code or 1
