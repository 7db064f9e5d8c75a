"""A small document with every kind of block, about nothing in particular."""

from __future__ import annotations

from plotly.graph_objects import Figure

from normsurgeon.render import charts
from normsurgeon.render.document import (
    Bars,
    Chart,
    Code,
    Column,
    Document,
    Facts,
    Finding,
    Findings,
    HeatMap,
    Line,
    Notes,
    Section,
    Sparklines,
    Table,
    Text,
)

NASTY = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 2'>&\"'"
NAMES = ("stem", "stage1.conv", "stage1.norm", "stage2.conv", "stage2.norm", "head")
SPREAD = (0.1, 1.0, 12.0, 100.0, None, 1000.0)
CKA = tuple(tuple(1.0 if i == j else 0.9 - 0.15 * abs(i - j) for j in range(6)) for i in range(6))
COSINE = tuple(tuple(1.0 if i == j else None for j in range(6)) for i in range(6))


def line_figure() -> Figure:
    made = [
        charts.Series("gn", [1, 2, 4], [0.5, 0.6, 0.7], [0.4, 0.5, 0.65], [0.6, 0.7, 0.75], ["a", "b", "c"], tone=0),
        charts.Series("ln", [1, 2, 4], [0.4, 0.5, 0.6], [0.3, 0.4, 0.55], [0.5, 0.6, 0.65], ["a", "b", "c"], tone=1),
    ]
    return charts.lines(made, x_title="batch size", y_title="accuracy", log_x=True, percent=True, band=False)


def map_figure() -> Figure:
    return charts.choose({"CKA": charts.heat(NAMES, NAMES, CKA), "cosine": charts.heat(NAMES, NAMES, COSINE)})


def bar_figure() -> Figure:
    entries = [("stage1.norm", 3.0, 0.5), ("head", 1.0, None)]
    return charts.bars(entries, unit="nats", tones=[0, 1], keys=[(0, "norm"), (1, "linear")])


def forest_figure() -> Figure:
    rows = [charts.Interval("gn − ln", 1.5, 0.5, 2.5, True), charts.Interval("gn − rms", -0.2)]
    return charts.intervals(rows, unit="points")


def sample(name: str = "a network") -> Document:
    """``name`` is its title, and stands in every block."""
    findings = (
        Finding(f"{name} no longer computes what it did", "problem", "", "relative_error", 0.612, "Keep it", "stem"),
        Finding("3 of 64 channels never fire", "warning", value=3.0, metric="dead_channels", anchor="stage1.norm"),
        Finding("gn is better than ln", "good", kind="batch size"),
    )
    columns = (
        Column("layer"),
        Column("kind"),
        Column("std", "number", "standard deviation"),
        Column("zeros", "percent"),
        Column("dead", "count"),
        Column("never", "number"),
        Column("remark"),
    )
    rows = tuple(
        (layer, layer.split(".")[-1], SPREAD[i], i / 10, i, None, f"{name} " * i) for i, layer in enumerate(NAMES)
    )
    accuracy = Table(
        (Column("batch size"), Column("gn", "number"), Column("ln", "number")),
        (("1", "50.0 ± 1.0", "40.0 ± 1.0"), ("4", "–", "60.0 ± 2.0")),
        title="Batch size × norm",
        note="Accuracy in per cent",
        shaded=True,
    )
    sparks = Sparklines((Line("std", SPREAD, log=True), Line("zeros", (0.1, 0.2), form="percent")))
    drawn = (
        Chart("lines", "Accuracy", "gn rises from 0.5 to 0.7", line_figure, note=name, plain=(sparks,)),
        Chart("bars", "Sensitivity", "stage1.norm is highest, 3", bar_figure,
              plain=(Bars((("stage1.norm", 3.0, 0.5), ("head", 1.0, None)), "Sensitivity"),)),
        Chart("map", "Similarity", "6 by 6 layers", map_figure, wide=True, plain=(HeatMap(NAMES, NAMES, CKA, "CKA"),)),
        Chart("forest", "Differences", "gn − ln 1.5", forest_figure),
    )  # fmt: skip
    return Document(
        "sample document",
        name,
        (
            Section("findings", "Findings", (Findings(findings), Findings((), title="More", empty=""))),
            Section("charts", "Charts", (Text(f"About {name}."), *drawn, accuracy, Notes((f"a note on {name}",)))),
            Section("layers", "Layers", (
                Table(columns, rows, searchable=True, select="kind", noun="layers", terminal_rows=3,
                      important=frozenset({"stage1.conv"})),
            )),
            Section("terminal", "For terminals", (Text("only here"),), only=frozenset({"terminal", "text"})),
            Section("origin", "Provenance", (Code(f"run {name}"), Facts((("Seed", "0"), ("Name", name))))),
        ),
        subtitle=f"compared with {name}",
        facts=(Facts((("Same answer", "86.2 %"),), key=True), Facts((("Images", "500"),))),
    )  # fmt: skip
