"""The answer at a terminal: findings first, then the tables as far as they fit, curves as sparklines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from normsurgeon.reporting.blocks import ASCII_RAMP, RAMP, sparkline
from normsurgeon.reporting.fitting import fitted_table
from normsurgeon.reporting.formatting import percent, plural, shown, significant
from normsurgeon.reporting.heat import heat_map
from normsurgeon.reporting.terminal import print_either
from normsurgeon.study.answer import Answer
from normsurgeon.study.findings import Finding
from normsurgeon.study.panels import (
    Panel,
    comparison_panels,
    crossing_panel,
    facts,
    lost_panel,
    ranking_panel,
    rate_label,
    rate_panel,
    run_label,
    table_panel,
)
from normsurgeon.study.plain import plain_text
from normsurgeon.study.rates import rate_curves, unscaled
from normsurgeon.study.training_curves import mean_curves
from normsurgeon.study.wording import setting_label

_STYLES = {"problem": "bold red", "warning": "yellow", "notice": "cyan", "good": "green"}
_SIGNS = {"problem": "✖", "warning": "▲", "notice": "●", "good": "✔"}
_ASCII_SIGNS = {"problem": "x", "warning": "!", "notice": "*", "good": "+"}
_NARROW = 64  # below this many columns things stand below each other
_MOST_ROWS = 40
_MOST_CURVES = 24
_MOST_LOOKED = 3
_OVER_DEPTH = (
    ("std", "std", True),
    ("effective_rank", "effective rank", True),
    ("sensitivity", "sensitivity", True),
    ("dead_fraction", "dead channels", False),
)


def print_answer(answer: Answer, console: Console | None = None) -> None:
    """Print the answer; in a pipe, as plain text with nothing cut off and no colour codes."""
    print_either(TerminalAnswer(answer), lambda ascii_only: plain_text(answer, ascii_only), console)


class TerminalAnswer:
    """A rich renderable of an answer, as wide as the console lets it be."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        if not options.is_terminal:
            yield Text(plain_text(self._answer, options.ascii_only), overflow="fold", end="")
            return
        colours = not console.no_color and console.color_system in ("256", "truecolor", "windows")
        drawing = _Drawing(self._answer, options.max_width, options.ascii_only, colours and not options.ascii_only)
        for i, part in enumerate(drawing.parts()):
            if i:
                yield Text("")
            yield part


