"""The report as one self-contained page: no request leaves it, nothing in it is code but our own and Plotly's."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from normsurgeon.reporting import figures, maps_and_bars
from normsurgeon.reporting.deeds import deeds
from normsurgeon.reporting.facts import agreement, facts, measures, origin
from normsurgeon.reporting.figures import Chart
from normsurgeon.reporting.formatting import exact
from normsurgeon.reporting.layers import LayerRow, columns, layer_rows
from normsurgeon.reporting.records import Report
from normsurgeon.reporting.standouts import standouts
from normsurgeon.reporting.worst import worst_pairs

TEMPLATES = "normsurgeon.reporting", "templates"
_SEVERITIES = ("problem", "warning", "notice", "good")
ICONS = {
    "problem": '<path d="M4.1 0h5.8L14 4.1v5.8L9.9 14H4.1L0 9.9V4.1z"/>',
    "warning": '<path d="M7 .5 14 13.5H0z"/>',
    "notice": '<circle cx="7" cy="7" r="6.2"/>',
    "good": '<path d="M1 7.6 3 5.4l2.6 2.5L11.2 2 13.2 4l-7.6 8z"/>',
}
_HOVER = (
    ("mean", "mean"), ("std", "std"), ("abs_mean", "mean |x|"), ("min", "min"), ("max", "max"),
    ("zero_fraction", "zeros"), ("skewness", "skewness"), ("kurtosis", "kurtosis"),
    ("effective_rank", "eff. rank"), ("participation_ratio", "part. ratio"),
    ("channel_var", "ch. variance"), ("squared_mean", "sq. ch. mean"), ("between_var", "var. between"),
    ("within_var", "var. within"), ("dead_channels", "dead ch."), ("dormant_channels", "dormant ch."),
    ("group_fluctuation", "group fluct."), ("mean_fluctuation", "mean fluct."), ("nan", "nan"),
    ("inf", "inf"), ("cka", "CKA"), ("cosine", "cosine"), ("relative_error", "rel. error"),
    ("baseline:std", "before: std"), ("baseline:abs_mean", "before: |x|"),
    ("baseline:effective_rank", "before: eff. rank"),
)  # fmt: skip


@dataclass(frozen=True)
class Section:
    """A heading with charts under it, and what is said around them."""

    id: str
    title: str
    charts: tuple[Chart, ...]
    text: str = ""
    figures: tuple[tuple[str, str], ...] = ()
    tables: tuple[tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]], ...] = ()
    notes: tuple[str, ...] = ()
    depth: bool = False


def page(report: Report) -> str:
    """The whole page as text."""
    rows = layer_rows(report)
    shared = figures.table(rows)
    chart_sections = _sections(report, rows, shared)
    charts = {chart.id: chart.spec for section in chart_sections for chart in section.charts}
    measured = bool(rows or charts)
    sections = [("findings", "Findings")] if report.findings or measured else []
    sections += [(section.id, section.title) for section in chart_sections]
    sections += [("layers", "Layers")] if rows else []
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            provenance=report.provenance,
            facts=facts(report),
            agreement=agreement(report),
            origin=origin(report),
            findings=report.findings,
            show_findings=bool(report.findings or measured),
            standouts=standouts(report, rows),
            icons={name: Markup(path) for name, path in ICONS.items()},
            sections=[*sections, ("provenance", "Provenance")],
            chart_sections=chart_sections,
            kinds=list(dict.fromkeys(shared["kinds"])),
            rows=rows,
            columns=columns(report, rows),
            anchors={row.layer: f"layer-{i}" for i, row in enumerate(rows)},
            charts=charts,
            data=embedded({"layers": shared, "labels": _HOVER, "charts": charts}),
            css=asset("page.css"),
            charts_js=asset("charts.js"),
            table_js=asset("table.js"),
            plotly=plotly() if charts else "",
        )
    )


def _sections(report: Report, rows: tuple[LayerRow, ...], shared: dict[str, Any]) -> list[Section]:
    comparison, similarity = report.comparison, report.similarity
    sections = [Section("profile", "Layer profile", figures.profile_charts(shared), depth=True)]
    if chart := maps_and_bars.similarity_chart(report):
        notes = similarity.notes if similarity else ()
        sections.append(Section("similarity", "Similarity", (chart,), notes=notes))
    if comparison is not None:
        alone = [
            f"Only in the {whose}: {', '.join(names)}"
            for whose, names in (("model", comparison.only_model), ("baseline", comparison.only_baseline))
            if names
        ]
        drawn = [chart for chart in (maps_and_bars.comparison_map(comparison),) if chart]
        header, body = worst_pairs(rows)
        sections.append(
            Section(
                "comparison",
                "Comparison",
                (*figures.comparison_charts(shared), *drawn),
                f"Against {comparison.baseline}, from {comparison.samples} images.",
                agreement(report),
                (("Farthest from the baseline", header, body),) if body else (),
                (*comparison.notes, *alone),
                depth=True,
            )
        )
    if chart := maps_and_bars.sensitivity_chart(report):
        sections.append(Section("sensitivity", "Sensitivity", (chart,), notes=measures(report)))
    if chart := maps_and_bars.sweep_chart(report):
        sections.append(Section("sweep", "Settings", (chart,)))
    sections.append(Section("history", "History", maps_and_bars.history_charts(report), notes=deeds(report.history)))
    return [s for s in sections if s.charts or s.tables or s.figures or (s.id == "history" and s.notes)]


@functools.cache
def environment() -> Environment:
    """The templates, with every value escaped."""
    made = Environment(
        loader=PackageLoader(*TEMPLATES), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    made.filters |= {
        "breakable": breakable,
        "lower_first": lambda text: text if text[:2].isupper() else text[:1].lower() + text[1:],
        "minus": minus,
        "exact": lambda value: minus(exact(value)),
        "words": lambda text: str(text).replace("_", " "),
        "severity": lambda text: text if text in _SEVERITIES else "notice",
    }
    return made


def minus(text: str) -> str:
    """Text whose numbers have the sign for minus and not a hyphen."""
    return re.sub(r"(?<![\w)])-(?=\d)|(?<=\de)-(?=\d)", "−", text)


def breakable(text: Any) -> Markup:
    """Escaped text in which a long dotted or slashed name may be broken after a dot."""
    return Markup(re.sub(r"(?<=[\w)])([./_:])(?=[A-Za-z_])", r"\1<wbr>", str(escape(text))))


def embedded(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


@functools.cache
def asset(name: str) -> Markup:
    """One of our own style sheets or scripts, as it is."""
    return Markup(resources.files("normsurgeon.reporting").joinpath("templates", name).read_text(encoding="utf-8"))


@functools.cache
def plotly() -> Markup:
    """Plotly's script, as it ships."""
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())
