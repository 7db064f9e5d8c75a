"""A document for rich: as wide, and as colourful, as the terminal is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table as Grid
from rich.text import Text as Words

from normsurgeon.printable import printable
from normsurgeon.render.document import (
    Bars,
    Block,
    Chart,
    Code,
    Column,
    Document,
    Facts,
    Finding,
    Findings,
    HeatMap,
    Notes,
    Pictures,
    Section,
    Sparklines,
    Table,
    Text,
)
from normsurgeon.render.formatting import (
    as_ascii,
    cell_texts,
    in_form,
    number_behind,
    plural,
    plus_minus,
    short_name,
    used,
    where,
)
from normsurgeon.render.heat import heat_map
from normsurgeon.render.sparklines import bar, ends, sparkline
from normsurgeon.render.text import to_text

STYLES = {"problem": "bold red", "warning": "yellow", "notice": "cyan", "good": "green"}
_SIGNS = {"problem": "✖", "warning": "▲", "notice": "●", "good": "✔"}
_ASCII_SIGNS = {"problem": "x", "warning": "!", "notice": "*", "good": "+"}
_NARROW = 64
"""Below this many columns things stand below each other."""
_GAP = 2
_MIN_TEXT = 16
"""The least width of a column of text that has to wrap."""
_MIN_WHOLE = 8
"""That of a table that leaves no column out, beside its title's."""


def print_document(document: Document, console: Console | None = None) -> None:
    """Print a document at a terminal; in a pipe its plain text, with nothing cut off, in ASCII where need be."""
    console = console or Console(highlight=False)
    if console.is_terminal:
        console.print(TerminalDocument(document))
        return
    encoding = console.encoding or "utf-8"
    text = to_text(document, ascii_only=not encoding.lower().startswith("utf"))
    text = text.encode(encoding, "replace").decode(encoding)
    console.print(text, markup=False, highlight=False, soft_wrap=True, emoji=False, end="")


class TerminalDocument:
    """What ``Console.print`` shows of a document."""

    def __init__(self, document: Document) -> None:
        self.document = document

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not options.is_terminal:
            yield Words(to_text(self.document, options.ascii_only), overflow="fold", end="")
            return
        colours = not console.no_color and console.color_system in ("256", "truecolor", "windows")
        drawing = _Drawing(options.max_width, options.ascii_only, colours and not options.ascii_only)
        sections = [list(drawing.section(section)) for section in self.document.shown_in("terminal")]
        header: list[RenderableType] = [drawing.header(self.document)] if self.document.title else []
        for i, drawn in enumerate(filter(None, [header, *sections])):
            if i:
                yield Words("")
            yield from drawn


