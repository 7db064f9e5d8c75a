"""The report as a notebook cell shows it: findings, the layer table, provenance; no script, styles of its own."""

from __future__ import annotations

from normsurgeon.reporting.facts import agreement, facts, origin
from normsurgeon.reporting.html import asset, environment
from normsurgeon.reporting.layers import columns, layer_rows
from normsurgeon.reporting.records import Report


def notebook_html(report: Report) -> str:
    """A fragment of HTML that neither runs anything nor styles anything outside itself."""
    rows = layer_rows(report)
    return (
        environment()
        .get_template("notebook.html.j2")
        .render(
            provenance=report.provenance,
            facts=(*agreement(report), *facts(report)),
            origin=origin(report),
            findings=report.findings,
            rows=rows,
            columns=columns(report, rows),
            css=asset("notebook.css"),
        )
    )
