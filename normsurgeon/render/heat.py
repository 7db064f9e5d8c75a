"""A matrix at a terminal: two rows a line in half blocks, or digits where there are no colours."""

from __future__ import annotations

from collections.abc import Callable

from rich.color import Color
from rich.console import Group, RenderableType
from rich.style import Style
from rich.text import Text

from normsurgeon.render.document import HeatMap, Number
from normsurgeon.render.formatting import short_name
from normsurgeon.render.sparklines import colour, digit, shrunk, starts

MAX_CELLS = 64
_LABELS = 18
_GREY = Color.from_rgb(110, 110, 110)


def heat_map(block: HeatMap, width: int, colours: bool, signs: Callable[[str], str] = str) -> RenderableType:
    """At most 64 cells wide, neighbours averaged; the names stand at the left where there is room.

    ``signs`` puts a text into the signs that the terminal has.
    """
    rows, across = block.rows, block.columns
    room = width - _LABELS - 2
    labelled = room >= 24
    space = min(MAX_CELLS, room if labelled else width)
    few = len(across) * 2 <= space and len(rows) <= 32
    small = shrunk(block.values, min(len(rows), space), min(len(across), space))
    names = [rows[i] for i in starts(len(rows), len(small))]
    lines: list[Text] = []
    step = 1 if few or not colours else 2
    for i in range(0, len(small), step):
        line = Text(no_wrap=True)
        if labelled:
            line.append(signs(short_name(names[i], _LABELS)).rjust(_LABELS) + " ", "dim")
        if not colours:
            line.append(signs("".join(digit(v) * (2 if few else 1) for v in small[i])))
        elif few:
            for value in small[i]:
                line.append("  " if value is not None else "··", _painted(value))
        else:
            lower = small[i + 1] if i + 1 < len(small) else [None] * len(small[i])
            for top, bottom in zip(small[i], lower, strict=True):
                line.append("▀", Style(color=_colour(top), bgcolor=_colour(bottom) if i + 1 < len(small) else None))
        lines.append(line)
    return Group(*lines, _legend(block, len(small), colours, labelled))


def _colour(value: Number) -> Color:
    return _GREY if value is None else Color.from_rgb(*colour(value))


def _painted(value: Number) -> Style:
    return Style(color=_GREY) if value is None else Style(bgcolor=_colour(value))


def _legend(block: HeatMap, drawn: int, colours: bool, labelled: bool) -> Text:
    legend = Text("", overflow="fold")
    if colours:
        legend.append("0 ")
        for i in range(11):
            legend.append(" ", Style(bgcolor=_colour(i / 10)))
        legend.append(" 1")
    else:
        legend.append("tenths: 9 is 0.9 and above", "dim")
    if drawn < len(block.rows):
        legend.append(f"  {len(block.rows)} rows averaged to {drawn}", "dim")
    elif not labelled and block.rows:
        legend.append(f"  from {block.columns[0]} to {block.columns[-1]}", "dim")
    return legend
