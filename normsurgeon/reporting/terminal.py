"""Printing at a terminal or into a pipe."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console, RenderableType


def print_either(renderable: RenderableType, plain: Callable[[bool], str], console: Console | None = None) -> None:
    """Print the renderable at a terminal; in a pipe the plain text, which is asked for in ASCII where need be."""
    console = console or Console(highlight=False)
    if console.is_terminal:
        console.print(renderable)
        return
    encoding = console.encoding or "utf-8"
    text = plain(not encoding.lower().startswith("utf")).encode(encoding, "replace").decode(encoding)
    console.print(text, markup=False, highlight=False, soft_wrap=True, emoji=False, end="")
