"""A document as plain aligned text, for ``print``, pipes and files: nothing cut off, no colour codes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from normsurgeon.printable import printable
from normsurgeon.render.document import (
    Bars,
    Block,
    Chart,
    Code,
    Document,
    Facts,
    Findings,
    HeatMap,
    Notes,
    Pictures,
    Sparklines,
    Table,
    Text,
)
from normsurgeon.render.formatting import as_ascii, cell_texts, in_form, joined, number_behind, significant, used, where
from normsurgeon.render.sparklines import digit, ends, shrunk, sparkline, starts

WIDTH = 60
"""Of sparklines and matrices."""


def to_text(document: Document, ascii_only: bool = False) -> str:
    """All of it, in lines that end with a newline."""
    parts = [
        ": ".join(filter(None, (document.kind, document.title)))
        + (f", {document.subtitle}" if document.subtitle else ""),
        plain_table(("", ""), [pair for facts in document.facts for pair in facts.pairs]).strip("\n"),
    ]
    for section in document.shown_in("text"):
        if body := joined([block_text(block) for block in section.blocks]):
            parts.append(f"{section.title}\n{body}" if section.title else body)
    text = printable(joined(parts)) + "\n"
    return as_ascii(text) if ascii_only else text


def plain_table(header: Sequence[str], rows: Iterable[Sequence[Any]], right: Collection[int] = ()) -> str:
    """Columns aligned by spaces; an absent value is an empty cell, and a column without any value is left out.

    >>> print(plain_table(("layer", "groups", "why"), [("bn1", 4, None), ("layer1.bn", None, None)]))
    layer      groups
    bn1        4
    layer1.bn
    """
    title, *cells = (
        ["" if value is None else printable(str(value), keep="") for value in row] for row in (header, *rows)
    )
    used = [i for i in range(len(header)) if any(row[i] for row in cells)]
    table = [[row[i] for i in used] for row in (title, *cells)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, cell, width in zip(used, row, widths, strict=True)
        )
        for row in table
    )
    return "\n".join(line.rstrip() for line in lines)


def block_text(block: Block) -> str:
    """One block; empty where it has nothing to show."""
    match block:
        case Facts(pairs):
            return _indented(pairs)
        case Text(text) | Code(text):
            return text
        case Notes(lines):
            return "\n".join(f"  {line}" for line in lines)
        case Findings():
            return _findings(block)
        case Table():
            return _table(block)
        case Pictures():
            return _table(block.table)
        case Sparklines():
            return _sparklines(block)
        case Bars(entries, title):
            scores = [
                (name, significant(value), f"± {significant(error)}" if error is not None else None)
                for name, value, error in entries
            ]
            return joined([title, _indented(scores)], "\n")
        case HeatMap():
            return _matrix(block)
        case Chart(plain=plain):
            return joined([block_text(inner) for inner in plain])


def _findings(block: Findings) -> str:
    lines = [block.title] if block.title else []
    if not block.findings:
        return joined([*lines, f"  {block.empty}"], "\n") if block.empty else ""
    wide = max(len(finding.kind or finding.severity) for finding in block.findings)
    for finding in block.findings:
        number = f" ({number_behind(finding)})" if finding.value is not None else ""
        label = (finding.kind or finding.severity).ljust(wide)
        lines.append(f"  {label}  {where(finding)}{finding.text}{number}")
        if finding.advice:
            lines.append(f"  {' ' * wide}  -> {finding.advice}")
    return "\n".join(lines)


def _table(table: Table) -> str:
    table = used(table)
    right = [i for i, column in enumerate(table.columns) if column.form != "text"]
    body = plain_table([column.title for column in table.columns], cell_texts(table), right) if table.rows else ""
    return joined([table.title, table.note, body], "\n")


def _sparklines(block: Sparklines) -> str:
    rows = [
        (line.label, f"|{sparkline(line.values, WIDTH, line.log)}|",
         *(in_form(value, line.form) for value in ends(line.values, block.ends)))
        for line in block.lines
    ]  # fmt: skip
    body = plain_table(("", "", *(("first", "last") if block.ends else ("least", "greatest"))), rows, (2, 3))
    return joined([block.title, body], "\n") if rows else ""


def _matrix(block: HeatMap) -> str:
    """Tenths as digits; neighbours averaged where there are many."""
    small = shrunk(block.values, WIDTH, WIDTH)
    if not small:
        return ""
    one_each = len(small) == len(block.rows) and len(small[0]) == len(block.columns)
    each = "one digit each" if one_each else f"{len(block.rows)} × {len(block.columns)} averaged"
    names = [block.rows[i] for i in starts(len(block.rows), len(small))]
    lines = [(name, "".join(map(digit, row))) for name, row in zip(names, small, strict=True)]
    return f"{block.title}, in tenths ({each})\n{_indented(lines)}"


def _indented(rows: Sequence[Sequence[str | None]]) -> str:
    lines = plain_table([""] * max(map(len, rows), default=0), rows).split("\n")[1:]
    return "\n".join(f"  {line}" for line in lines)
