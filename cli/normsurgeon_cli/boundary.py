"""Where an error becomes one line and an exit code: 0 done, 1 it could not be done, 2 wrong usage."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from normsurgeon._util.parts import remove_own_parts
from normsurgeon.distributed import error_is_shared, is_main_process
from normsurgeon.errors import NormSurgeonError
from normsurgeon_cli import stops
from normsurgeon_cli.console import error_line

_state = {"debug": bool(os.environ.get("NORMSURGEON_DEBUG"))}

_DEBUG = Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")]


stops.before_the_end.append(remove_own_parts)
if not is_main_process():
    stops.say_nothing()


def set_debug(on: bool) -> None:
    """Show whole tracebacks from here on."""
    _state["debug"] = on


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with ``--debug``, and with its errors turned into one line on standard error."""

    @functools.wraps(command)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> Any:
        if debug:
            set_debug(True)
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as error:
            error_line("interrupted: nothing half-written is left behind")
            raise typer.Exit(getattr(error, "exit_code", 130)) from None
        except NormSurgeonError as error:
            if _state["debug"]:
                raise
            if is_main_process() or not error_is_shared(error):
                error_line(str(error))
            raise typer.Exit(error.exit_code) from None
        except MemoryError:
            error_line("out of memory; try a smaller --batch-size")
            raise typer.Exit(1) from None
        except Exception as error:
            if _state["debug"]:
                raise
            text = " ".join(str(error).split())
            # Printed by the process that has it, too: its --debug shows where.
            error_line(f"unexpected {type(error).__name__}: {text}; --debug shows where (please report it)")
            raise typer.Exit(1) from None

    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_DEBUG)
    parameters = [*signature.parameters.values(), option]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
