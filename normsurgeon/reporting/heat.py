"""A similarity matrix at a terminal: two rows a line in half blocks, or digits where there are no colours."""

from __future__ import annotations

from collections.abc import Sequence

from rich.color import Color
from rich.console import Group, RenderableType
from rich.style import Style
from rich.text import Text

from normsurgeon.reporting.blocks import colour, digit, shrunk
from normsurgeon.reporting.formatting import short_name
from normsurgeon.reporting.records import Matrix

_MOST = 64
_LABELS = 18
_GREY = Color.from_rgb(110, 110, 110)


def heat_map(values: Matrix, rows: Sequence[str], across: Sequence[str], width: int, colours: bool) -> RenderableType:
    """At most 64 cells wide, averaged from more layers; the names stand at the left where there is room."""
    room = width - _LABELS - 2
    labelled = room >= 24
    space = min(_MOST, room if labelled else width)
    few = len(across) * 2 <= space and len(rows) <= 32
    small = shrunk(values, min(len(rows), space), min(len(across), space))
    starts = [i * len(rows) // max(1, len(small)) for i in range(len(small))]
    lines: list[Text] = []
    step = 1 if few or not colours else 2
    for i in range(0, len(small), step):
        line = Text(no_wrap=True)
        if labelled:
            line.append(short_name(rows[starts[i]], _LABELS).rjust(_LABELS) + " ", "dim")
        if not colours:
            line.append("".join(digit(v) * (2 if few else 1) for v in small[i]))
        elif few:
            for value in small[i]:
                line.append("  " if value is not None else "··", _painted(value))
        else:
            lower = small[i + 1] if i + 1 < len(small) else (None,) * len(small[i])
            for top, bottom in zip(small[i], lower, strict=True):
                line.append("▀", Style(color=_colour(top), bgcolor=_colour(bottom) if i + 1 < len(small) else None))
        lines.append(line)
    return Group(*lines, _legend(len(small), len(rows), colours, rows, across, labelled))


def _colour(value: float | None) -> Color:
    return _GREY if value is None else Color.from_rgb(*colour(value))


def _painted(value: float | None) -> Style:
    return Style(color=_GREY) if value is None else Style(bgcolor=_colour(value))


def _legend(drawn: int, of: int, colours: bool, rows: Sequence[str], across: Sequence[str], labelled: bool) -> Text:
    legend = Text("", overflow="fold")
    if colours:
        legend.append("0 ")
        for i in range(11):
            legend.append(" ", Style(bgcolor=_colour(i / 10)))
        legend.append(" 1")
    else:
        legend.append("tenths: 9 is 0.9 and above", "dim")
    if drawn < of:
        legend.append(f"  {of} layers averaged to {drawn}", "dim")
    elif not labelled:
        legend.append(f"  from {across[0]} to {across[-1]}", "dim")
    return legend
