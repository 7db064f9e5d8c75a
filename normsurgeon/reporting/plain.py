"""The report as plain aligned text, for pipes and files: nothing cut off, no colour codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from normsurgeon.reporting.blocks import ASCII_RAMP, RAMP, digit, extent, profiles, shrunk, sparkline
from normsurgeon.reporting.curves import curves
from normsurgeon.reporting.deeds import deeds
from normsurgeon.reporting.facts import agreement, facts, measures, origin
from normsurgeon.reporting.formatting import significant
from normsurgeon.reporting.layers import columns, layer_rows, measure_labels
from normsurgeon.reporting.records import Matrix, Report
from normsurgeon.reporting.standouts import reason, standouts
from normsurgeon.reporting.text import plain_table
from normsurgeon.reporting.worst import worst_pairs

_WIDTH = 60  # of sparklines and matrices
_TOP = 10


def plain_text(report: Report, ascii_only: bool = False) -> str:
    """The whole report, every layer and every column of it."""
    return "\n\n".join(part for part in _parts(report, RAMP if not ascii_only else ASCII_RAMP) if part) + "\n"


def _parts(report: Report, ramp: str) -> Iterator[str]:
    rows = layer_rows(report)
    it = report.provenance
    yield f"normsurgeon report: {it.model}" + (f", compared with {it.baseline}" if it.baseline else "")
    yield plain_table(("", ""), [*agreement(report), *facts(report)]).strip("\n")
    if report.findings:
        yield "Findings\n" + "\n".join(_findings(report))
    if found := standouts(report, rows):
        yield "Layers that stand out\n" + _indented([(entry.layer, "; ".join(entry.reasons)) for entry in found])
    if drawn := profiles(report, rows):
        lines = [
            (p.label, f"|{sparkline(p.values, _WIDTH, p.log, ramp)}|", *map(significant, extent(p.values)))
            for p in drawn
        ]
        yield f"Over the depth of the network ({len(rows)} layers)\n" + plain_table(
            ("", "", "least", "greatest"), lines
        )
    if report.similarity:
        yield _matrix("CKA of the layers", report.similarity.cka, report.similarity.layers, report.similarity.layers)
        yield "\n".join(report.similarity.notes)
    if report.comparison:
        it_ = report.comparison
        if it_.cka is not None:
            yield _matrix("CKA, model (down) against baseline (across)", it_.cka, it_.layers, it_.baseline_layers)
        header, body = worst_pairs(rows)
        if body:
            yield "Farthest from the baseline\n" + plain_table(header, body)
        yield "\n".join(it_.notes)
    if report.sensitivity:
        yield "Sensitivity\n" + "\n".join(f"  {line}" for line in measures(report))
        for label, measure in zip(measure_labels(report.sensitivity), report.sensitivity, strict=True):
            best = sorted((s for s in measure.layers if s.score is not None), key=lambda s: -abs(s.score or 0.0))[:_TOP]
            if best:
                scores = [(s.name, significant(s.score), _error(s.stderr)) for s in best]
                yield f"Highest by {label}\n" + _indented(scores)
    if report.sweep:
        points = [(p.layer, p.setting, significant(p.value), significant(p.kl), significant(p.loss_change))
                  for p in report.sweep]  # fmt: skip
        yield "Settings of the norm layers\n" + plain_table(("layer", "setting", "value", "KL", "loss change"), points)
    if report.history:
        done = deeds(report.history)
        logged = [
            (c.title, f"|{sparkline(c.y, _WIDTH, ramp=ramp)}|", f"{significant(c.y[0])} to {significant(c.y[-1])}")
            for c in curves(report.history)
        ]
        yield "\n".join(["History", *(f"  {line}" for line in done), *([_indented(logged)] if logged else [])])
    if rows:
        shown_columns = columns(report, rows)
        body = tuple(tuple(column.text(row) for column in shown_columns) for row in rows)
        yield "Layers\n" + plain_table([column.title for column in shown_columns], body)
    yield "Provenance\n" + _indented([*origin(report), *((("Command", it.command),) if it.command else ())])
    yield "\n".join(it.notes)


def _error(stderr: float | None) -> str | None:
    return None if stderr is None else f"± {significant(stderr)}"


def _findings(report: Report) -> Iterator[str]:
    wide = max(len(finding.severity) for finding in report.findings)
    for finding in report.findings:
        where = f"{finding.layer}: " if finding.layer and finding.layer not in finding.text else ""
        number = f" ({reason(finding)})" if finding.value is not None else ""
        yield f"  {finding.severity.ljust(wide)}  {where}{finding.text}{number}"
        if finding.advice:
            yield f"  {' ' * wide}  -> {finding.advice}"


def _matrix(title: str, values: Matrix, rows: tuple[str, ...], across: tuple[str, ...]) -> str:
    """Tenths as digits; neighbours averaged where there are many layers."""
    small = shrunk(values, _WIDTH, _WIDTH)
    if not small:
        return ""
    each = "one digit a layer" if len(small) == len(rows) else f"{len(rows)} × {len(across)} layers averaged"
    names = [rows[i * len(rows) // len(small)] for i in range(len(small))]
    lines = ["".join(digit(value) for value in row) for row in small]
    return f"{title}, in tenths ({each})\n" + _indented(list(zip(names, lines, strict=True)))


def _indented(rows: Sequence[Sequence[str | None]]) -> str:
    width = max(len(row) for row in rows)
    lines = plain_table([""] * width, rows).split("\n")[1:]
    return "\n".join(f"  {line}" for line in lines)
