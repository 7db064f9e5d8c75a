"""The answer as one self-contained page, in the analysis report's style and with its scripts."""

from __future__ import annotations

import functools
import re
from importlib import resources
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader
from markupsafe import Markup

from normsurgeon.reporting import html
from normsurgeon.reporting.formatting import shown
from normsurgeon.study import charts
from normsurgeon.study.answer import Answer
from normsurgeon.study.panels import (
    comparison_panels,
    crossing_panel,
    facts,
    layer_panel,
    lost_panel,
    ranking_panel,
    rate_panel,
    run_label,
    table_panel,
)
from normsurgeon.study.quantities import Crossing

METHOD = (
    "Seeds are the replicates. Two norms are compared by the paired differences of runs that share a seed and "
    "everything else; each seed's differences are averaged over the settings before they are tested, so n is the "
    "number of seeds.",
    "Intervals are Student's, 95 %. The test is the paired t test, two-sided; below 3 seeds nothing is tested. g is "
    "Hedges' g of the paired differences (Cohen's d_z with Hedges' correction).",
    "Holm's adjustment keeps the probability of any false claim in a family of comparisons at 5 %. The overall "
    "comparisons and the slopes on the batch size are one family, the comparisons within settings another; a sentence "
    "about a setting needs a significant comparison of the same norms in the first.",
    "A diverged run counts as 0 right wherever norms are compared or averaged. The table of cells alone shows the runs "
    "that finished. Failed and skipped runs are left out, with their pairs.",
    "A comparison says how these norms differ on these held-out images, over the randomness of training. It says "
    "nothing of other images, models or data sets.",
)


def page(answer: Answer) -> str:
    """The whole page as text."""
    results = answer.results
    several = len(answer.norms) > 1
    batch, differences = charts.batch_chart(answer), charts.difference_chart(answer)
    rates, rate_table = charts.rate_chart(answer), rate_panel(answer)
    curves, layer_chart = charts.curve_chart(answer), charts.layer_chart(answer)
    similarity = charts.similarity_charts(answer)
    compared = tuple(comparison_panels(answer))
    by_size = [c for c in answer.crossings if c.axis == "batch_size"]
    others = [c for c in answer.crossings if c.axis != "batch_size"]
    cells, lost = (table_panel(answer) if answer.table else None), lost_panel(answer)
    looked = [
        layer_panel(f"layers-{i}", f"{run_label(answer, run)}, seed {run.cell.seed}", run.looked.layers)
        for i, run in enumerate(results.outcomes)
        if run.looked and run.looked.layers
    ]
    drawn = [chart for chart in (batch, rates, differences, curves, layer_chart, *similarity) if chart]
    specs = {chart.id: chart.spec for chart in drawn}
    there = (
        ("findings", "Findings", True), ("batch", "Batch size", batch), ("rates", "Learning rate", rates),
        ("comparisons", "Comparisons", compared),
        ("crossings", "Norm × everything else", others), ("curves", "Training", curves), ("layers", "Layers", looked),
        ("cells", "Every cell", cells), ("lost", "Without a result", lost), ("method", "How it was computed", True),
    )  # fmt: skip
    none: dict[str, Any] = {"names": [], "kinds": [], "about": [], "ticks": [], "columns": {}}
    return (
        _environment()
        .get_template("study.html.j2")
        .render(
            results=results,
            facts=facts(answer),
            findings=answer.findings,
            icons={name: Markup(path) for name, path in html.ICONS.items()},
            sections=[(name, title) for name, title, present in there if present],
            ranking=ranking_panel(answer) if several else None,
            batch=batch,
            batch_table=(crossing_panel(by_size[0]), warmth(by_size[0])) if by_size else None,
            rates=rates,
            rate_table=rate_table,
            differences=differences,
            compared=compared,
            crossings=[(crossing_panel(crossing), warmth(crossing)) for crossing in others],
            curves=curves,
            looked=looked,
            layer_chart=layer_chart,
            similarity=similarity,
            cells=cells,
            lost=lost,
            method=METHOD,
            training=[(name, shown(value)) for name, value in results.training.items()],
            kinds=[],
            charts=specs,
            data=html.embedded({"layers": none, "labels": [], "charts": specs}),
            css=html.asset("page.css") + _asset("study.css"),
            study_js=_asset("study.js"),
            charts_js=html.asset("charts.js"),
            table_js=html.asset("table.js"),
            plotly=html.plotly() if drawn else "",
        )
    )


def warmth(crossing: Crossing) -> list[list[float]]:
    """How strongly each cell of a crossed table is tinted, in per cent: 0 for its least accuracy, 45 for its best."""
    known = {(level, norm): mean for level, norm, mean, *_ in crossing.cells if mean is not None}
    norms = [norm for norm in crossing.norms if any(key[1] == norm for key in known)]
    low, high = (min(known.values()), max(known.values())) if known else (0.0, 0.0)
    span = (high - low) or 1.0
    return [
        [0.0, *(round(45 * (known.get((level, norm), low) - low) / span, 1) for norm in norms)]
        for level in crossing.levels
    ]


def sortable(cell: str) -> str:
    """The number that a cell begins with, for sorting; empty where there is none.

    >>> sortable("± 1.2"), sortable("−0.5 *"), sortable("–")
    ('1.2', '-0.5', '')
    """
    found = re.search(r"-?\d+(\.\d+)?(e-?\d+)?", cell.replace("−", "-"))
    return found.group() if found else ""


@functools.cache
def _environment() -> Environment:
    """The report's templates and filters, and the study's template beside them."""
    made = html.environment().overlay(
        loader=ChoiceLoader([PackageLoader("normsurgeon.study", "templates"), PackageLoader(*html.TEMPLATES)])
    )
    made.filters = {**made.filters, "sortable": sortable}
    return made


@functools.cache
def _asset(name: str) -> Markup:
    """One of the study's own style sheets or scripts, as it is."""
    return Markup(resources.files("normsurgeon.study").joinpath("templates", name).read_text(encoding="utf-8"))
