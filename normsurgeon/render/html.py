"""A document as one self-contained page, or as what a notebook cell shows: every value is escaped."""

from __future__ import annotations

import base64
import functools
import itertools
import json
import re
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from normsurgeon._util.plain import plain
from normsurgeon.render.document import Chart, Document, Section, Table
from normsurgeon.render.formatting import cell_texts, exact, has_value, number_in, used
from normsurgeon.render.text import block_text

ICONS = {
    "problem": '<path d="M4.1 0h5.8L14 4.1v5.8L9.9 14H4.1L0 9.9V4.1z"/>',
    "warning": '<path d="M7 .5 14 13.5H0z"/>',
    "notice": '<circle cx="7" cy="7" r="6.2"/>',
    "good": '<path d="M1 7.6 3 5.4l2.6 2.5L11.2 2 13.2 4l-7.6 8z"/>',
}
DEEPEST_SHADE = 45
"""Per cent of colour in the cell with a table's greatest number."""


def to_page(document: Document) -> str:
    """The whole page: no request leaves it, light and dark, for a desktop and a phone."""
    sections = document.shown_in("page")
    blocks = [block for section in sections for block in section.blocks]
    charts = [block for block in blocks if isinstance(block, Chart)]
    tables = any(isinstance(block, Table) and block.searchable for block in blocks)
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            document=document,
            sections=sections,
            anchors=_anchors(sections),
            css=_asset("page.css"),
            data=_embedded(_chart_data(charts)) if charts else "",
            plotly=_plotly() if charts else "",
            charts_js=_asset("charts.js"),
            table_js=_asset("table.js") if tables else "",
        )
    )


def to_notebook(document: Document) -> str:
    """A fragment of HTML that neither runs anything nor styles anything outside itself."""
    template = _environment().get_template("notebook.html.j2")
    return template.render(document=document, sections=document.shown_in("notebook"), css=_asset("notebook.css"))


def _chart_data(charts: list[Chart]) -> dict[str, Any]:
    """The figures, as small as can be: without templates; a long list that several of them hold stands here once."""
    from normsurgeon.render.charts import DARK, LIGHT

    shared: dict[str, int] = {}

    def compact(value: Any) -> Any:
        if isinstance(value, dict):
            if "bdata" in value:
                return _matrix(value)
            return {key: compact(inner) for key, inner in value.items() if key != "template"}
        if isinstance(value, (list, tuple)):
            if len(value) > 4 and not isinstance(value[0], (list, tuple, dict)):
                return {"$": shared.setdefault(json.dumps(plain(value)), len(shared))}
            return [compact(inner) for inner in value]
        return plain(value)

    figures = {chart.id: compact(chart.figure().to_plotly_json()) for chart in charts}
    return {"charts": figures, "shared": [json.loads(text) for text in shared], "light": LIGHT, "dark": DARK}


def _matrix(encoded: dict[str, str]) -> dict[str, Any]:
    """A matrix of plotly's in 16-bit ten-thousandths, half as large; the least integer stands for no value."""
    import numpy as np

    values = np.frombuffer(base64.b64decode(encoded["bdata"]), encoded["dtype"])
    whole = np.clip(np.rint(np.nan_to_num(values) * 1e4), -32767, 32767)
    cells = np.where(np.isfinite(values), whole, -32768).astype("<i2")
    columns = int(encoded["shape"].split(",")[1])
    return {"i2": base64.b64encode(cells.tobytes()).decode("ascii"), "columns": columns}


def _anchors(sections: list[Section]) -> dict[str, str]:
    """Where the page's findings link to: the rows of its searchable tables, by name."""
    return {
        str(row[0]): f"{section.id}-{i}"
        for section in reversed(sections)
        for block in section.blocks
        if isinstance(block, Table) and block.searchable
        for i, row in enumerate(block.rows)
    }


def _shades(table: Table) -> list[list[float]]:
    """How strongly each cell is tinted, in per cent, by its number's place between the table's least and greatest."""
    numeric = [column.form != "text" for column in table.columns]
    numbers = [[number_in(v) if n else None for v, n in zip(row, numeric, strict=True)] for row in table.rows]
    known = [v for row in numbers for v in row if v is not None]
    low, span = (min(known), (max(known) - min(known)) or 1.0) if known else (0.0, 1.0)
    return [[0.0 if v is None else round(DEEPEST_SHADE * (v - low) / span, 1) for v in row] for row in numbers]


def _choices(table: Table) -> list[str]:
    """The values of the column that the page's filter lists."""
    titles = [column.title for column in table.columns]
    at = titles.index(table.select) if table.select in titles else -1  # a column of nothing is left out
    return list(dict.fromkeys(str(row[at]) for row in table.rows if has_value(row[at]))) if at >= 0 else []


def _runs(blocks: Any) -> list[tuple[bool, list[Any]]]:
    """Blocks in runs of charts and of others: charts next to each other share a grid."""
    return [(charts, list(run)) for charts, run in itertools.groupby(blocks, lambda block: isinstance(block, Chart))]


@functools.cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("normsurgeon.render"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {
        "breakable": _breakable,
        "cells": cell_texts,
        "choices": _choices,
        "exact": lambda value: _minus(exact(value)),
        "minus": _minus,
        "number": lambda value: "" if (number := number_in(value)) is None else repr(number),
        "plain": block_text,
        "runs": _runs,
        "shades": _shades,
        "share": lambda share: f"{100 * share:.0f} %",
        "type": lambda block: type(block).__name__,
        "used": used,
        "words": lambda text: str(text).replace("_", " "),
    }
    made.globals["icons"] = {name: Markup(path) for name, path in ICONS.items()}
    return made


def _minus(text: str) -> str:
    """Text whose numbers have the sign for minus and not a hyphen."""
    return re.sub(r"(?<![\w)])-(?=\d)|(?<=\de)-(?=\d)", "−", text)


def _breakable(text: Any) -> Markup:
    """Escaped text in which a long dotted or slashed name may be broken after a dot."""
    return Markup(re.sub(r"(?<=[\w)])([./_:])(?=[A-Za-z_])", r"\1<wbr>", str(escape(text))))


def _embedded(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


@functools.cache
def _asset(name: str) -> Markup:
    """One of our own style sheets or scripts, as it is."""
    return Markup(resources.files("normsurgeon.render").joinpath("templates", name).read_text(encoding="utf-8"))


@functools.cache
def _plotly() -> Markup:
    """Plotly's script, as it ships."""
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())