class _Drawing:
    """Blocks at one width."""

    def __init__(self, width: int, ascii_only: bool, colours: bool) -> None:
        self.width, self.ascii_only, self.colours = width, ascii_only, colours
        self.narrow = width < _NARROW

    def words(self, text: str, style: str = "", no_wrap: bool = False) -> Words:
        """Text that folds, without signs that the terminal lacks or obeys; brackets in it are no markup."""
        empty = Words(overflow="crop" if no_wrap else "fold", no_wrap=no_wrap)
        return empty.append(self.plain(text), style or None)

    def plain(self, text: str) -> str:
        """Text that does nothing but stand there."""
        return printable(as_ascii(text) if self.ascii_only else text)

    def header(self, document: Document) -> RenderableType:
        """What it is about, in a few lines."""
        title = self.words(document.title, "bold")
        lines = [title.append(f" {document.subtitle}") if document.subtitle else title]
        for facts in document.facts:
            for name, value in facts.pairs:
                lines.append(self.words(f"{name}: ", "dim").append(self.words(value, "bold" if facts.key else "")))
        return Group(*lines)

    def section(self, section: Section) -> Iterator[RenderableType]:
        """The title and what stands below it; nothing where all blocks are empty."""
        blocks = [drawn for block in section.blocks if (drawn := list(self.block(block)))]
        if blocks and section.title:
            yield self.words(section.title, "bold")
        for i, drawn in enumerate(blocks):
            if i and len(drawn) > 1:
                yield Words("")
            yield from drawn

    def block(self, block: Block) -> Iterator[RenderableType]:
        """Its lines, from top to bottom."""
        match block:
            case Facts(pairs):
                yield from self.pairs(pairs)
            case Text(text):
                yield self.words(text)
            case Notes(lines):
                yield from (self.words(line, "dim") for line in lines)
            case Code(text):
                yield self.words(text, "dim")
            case Findings():
                yield from self.title(block.title if block.findings else "")
                yield from map(self.finding, block.findings)
                if not block.findings and block.empty:
                    yield self.words(block.empty, "dim")
            case Table():
                yield from self.title(block.title)
                yield from self.table(block)
            case Pictures():
                yield from self.block(block.table)
            case Sparklines():
                yield from self.title(block.title if block.lines else "")
                yield from self.sparklines(block)
            case Bars():
                yield from self.title(block.title)
                yield from self.bars(block)
            case HeatMap():
                yield from self.title(block.title)
                yield heat_map(block, self.width, self.colours, self.plain)
            case Chart(plain=plain):
                for i, inner in enumerate(plain):
                    if i:
                        yield Words("")
                    yield from self.block(inner)

    def title(self, text: str) -> Iterator[RenderableType]:
        """A block's own title, where it has one."""
        if text:
            yield self.words(text, "bold")

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> Iterator[RenderableType]:
        """Names and values in two columns; on a narrow terminal, values below names."""
        if self.narrow:
            for name, value in pairs:
                yield self.words(name, "dim")
                yield Padding(self.words(value), (0, 0, 0, 2))
            return
        grid = Grid.grid(padding=(0, _GAP))
        grid.add_column(overflow="fold", max_width=self.width // 3, style="dim")
        grid.add_column(overflow="fold")
        for name, value in pairs:
            grid.add_row(self.words(name), self.words(value))
        yield grid

    def finding(self, finding: Finding) -> RenderableType:
        """Sign, label, words, number, and what to do."""
        style = STYLES[finding.severity]
        sign = (_ASCII_SIGNS if self.ascii_only else _SIGNS)[finding.severity]
        text = self.words(where(finding), "bold").append(self.words(finding.text))
        if finding.value is not None:
            text.append(self.words(f" ({number_behind(finding)})", "dim"))
        if finding.advice:
            text.append(self.words(f"\n→ {finding.advice}", "dim"))
        label = finding.kind or finding.severity
        grid = Grid.grid(padding=(0, 1))
        grid.add_column(no_wrap=True)
        if self.narrow:
            grid.add_column(overflow="fold")
            grid.add_row(Words(sign, style), self.words("").append(label, style).append(" ").append(text))
        else:
            grid.add_column(no_wrap=True, min_width=8)
            grid.add_column(overflow="fold")
            grid.add_row(Words(sign, style), self.words(label, style), text)
        return grid

    def sparklines(self, block: Sparklines) -> Iterator[RenderableType]:
        """Label, line and the numbers at its ends: next to, or below, each other."""
        named = min(max((len(line.label) for line in block.lines), default=0), max(18, self.width // 3))
        space = self.width - 2 if self.narrow else max(12, min(72, self.width - named - 24))
        for line in block.lines:
            drawn = self.words(sparkline(line.values, space, line.log), "cyan", no_wrap=True)
            first, last = (in_form(value, line.form) for value in ends(line.values, block.ends))
            numbers = f"{first}{' → ' if block.ends else ' … '}{last}"
            if self.narrow:
                yield self.words(line.label).append(self.words(f"  {numbers}", "dim"))
                yield Padding(drawn, (0, 0, 0, 2))
            else:
                label = self.words(short_name(line.label, named).ljust(named + 2), no_wrap=True)
                yield label.append(drawn).append(self.words(f"  {numbers}", "dim"))

    def bars(self, block: Bars) -> Iterator[RenderableType]:
        """Name, bar and number."""
        most = max((abs(value) for _, value, _ in block.entries), default=0.0)
        numbers = [plus_minus(value, error) for _, value, error in block.entries]
        wide = max(map(len, numbers), default=0) + 1
        longest = max((len(name) for name, *_ in block.entries), default=0)
        named = min(longest, self.width - 2 if self.narrow else self.width // 3)
        space = max(4, min(48, self.width - wide - 4 - (0 if self.narrow else named)))
        for (name, value, _), number in zip(block.entries, numbers, strict=True):
            drawn = bar(value, most, space, "#" if self.ascii_only else "").ljust(space)
            label = self.words(short_name(name, named).ljust(named), no_wrap=True)
            line = (
                self.words("  ", no_wrap=True).append(drawn, "cyan").append(self.words("  " + number.rjust(wide - 1)))
            )
            if self.narrow:
                yield label
                yield line
            else:
                yield label.append(line)

    def table(self, table: Table) -> Iterator[RenderableType]:
        """The first columns that fit, and the names of those left out; of many rows the important ones and some."""
        if table.note:
            yield self.words(table.note, "dim")
        table = used(table)
        rows = cell_texts(table)
        if not rows:
            return
        chosen = self.chosen(table, rows)
        if len(chosen) < len(rows):
            note = f"{len(chosen)} of {len(rows)} {table.noun}; a pipe, or a saved page, has them all"
            yield from self.fitted(table, chosen)
            yield self.words(note, "dim")
        else:
            yield from self.fitted(table, rows)

    def chosen(self, table: Table, rows: list[list[str]]) -> list[list[str]]:
        """All rows of a small table; of a large one the important ones and others in even steps, or the first."""
        most = table.terminal_rows
        if most is None or len(rows) <= most:
            return rows
        if not table.important:
            return rows[:most]
        step = len(rows) / max(1, most - len(table.important))
        even = {int(i * step) for i in range(most)} | {len(rows) - 1}
        return [row for i, row in enumerate(rows) if row[0] in table.important or i in even]

    def fitted(self, table: Table, rows: list[list[str]]) -> Iterator[RenderableType]:
        """Columns of text wrap rather than push others out."""
        columns = table.columns
        widths = [max(len(column.title), *(len(row[i]) for row in rows)) for i, column in enumerate(columns)]
        words = [i for i, column in enumerate(columns) if column.form == "text"]
        least = list(widths)
        for i in words:
            narrowest = max(_MIN_WHOLE, len(columns[i].title)) if table.whole else max(_MIN_TEXT, self.width // 3)
            least[i] = min(widths[i], narrowest)
        if table.whole and sum(least) + _GAP * (len(least) - 1) > self.width:
            yield from self.listed(columns, rows)
            return
        least[0] = min(least[0], self.width)
        used, left = [0], self.width - least[0]
        for i in range(1, len(columns)):
            if least[i] + _GAP > left:
                break
            used.append(i)
            left -= least[i] + _GAP
        for i in words:
            if i in used:
                wider = min(widths[i] - least[i], left)
                least[i], left = least[i] + wider, left - wider
        grid = Grid(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="dim")
        for i in used:
            style: dict[str, Any] = {"justify": "left"} if i in words else {"justify": "right", "no_wrap": True}
            grid.add_column(self.words(columns[i].title), width=least[i], overflow="fold", **style)
        for row in rows:
            grid.add_row(*(self.words(row[i]) for i in used))
        yield grid
        if len(used) < len(columns):
            rest = [column.title for column in columns[len(used) :]]
            yield self.words(f"no room for {plural(len(rest), 'column')}: {', '.join(rest)}", "dim")

    def listed(self, columns: Sequence[Column], rows: list[list[str]]) -> Iterator[RenderableType]:
        """Each row as a block of lines."""
        for first, *rest in rows:
            yield self.words(first, "bold")
            for column, text in zip(columns[1:], rest, strict=True):
                if text:
                    yield self.words(f"  {column.title}: ", "dim").append(self.words(text, "not dim"))