class _Drawing:
    """One drawing of an answer at one width."""

    def __init__(self, answer: Answer, width: int, ascii_only: bool, colours: bool) -> None:
        self.answer, self.width, self.ascii_only, self.colours = answer, width, ascii_only, colours
        self.ramp = ASCII_RAMP if ascii_only else RAMP
        self.narrow = width < _NARROW

    def parts(self) -> Iterator[RenderableType]:
        """From top to bottom, only what there is."""
        answer = self.answer
        yield self.header()
        if answer.findings:
            yield Group(_title("What this study shows"), *map(self.finding, answer.findings))
        if len(answer.ranking) > 1:
            yield self.panel(ranking_panel(answer))
        for crossing in sorted(answer.crossings, key=lambda crossing: crossing.axis != "batch_size"):
            yield self.panel(crossing_panel(crossing, long=self.narrow))
        if rates := rate_panel(answer):
            yield Group(self.panel(rates), *self.rates())
        for panel in comparison_panels(answer):
            yield self.panel(_joined(panel))
        yield from self.curves()
        if answer.table:
            yield self.panel(table_panel(answer, joined=True))
        yield from self.looked()
        if lost := lost_panel(answer):
            yield Group(_title(lost.title), *(_lost(*row) for row in lost.rows[:_MOST_ROWS]))
        if answer.results.training:
            yield Group(
                _title("Training"), _note(", ".join(f"{k} {shown(v)}" for k, v in answer.results.training.items()))
            )

    def header(self) -> RenderableType:
        """What was studied, in a few lines."""
        results = self.answer.results
        lines = [Text(results.title or results.name, "bold", overflow="fold")]
        if results.title:
            lines.append(_note(results.name))
        said = [(name, words) for name, words in facts(self.answer) if words]
        lines += [Text.assemble((f"{name}: ", "dim"), words, overflow="fold") for name, words in said]
        return Group(*lines)

    def finding(self, finding: Finding) -> RenderableType:
        """Sign, kind and sentence."""
        style = _STYLES[finding.severity]
        sign = (_ASCII_SIGNS if self.ascii_only else _SIGNS)[finding.severity]
        grid = Table.grid(padding=(0, 1))
        grid.add_column(no_wrap=True)
        if self.narrow:
            grid.add_column(overflow="fold")
            grid.add_row(Text(sign, style), Text.assemble((finding.kind, style), " ", finding.text))
        else:
            grid.add_column(no_wrap=True, min_width=15)
            grid.add_column(overflow="fold")
            grid.add_row(Text(sign, style), Text(finding.kind, style), Text(finding.text))
        return grid

    def panel(self, panel: Panel) -> RenderableType:
        """A table with as many columns as fit, and at most 40 rows."""
        rows = [tuple(cell.replace("−", "-") for cell in row) if self.ascii_only else row for row in panel.rows]
        more = len(rows) - _MOST_ROWS
        some = [_note(f"{plural(more, 'more row')}; a pipe, or a saved answer, has them all")] if more > 0 else []
        notes = [_note(panel.note)] if panel.note else []
        table = fitted_table(panel.header, rows[:_MOST_ROWS], self.width, panel.texts)
        return Group(_title(panel.title), *notes, *table, *some)

    def rates(self) -> Iterator[RenderableType]:
        """Accuracy over the learning rates, a mark for each."""
        curves = rate_curves(unscaled(self.answer.results)[0])
        for curve in curves[:_MOST_CURVES]:
            ends = f"{percent(curve.points[0].mean)} to {percent(curve.points[-1].mean)}"
            yield from self.spark(rate_label(curve, curves), [point.mean for point in curve.points], ends)
        if len(curves) > _MOST_CURVES:
            yield _note(f"{len(curves) - _MOST_CURVES} more; a pipe, or a saved answer, has them all")

    def curves(self) -> Iterator[RenderableType]:
        """Accuracy over the epochs, the mean over seeds."""
        found = [curve for curve in mean_curves(self.answer.results) if curve.metric == "accuracy"]
        if not found:
            return
        lines: list[RenderableType] = []
        for curve in found[:_MOST_CURVES]:
            label = ", ".join(x for x in (curve.norm, setting_label(curve.setting)) if x)
            ends = f"{percent(curve.points[0].mean)} to {percent(curve.points[-1].mean)}"
            lines += self.spark(label, [p.mean for p in curve.points], ends)
        if len(found) > _MOST_CURVES:
            lines.append(_note(f"{len(found) - _MOST_CURVES} more; a pipe, or a saved answer, has them all"))
        yield Group(_title("Training curves"), _note("Accuracy over the epochs, the mean over seeds."), *lines)

    def looked(self) -> Iterator[RenderableType]:
        """Networks whose layers were looked at: statistics over the depth, and the similarity of the layers."""
        runs = [run for run in self.answer.results.outcomes if run.looked]
        for run in runs[:_MOST_LOOKED]:
            assert run.looked is not None
            lines: list[RenderableType] = []
            for key, label, log in _OVER_DEPTH:
                values = [getattr(layer, key) for layer in run.looked.layers]
                known = [value for value in values if value is not None]
                if len(known) > 1:
                    ends = f"{significant(known[0])} to {significant(known[-1])}"
                    lines += self.spark(label, values, ends, log)
            if run.looked.cka:
                names = run.looked.cka_layers
                lines += [_note("CKA of the layers"), heat_map(run.looked.cka, names, names, self.width, self.colours)]
            yield Group(_title(f"Layers of {run_label(self.answer, run)}, seed {run.cell.seed}"), *lines)
        if len(runs) > _MOST_LOOKED:
            yield _note(f"{plural(len(runs) - _MOST_LOOKED, 'more network')} looked at; a saved answer has them all")

    def spark(self, label: str, values: list[float | None], ends: str, log: bool = False) -> Iterator[RenderableType]:
        """A label, a line and the numbers at its ends: beside or below each other."""
        room = self.width - 2 if self.narrow else max(12, min(40, self.width // 3))
        line = sparkline(values, room, log, self.ramp)
        if self.narrow:
            yield Text.assemble(label, "  ", (ends, "dim"), overflow="fold")
            yield Text(f"  {line}", "cyan", no_wrap=True)
            return
        grid = Table.grid(padding=(0, 2))
        grid.add_column(width=self.width - room - len("100.0 % to 100.0 %") - 4, overflow="fold")
        grid.add_column(no_wrap=True, width=room)
        grid.add_column(no_wrap=True)
        grid.add_row(Text(label), Text(line, "cyan"), Text(ends, "dim"))
        yield grid


def _joined(panel: Panel) -> Panel:
    """Norms and setting in one column, which wraps, so that the numbers stay in sight."""
    if panel.header[1] != "setting":
        return panel
    rows = tuple((f"{row[0]}: {row[1]}", *row[2:]) for row in panel.rows)
    return replace(panel, header=(panel.header[0], *panel.header[2:]), rows=rows, texts=(0,))


def _lost(runs: str, status: str, seeds: str, reason: str) -> Text:
    """One line for the runs of a cell that ended alike."""
    style = _STYLES["problem" if status == "failed" else "notice" if status == "skipped" else "warning"]
    return Text.assemble((status, style), f" {runs}, seeds {seeds}: ", (reason, "dim"), overflow="fold")


def _title(text: str) -> Text:
    return Text(text, "bold", overflow="fold")


def _note(text: str) -> Text:
    return Text(text, "dim", overflow="fold")
