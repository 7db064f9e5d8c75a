"""The report at a terminal: findings first, sparklines over the depth, coloured matrices, tables that fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from normsurgeon.reporting.blocks import ASCII_RAMP, RAMP, bar, extent, profiles, sparkline
from normsurgeon.reporting.curves import curves
from normsurgeon.reporting.deeds import deeds
from normsurgeon.reporting.facts import agreement, images, measured, measures
from normsurgeon.reporting.fitting import fitted_table
from normsurgeon.reporting.formatting import short_name, significant
from normsurgeon.reporting.heat import heat_map
from normsurgeon.reporting.layers import columns, layer_rows, measure_labels
from normsurgeon.reporting.plain import plain_text
from normsurgeon.reporting.records import Finding, Report, Sensitivity
from normsurgeon.reporting.standouts import reason, standouts
from normsurgeon.reporting.worst import worst_pairs

_STYLES = {"problem": "bold red", "warning": "yellow", "notice": "cyan", "good": "green"}
_SIGNS = {"problem": "✖", "warning": "▲", "notice": "●", "good": "✔"}
_ASCII_SIGNS = {"problem": "x", "warning": "!", "notice": "*", "good": "+"}
_NARROW = 64  # below this many columns things stand below each other
_MOST_ROWS = 40
_TOP = 8


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the report; in a pipe, as plain text with nothing cut off and no colour codes."""
    print_either(TerminalReport(report), lambda ascii_only: plain_text(report, ascii_only), console)


def print_either(renderable: RenderableType, plain: Callable[[bool], str], console: Console | None = None) -> None:
    """Print the renderable at a terminal; in a pipe the plain text, which is asked for in ASCII where need be."""
    console = console or Console(highlight=False)
    if console.is_terminal:
        console.print(renderable)
        return
    encoding = console.encoding or "utf-8"
    text = plain(not encoding.lower().startswith("utf")).encode(encoding, "replace").decode(encoding)
    console.print(text, markup=False, highlight=False, soft_wrap=True, emoji=False, end="")


