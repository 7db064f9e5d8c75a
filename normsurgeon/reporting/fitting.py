"""Tables that fit a terminal: as many columns as there is room for, and word of those left out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

_GAP = 2
_NAME = 16  # the least width of the first column when it has to wrap


def fitted_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], width: int, texts: Collection[int] = (0,)
) -> Iterator[RenderableType]:
    """The first columns that fit; the first of all, which holds names, wraps rather than push others out.

    ``texts`` are the columns that align to the left.
    """
    widths = [max(len(header[i]), *(len(row[i]) for row in rows)) for i in range(len(header))]
    first = min(widths[0], max(_NAME, width // 3))
    used, left = [0], width - first
    for i in range(1, len(header)):
        if widths[i] + _GAP > left:
            break
        used.append(i)
        left -= widths[i] + _GAP
    first = min(widths[0], first + left)
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="dim")
    for i in used:
        if i == 0:
            table.add_column(Text(header[i]), width=first, overflow="fold")
        else:
            table.add_column(Text(header[i]), justify="left" if i in texts else "right", no_wrap=True, width=widths[i])
    for row in rows:
        table.add_row(*(Text(row[i]) for i in used))
    yield table
    if len(used) < len(header):
        yield Text(f"no room for: {', '.join(header[len(used) :])}", "dim", overflow="fold")
