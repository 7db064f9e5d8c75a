"""What is shown, and not how: a document of sections, whose blocks are words, tables, charts and findings.

Every result that people look at (a plan, an analysis, a study) builds one, and ``text.py``, ``terminal.py`` and
``html.py`` show it. These are plain records: they import no renderer, no torch and no plotly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Value: TypeAlias = "str | int | float | bool | None"
Number: TypeAlias = "float | None"
Matrix: TypeAlias = Sequence[Sequence[Number]]
"""Rows of equal length; None where a pair has no value."""

Form = Literal["text", "number", "count", "percent"]
Severity = Literal["problem", "warning", "notice", "good"]
Medium = Literal["page", "terminal", "text", "notebook"]


@dataclass(frozen=True)
class Facts:
    """Pairs of a name and what it is. ``key``: the few that matter most, shown large."""

    pairs: tuple[tuple[str, str], ...]
    key: bool = False


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Notes:
    """Remarks that limit or explain what stands before them, one a line."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """A command or a piece of code, as it is."""

    text: str


@dataclass(frozen=True)
class Finding:
    """Something that stands out, in words: with the number behind it, and what one could do.

    ``kind`` is the word that labels it, by default its severity; ``anchor`` is the row of a table (its first cell)
    that it is about.
    """

    text: str
    severity: Severity = "notice"
    kind: str = ""
    metric: str = ""
    value: Number = None
    advice: str = ""
    anchor: str | None = None


@dataclass(frozen=True)
class Findings:
    """Findings in order of weight; ``empty`` is what is shown where there are none."""

    findings: tuple[Finding, ...]
    empty: str = "Nothing stands out."
    title: str = ""


@dataclass(frozen=True)
class Column:
    """A table's column: ``hint`` explains its title. A text aligns left, all else right.

    Numbers are shown to three significant digits, percentages with one decimal; a value that is a text already is
    shown as it is.
    """

    title: str
    form: Form = "text"
    hint: str = ""


@dataclass(frozen=True)
class Table:
    """Rows whose first cell names them. Columns stand in order of importance: a narrow terminal shows the first, or,
    with ``whole``, each row as a block of lines.

    Columns without any value are left out. ``searchable``: the page offers a filter and sorts by columns, ``select``
    is the title of a column whose values the filter lists, ``noun`` what it counts; ``shaded``: the page tints numbers
    by their size; ``folded``: the page opens the table on request; ``terminal_rows``: about how many rows a terminal
    shows, the ``important`` ones and others in even steps, or the first (text and page show all).
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    title: str = ""
    note: str = ""
    searchable: bool = False
    select: str = ""
    noun: str = "rows"
    shaded: bool = False
    folded: bool = False
    whole: bool = False
    terminal_rows: int | None = None
    important: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Line:
    """A named series of numbers, drawn in one line of characters; ``log`` where it spans decades."""

    label: str
    values: tuple[Number, ...]
    log: bool = False
    form: Form = "number"


@dataclass(frozen=True)
class Sparklines:
    """Several lines; at the end of each stand the least and the greatest (or, with ``ends``, first and last) value."""

    lines: tuple[Line, ...]
    title: str = ""
    ends: bool = False


@dataclass(frozen=True)
class Bars:
    """Scores as horizontal bars: name, value, and half the length of the whisker or None."""

    entries: tuple[tuple[str, float, Number], ...]
    title: str = ""


@dataclass(frozen=True)
class HeatMap:
    """A matrix of numbers from 0 to 1."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Matrix
    title: str = ""


@dataclass(frozen=True)
class Chart:
    """A figure for the page, and what text and terminals show instead.

    ``summary`` states in words what the figure shows (its alternative text); ``figure`` makes it when it is needed.
    """

    id: str
    title: str
    summary: str
    figure: Callable[[], Figure]
    note: str = ""
    wide: bool = False
    plain: tuple[Sparklines | Bars | HeatMap | Table, ...] = ()


@dataclass(frozen=True)
class Picture:
    """A small picture, a JPEG in base64 or None, with what is said of it, and short tables of names and shares."""

    image: str | None
    caption: str
    tables: tuple[tuple[str, tuple[tuple[str, float], ...]], ...] = ()


@dataclass(frozen=True)
class Pictures:
    """Pictures next to each other; where none can be shown, their words stand in a table."""

    entries: tuple[Picture, ...]
    title: str = ""
    note: str = ""
    terminal_rows: int | None = None

    @property
    def table(self) -> Table:
        """The same in words."""
        titles = tuple(dict.fromkeys(title for entry in self.entries for title, _ in entry.tables))
        rows = []
        for entry in self.entries:
            found = {
                title: ", ".join(f"{name} {100 * share:.0f} %" for name, share in lines)
                for title, lines in entry.tables
            }
            rows.append((entry.caption, *(found.get(title) for title in titles)))
        columns = (Column("image"), *map(Column, titles))
        return Table(columns, tuple(rows), self.title, self.note, terminal_rows=self.terminal_rows)


Block: TypeAlias = "Facts | Text | Notes | Code | Findings | Table | Sparklines | Bars | HeatMap | Chart | Pictures"


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it. ``only``: the media that show it, where not all of them do."""

    id: str
    title: str
    blocks: tuple[Block, ...]
    only: frozenset[Medium] | None = None


@dataclass(frozen=True)
class Document:
    """``kind`` names what this is ("normsurgeon report"), ``title`` what it is about; ``facts`` stand below them."""

    kind: str
    title: str
    sections: tuple[Section, ...]
    subtitle: str = ""
    facts: tuple[Facts, ...] = field(default=())

    def shown_in(self, medium: Medium) -> list[Section]:
        """The sections that a medium shows."""
        return [section for section in self.sections if section.only is None or medium in section.only]
