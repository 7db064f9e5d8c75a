"""Records as plain text, for ``print`` and for pipes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def plain_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns aligned by spaces; an absent value is an empty cell, and a column without any value is left out.

    >>> print(plain_table(("layer", "groups", "why"), [("bn1", 4, None), ("layer1.bn", None, None)]))
    layer      groups
    bn1        4
    layer1.bn
    """
    cells = [["" if value is None else str(value) for value in row] for row in rows]
    used = [i for i in range(len(header)) if any(row[i] for row in cells)]
    table = [[header[i] for i in used], *([row[i] for i in used] for row in cells)]
    widths = [max(len(row[i]) for row in table) for i in range(len(used))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table)
