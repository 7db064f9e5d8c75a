"""Records as plain text, for ``print`` and for pipes, and the same tables as a notebook shows them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any


def plain_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns aligned by spaces; an absent value is an empty cell, and a column without any value is left out.

    >>> print(plain_table(("layer", "groups", "why"), [("bn1", 4, None), ("layer1.bn", None, None)]))
    layer      groups
    bn1        4
    layer1.bn
    """
    table = _used(header, rows)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table)


def html_table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]], most_open: int = 15) -> str:
    """The same table as a fragment of HTML, folded away where it has more than ``most_open`` rows.

    >>> html_table("net <1>", ("layer", "groups"), [("bn1", 4)])[:41]
    '<details open><summary>net &lt;1&gt;</sum'
    """
    top, *body = _used(header, rows)
    scroll = ' style="overflow: auto; max-height: 26em"'
    left = ' style="text-align: left"'
    lines = ["".join(f"<td{left}>{html.escape(cell)}</td>" for cell in row) for row in body]
    return (
        f"<details{' open' if len(body) <= most_open else ''}><summary>{html.escape(title)}</summary>"
        f"<div{scroll}><table><thead><tr>{''.join(f'<th{left}>{html.escape(cell)}</th>' for cell in top)}</tr></thead>"
        f"<tbody>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody></table></div></details>"
    )


def _used(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[list[str]]:
    """Header and rows as text, without the columns that hold nothing."""
    cells = [["" if value is None else str(value) for value in row] for row in rows]
    used = [i for i in range(len(header)) if any(row[i] for row in cells)]
    return [[header[i] for i in used], *([row[i] for i in used] for row in cells)]
