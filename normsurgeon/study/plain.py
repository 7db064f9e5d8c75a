"""The answer as plain aligned text, for pipes and files: nothing cut off, no colour codes."""

from __future__ import annotations

from collections.abc import Iterator

from normsurgeon.reporting.blocks import ASCII_RAMP, RAMP, digit, sparkline
from normsurgeon.reporting.formatting import percent, shown
from normsurgeon.reporting.text import plain_table
from normsurgeon.study.answer import Answer
from normsurgeon.study.panels import (
    Panel,
    comparison_panels,
    crossing_panel,
    facts,
    layer_panel,
    lost_panel,
    ranking_panel,
    rate_label,
    rate_panel,
    run_label,
    table_panel,
)
from normsurgeon.study.rates import rate_curves, unscaled
from normsurgeon.study.training_curves import mean_curves
from normsurgeon.study.wording import setting_label

_WIDTH = 40  # of sparklines


def plain_text(answer: Answer, ascii_only: bool = False) -> str:
    """The whole answer, every cell and every comparison of it."""
    return "\n\n".join(part for part in _parts(answer, ASCII_RAMP if ascii_only else RAMP) if part) + "\n"


def _parts(answer: Answer, ramp: str) -> Iterator[str]:
    results = answer.results
    yield f"normsurgeon study: {results.name}" + (f"\n{results.title}" if results.title else "")
    yield plain_table(("", ""), facts(answer)).strip("\n")
    wide = max(len(finding.kind) for finding in answer.findings) if answer.findings else 0
    if answer.findings:
        said = (f"  {finding.kind.ljust(wide)}  {finding.text}" for finding in answer.findings)
        yield "What this study shows\n" + "\n".join(said)
    if len(answer.ranking) > 1:
        yield _panel(ranking_panel(answer))
    for crossing in answer.crossings:
        yield _panel(crossing_panel(crossing))
    if rates := rate_panel(answer):
        yield _panel(rates)
        yield _rate_curves(answer, ramp)
    for panel in comparison_panels(answer):
        yield _panel(panel)
    lines = [
        (curve.norm, setting_label(curve.setting), f"|{sparkline([p.mean for p in curve.points], _WIDTH, ramp=ramp)}|",
         percent(curve.points[0].mean), percent(curve.points[-1].mean))
        for curve in mean_curves(results)
        if curve.metric == "accuracy"
    ]  # fmt: skip
    if lines:
        yield "Training curves (accuracy, mean over seeds)\n" + plain_table(
            ("norm", "setting", "", "first", "last"), lines
        )
    if answer.table:
        yield _panel(table_panel(answer))
    for i, run in enumerate(run for run in results.outcomes if run.looked):
        assert run.looked is not None
        label = f"{run_label(answer, run)}, seed {run.cell.seed}"
        yield _panel(layer_panel(f"layers-{i}", f"Layers: {label}", run.looked.layers))
        if run.looked.cka:
            matrix = [(name, "".join(map(digit, row))) for name, row in zip(run.looked.cka_layers, run.looked.cka,
                                                                           strict=True)]  # fmt: skip
            yield f"CKA of the layers, in tenths: {label}\n" + plain_table(("", ""), matrix).strip("\n")
    if lost := lost_panel(answer):
        yield _panel(lost)
    if results.training:
        pairs = [(name, shown(value)) for name, value in results.training.items()]
        yield "Training\n" + plain_table(("", ""), pairs).strip("\n")


def _rate_curves(answer: Answer, ramp: str) -> str:
    results, _ = unscaled(answer.results)
    curves = rate_curves(results)
    lines = [
        (rate_label(curve, curves), f"|{sparkline([p.mean for p in curve.points], _WIDTH, ramp=ramp)}|",
         *(f"{percent(p.mean)} at {p.rate:g}" for p in (curve.points[0], curve.points[-1])))
        for curve in curves
    ]  # fmt: skip
    return "Accuracy over the learning rates, a mark for each\n" + plain_table(("norm", "", "lowest", "highest"), lines)


def _panel(panel: Panel) -> str:
    return f"{panel.title}\n" + (f"{panel.note}\n" if panel.note else "") + plain_table(panel.header, panel.rows)
