"""The arguments that several commands share, and the checks that go with them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from normsurgeon.distributed import own_device
from normsurgeon.errors import UsageError

Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, mps; default: cuda where there is one.", show_default=False),
]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Images that go through the network at once.")]
MaxImages = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="At most this many, spread evenly over the data. Default: all.", show_default=False
    ),
]
Labels = Annotated[
    str,
    typer.Option(
        "--labels",
        metavar="by-name|by-position|none",
        help="Where class numbers are from: the network's names for its classes (else the order of as many folders), "
        "the order whatever the names, or nowhere.",
    ),
]
InputShape = Annotated[
    str | None,
    typer.Option(
        "--input-shape",
        metavar="N,C,H,W",
        help="Shape of the network's input, with the batch, if its first layer does not show it: 2,1,28,28.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output and nothing else.")]


Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")]


_COLUMNS = 80
"""Of a terminal, below which the names of options would be cut off in the columns of the help."""


class Command(TyperCommand):
    """A command whose help is in plain lines on a narrow terminal.

    It also understands ``--json FILE.json`` where it has ``--json-file``.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """In columns where they fit."""
        if shutil.get_terminal_size().columns < _COLUMNS:
            self.rich_markup_mode = None
        super().format_help(ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Options with an optional value are not click's: the one there is becomes two."""
        if any("--json-file" in parameter.opts for parameter in self.params):
            for place, word in enumerate(args):
                follower = args[place + 1 : place + 2]
                if word.startswith("--json="):
                    args = [*args[:place], "--json-file", word.removeprefix("--json="), *args[place + 1 :]]
                elif word == "--json" and follower and follower[0].endswith(".json"):
                    args = [*args[:place], "--json-file", *args[place + 1 :]]
        return super().parse_args(ctx, args)


def check_output(path: Path, force: bool, inputs: Iterable[str | Path | None] = ()) -> None:
    """Fail before the work: on an output that is an input, that is there already, or that cannot be written.

    :raises UsageError: for the first two; ``force`` allows the second.
    :raises WriteError: for the last.
    """
    from normsurgeon._util.files import check_writable

    check_writable(path)
    if not os.path.lexists(path):  # a link to nothing, or to a disk that is away, is there
        return
    for given in inputs:
        if given is not None and os.path.exists(given) and path.exists() and os.path.samefile(given, path):
            raise UsageError(f"{path} is what this command reads: give another name to what it writes")
    if not force:
        raise UsageError(f"{path} is there already: give another name, or --force to replace it")


def example_inputs(shape: str | None) -> Any:
    """A tensor of the shape that a text like ``2,3,224,224`` names, without memory; None for None."""
    if shape is None:
        return None
    sizes = shape.replace("x", ",").split(",")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise UsageError(f"--input-shape takes numbers with commas between, as in 2,3,224,224, not {shape!r}")
    import torch

    return torch.empty([int(size) for size in sizes], device="meta")


def number_of_groups(text: str) -> int | Literal["auto"]:
    """The value of ``--groups``."""
    if text == "auto":
        return "auto"
    if text.isdecimal():
        return int(text)
    raise UsageError(f"--groups takes a number or auto, not {text!r}")


def device_or_default(device: str | None) -> Any:
    """The given device; else cuda if there is one, and None (where the model is) if there is none.

    Under a launcher each process's own GPU.
    """
    import torch

    return own_device("cuda" if device is None and torch.cuda.is_available() else device)