class TerminalReport:
    """A rich renderable of a report, as wide as the console lets it be."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        if not options.is_terminal:
            yield Text(plain_text(self._report, options.ascii_only), overflow="fold", end="")
            return
        drawing = _Drawing(
            self._report,
            options.max_width,
            options.ascii_only,
            colours=not console.no_color and console.color_system in ("256", "truecolor", "windows"),
        )
        for i, part in enumerate(drawing.parts()):
            if i:
                yield Text("")
            yield part


class _Drawing:
    """One drawing of a report at one width."""

    def __init__(self, report: Report, width: int, ascii_only: bool, colours: bool) -> None:
        self.report, self.width, self.ascii_only, self.colours = report, width, ascii_only, colours
        self.rows = layer_rows(report)
        self.ramp = ASCII_RAMP if ascii_only else RAMP
        self.narrow = width < _NARROW

    def parts(self) -> Iterator[RenderableType]:
        """From top to bottom, only what there is."""
        report = self.report
        yield self.header()
        if report.findings:
            yield Group(_title("Findings"), *map(self.finding, report.findings))
        if found := standouts(report, self.rows):
            why = [(Text(entry.layer, _STYLES.get(entry.severity, "")), "; ".join(entry.reasons)) for entry in found]
            yield Group(_title("Layers that stand out"), self.pairs(why))
        if drawn := profiles(report, self.rows):
            lines = [(p.label, sparkline(p.values, self.spark, p.log, self.ramp), extent(p.values)) for p in drawn]
            yield Group(_title(f"Over the depth of the network ({len(self.rows)} layers)"), *self.sparks(lines, " … "))
        if report.similarity and report.similarity.layers:
            it = report.similarity
            yield Group(
                _title("CKA of the layers"),
                heat_map(it.cka, it.layers, it.layers, self.width, self.colours and not self.ascii_only),
                *map(_note, it.notes),
            )
        yield from self.comparison()
        for label, measure in zip(measure_labels(report.sensitivity), report.sensitivity or (), strict=True):
            if any(score.score is not None for score in measure.layers):
                yield Group(_title(f"Sensitivity: {label}"), *self.bars(measure))
        if report.sensitivity:
            yield Group(*map(_note, measures(report)))
        yield from self.settings()
        yield from self.history()
        if self.rows:
            yield self.layers()
        yield self.provenance()

    @property
    def spark(self) -> int:
        """Columns for a sparkline."""
        return self.width - 2 if self.narrow else max(20, min(72, self.width - 42))

    def header(self) -> RenderableType:
        """What was analysed, in a few lines."""
        it = self.report.provenance
        lines = [Text.assemble((it.model, "bold"), *((" compared with ", it.baseline) if it.baseline else ()))]
        lines += [Text(f"{it.data}, {images(self.report)}, batches of {it.batch_size}, seed {it.seed}, {it.device}")]
        if done := measured(self.report):
            lines += [Text(f"measured: {done}", "dim")]
        for name, value in agreement(self.report):
            lines += [Text.assemble(f"{name}: ", (value, "bold"))]
        return Group(*(_folding(line) for line in lines))

    def finding(self, finding: Finding) -> RenderableType:
        """Sign, words, number, and what to do."""
        style = _STYLES.get(finding.severity, "cyan")
        sign = (_ASCII_SIGNS if self.ascii_only else _SIGNS).get(finding.severity, "*")
        text = Text(finding.text)
        if finding.layer and finding.layer not in finding.text:
            text = Text.assemble((finding.layer, "bold"), ": ", text)
        if finding.value is not None:
            text.append(f" ({reason(finding)})", "dim")
        if finding.advice:
            text.append(f"\n{'->' if self.ascii_only else '→'} {finding.advice}", "dim")
        grid = Table.grid(padding=(0, 1))
        grid.add_column(no_wrap=True)
        if not self.narrow:
            grid.add_column(no_wrap=True, min_width=8)
        grid.add_column(overflow="fold")
        if self.narrow:
            grid.add_row(Text(sign, style), Text.assemble((finding.severity, style), " ", text))
        else:
            grid.add_row(Text(sign, style), Text(finding.severity, style), text)
        return grid

    def pairs(self, rows: Sequence[tuple[Text, str]]) -> RenderableType:
        """A name and what is to be said of it: beside each other, or below on a narrow terminal."""
        if self.narrow:
            return Group(*(Group(_folding(name), Padding(Text(said, "dim"), (0, 0, 0, 2))) for name, said in rows))
        grid = Table.grid(padding=(0, 2))
        grid.add_column(overflow="fold", max_width=self.width // 3)
        grid.add_column(overflow="fold", style="dim")
        for row in rows:
            grid.add_row(row[0], Text(row[1]))
        return grid

    def sparks(
        self, lines: Sequence[tuple[str, str, tuple[float | None, float | None]]], between: str
    ) -> Iterator[RenderableType]:
        """Label, line, and the numbers at its two ends (or the least and the greatest)."""
        between = between.replace("…", "..").replace("→", "->") if self.ascii_only else between
        for label, line, (first, last) in lines:
            numbers = f"{significant(first)}{between}{significant(last)}"
            if self.narrow:
                yield Text.assemble(label, "  ", (numbers, "dim"), overflow="fold")
                yield Text(f"  {line}", "cyan", no_wrap=True)
            else:
                yield Text.assemble(
                    short_name(label, 18).ljust(20), (line, "cyan"), "  ", (numbers, "dim"), no_wrap=True
                )

    def comparison(self) -> Iterator[RenderableType]:
        """Which layers are farthest from the baseline, and the matrix of the two networks."""
        it = self.report.comparison
        if it is None:
            return
        header, body = worst_pairs(self.rows, _TOP)
        if body:
            yield Group(
                _title("Farthest from the baseline"), *fitted_table(header, body, self.width), *map(_note, it.notes)
            )
        if it.cka is not None and it.layers:
            colours = self.colours and not self.ascii_only
            yield Group(
                _title("CKA, model (down) against baseline (across)"),
                heat_map(it.cka, it.layers, it.baseline_layers, self.width, colours),
            )

    def bars(self, measure: Sensitivity) -> Iterator[RenderableType]:
        """The highest scores, as bars."""
        known = [(s.name, s.score, s.stderr) for s in measure.layers if s.score is not None]
        best = sorted(known, key=lambda entry: -abs(entry[1]))[:_TOP]
        most = max(abs(score) for _, score, _ in best)
        sign = " +- " if self.ascii_only else " ± "
        values = [
            significant(score) + (f"{sign}{significant(error)}" if error is not None else "")
            for _, score, error in best
        ]
        wide = max(map(len, values))
        named = min(max(len(name) for name, *_ in best), self.width - 2 if self.narrow else self.width // 3)
        space = max(4, min(48, self.width - wide - 4 if self.narrow else self.width - named - wide - 4))
        for (name, score, _), value in zip(best, values, strict=True):
            drawn = bar(score, most, space, "#" if self.ascii_only else "").ljust(space)
            label, line = short_name(name, named), ((drawn, "cyan"), "  ", value.rjust(wide))
            if self.narrow:
                yield Text(label, no_wrap=True)
                yield Text.assemble("  ", *line, no_wrap=True)
            else:
                yield Text.assemble(label.ljust(named), "  ", *line, no_wrap=True)

    def settings(self) -> Iterator[RenderableType]:
        """What each setting does, at the sites where it does most."""
        for setting in dict.fromkeys(point.setting for point in self.report.sweep):
            sites: dict[str, list[tuple[float, float]]] = {}
            effect = "kl" if any(p.kl is not None for p in self.report.sweep if p.setting == setting) else "loss_change"
            for point in self.report.sweep:
                if point.setting == setting and (number := getattr(point, effect)) is not None:
                    sites.setdefault(point.layer, []).append((point.value, number))
            worst = sorted(sites.items(), key=lambda site: -max(abs(y) for _, y in site[1]))[:_TOP]
            if not worst:
                continue
            tried = sorted({x for line in sites.values() for x, _ in line})
            lines = []
            for name, line in worst:
                numbers = [y for _, y in sorted(line)]
                lines.append((name, sparkline(numbers, self.spark, ramp=self.ramp), (numbers[0], numbers[-1])))
            what = "KL" if effect == "kl" else "loss change"
            values = ", ".join(f"{x:g}" for x in tried)
            yield Group(_title(f"{what} over {setting}: {values}"), *self.sparks(lines, " → "))

    def history(self) -> Iterator[RenderableType]:
        """What was done to the model, and its training curves."""
        if not self.report.history:
            return
        lines = [
            (c.title, sparkline(c.y, self.spark, ramp=self.ramp), (c.y[0], c.y[-1]))
            for c in curves(self.report.history)
        ]
        arrow = "->" if self.ascii_only else "→"
        done = [_folding(Text(line.replace("→", arrow))) for line in deeds(self.report.history)]
        yield Group(_title("History"), *done, *self.sparks(lines, " → "))

    def layers(self) -> RenderableType:
        """The layer table: all rows of a small network, of a large one those that stand out among even steps."""
        rows = self.rows
        if len(rows) > _MOST_ROWS:
            notable = {entry.layer for entry in standouts(self.report, rows)}
            step = len(rows) / max(1, _MOST_ROWS - len(notable))
            even = {int(i * step) for i in range(_MOST_ROWS)} | {len(rows) - 1}
            rows = tuple(row for i, row in enumerate(rows) if row.layer in notable or i in even)
        wanted = [c for c in columns(self.report, self.rows) if not (self.narrow and c.key == "kind")]
        cells = [[column.text(row) for column in wanted] for row in rows]
        header = [column.title for column in wanted]
        texts = {i for i, column in enumerate(wanted) if column.form == "text"}
        some = [] if len(rows) == len(self.rows) else [_note(f"{len(rows)} of {len(self.rows)} layers; a pipe, or a "
                                                             "saved report, has them all")]  # fmt: skip
        return Group(_title("Layers"), *fitted_table(header, cells, self.width, texts), *some)

    def provenance(self) -> RenderableType:
        """Where it comes from."""
        it = self.report.provenance
        versions = ", ".join(f"{name} {version}" for name, version in it.versions.items())
        when = " in ".join(x for x in (it.created, f"{it.seconds:.0f} s" if it.seconds is not None else "") if x)
        lines = [line for line in (when, versions, it.command or "") if line]
        return Group(*(_note(line) for line in (*lines, *it.notes)))


def _title(text: str) -> Text:
    return Text(text, "bold", overflow="fold")


def _note(text: str) -> Text:
    return Text(text, "dim", overflow="fold")


def _folding(text: Text) -> Text:
    text.overflow = "fold"
    return text
