"""Documents as text, at a terminal, as a page and in a notebook; whatever they are about."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rendering import terminal, visible
from rich.console import Console
from sample_document import CKA, NAMES, NASTY, line_figure, map_figure, sample

from normsurgeon.render import charts
from normsurgeon.render.document import Column, Document, Findings, Section, Table
from normsurgeon.render.formatting import significant
from normsurgeon.render.html import to_notebook, to_page
from normsurgeon.render.presentable import Presentable
from normsurgeon.render.sparklines import shrunk, sparkline
from normsurgeon.render.terminal import print_document
from normsurgeon.render.text import to_text

SAMPLE = sample()


# Text


def test_text_has_all_of_it_in_aligned_columns() -> None:
    assert to_text(SAMPLE).startswith(
        "sample document: a network, compared with a network\n\nSame answer  86.2 %\nImages       500\n\nFindings\n"
        "  problem     stem: a network no longer computes what it did (relative error 0.612)\n"
        "              -> Keep it\n"
        "  warning     stage1.norm: 3 of 64 channels never fire (dead channels 3)\n"
        "  batch size  gn is better than ln\n\nCharts\nAbout a network.\n"
    )
    layers = to_text(SAMPLE).split("\nLayers\n")[1].split("\n\n")[0].splitlines()
    assert [line.split("  a network")[0] for line in layers[:3]] == [
        "layer        kind    std   zeros  dead  remark",
        "stem         stem  0.100   0.0 %     0",
        "stage1.conv  conv   1.00  10.0 %     1",
    ]
    assert len(layers) == 1 + len(NAMES)


def test_each_number_of_a_sparkline_and_a_matrix_is_a_character() -> None:
    text = to_text(SAMPLE)
    assert "std    |▁▃▅▇ █|   0.100      1000" in text  # a step a decade, a gap for no value
    assert "zeros  |▁█|      10.0 %    20.0 %" in text
    assert "  stage2.conv  467976" in text


def test_a_document_without_sections_is_its_title() -> None:
    bare = Document("sample", "nothing", (Section("a", "Nothing here", (Table((Column("a"),), ()),)),))
    assert to_text(bare) == "sample: nothing\n"
    assert visible(terminal(print_document, bare, 40)) == ["nothing"]


def test_what_finds_nothing_says_so() -> None:
    document = Document("sample", "quiet", (Section("a", "Findings", (Findings(()),)),))
    for text in (to_text(document), terminal(print_document, document, 40), to_page(document)):
        assert "Nothing stands out." in text


def test_sections_are_shown_where_they_belong() -> None:
    assert "only here" in to_text(SAMPLE)
    assert "only here" in terminal(print_document, SAMPLE, 80)
    assert "only here" not in to_page(SAMPLE)
    assert "only here" not in to_notebook(SAMPLE)


# The terminal


@pytest.mark.parametrize("width", [12, 20, 40, 80, 120, 200])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_fits_every_width(width: int, ascii_only: bool) -> None:
    file = io.TextIOWrapper(raw := io.BytesIO(), encoding="ascii" if ascii_only else "utf-8")
    console = Console(file=file, force_terminal=True, width=width, color_system="truecolor", legacy_windows=False)
    print_document(sample("net with a_rather_long_name"), console)
    file.flush()
    assert max(map(len, visible(raw.getvalue().decode()))) <= width


def test_a_terminal_that_shows_no_unicode_gets_ascii() -> None:
    text = to_text(SAMPLE, ascii_only=True)
    assert text.isascii()
    assert "std    |_-+# @|" in text
    assert "3.00  +- 0.500" in text


def test_a_narrow_table_shows_its_first_columns_and_names_the_others() -> None:
    text = "\n".join(visible(terminal(print_document, SAMPLE, 44)))
    assert "layer        kind    std   zeros  dead" in text
    assert "no room for 1 column: remark" in text


@pytest.mark.parametrize("width", [12, 40, 60, 120])
def test_a_whole_table_shows_every_cell_at_every_width(width: int) -> None:
    titles = ("layer", "class", "channels", "reason")
    row = ("layer3.0.downsample.2", "BatchNorm2d", 48, "its input has another reader")
    table = Table(tuple(map(Column, titles)), (row,), whole=True)
    lines = visible(terminal(print_document, Document("", "", (Section("", "", (table,)),)), width))
    assert max(map(len, lines)) <= width
    letters = Counter("".join(lines).replace(" ", ""))
    assert not Counter("".join(map(str, (*titles[1:], *row))).replace(" ", "")) - letters


def test_a_long_table_shows_the_important_rows() -> None:
    text = "\n".join(visible(terminal(print_document, SAMPLE, 100)))
    layers = text.split("\nLayers\n")[1].split("\n\n")[0]
    assert "stage1.conv" in layers
    assert "stage2.norm" not in layers
    assert "4 of 6 layers; a pipe, or a saved page, has them all" in layers


def test_square_brackets_are_no_markup() -> None:
    text = "\n".join(visible(terminal(print_document, sample("[red]x[/red] and [/]"), 120)))
    assert "[red]x[/red] and [/] no longer computes what it did" in text


def test_a_pipe_gets_the_plain_text() -> None:
    file = io.StringIO()
    print_document(SAMPLE, Console(file=file, width=30))
    assert "stage2.norm  norm      –  40.0 %     4  a network a network a network a network" in file.getvalue()
    assert "\x1b" not in file.getvalue()


# The page


class _Page(HTMLParser):
    """The elements of a page, their attributes and their text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}


def test_every_value_is_escaped() -> None:
    for text in (to_page(sample(NASTY)), to_notebook(sample(NASTY))):
        page = _Page(text)
        assert not page.tags() & {"img", "iframe"}
        assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
        assert "<script>window.hit" not in text


def test_a_page_asks_for_nothing_and_forbids_it() -> None:
    page = _Page(to_page(SAMPLE))
    links = [value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")]
    assert all(value is None or value.startswith(("#", "data:")) for value in links)
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def test_plotly_and_scripts_are_in_a_page_only_where_they_are_needed() -> None:
    code = (
        "import sys; from normsurgeon.render.document import *;"
        "from normsurgeon.render.html import to_page, to_notebook;"
        "d = Document('k', 't', (Section('a', 'A', (Table((Column('x'),), (('1',),)),)),));"
        "assert '<script' not in to_page(d) + to_notebook(d); sys.exit('plotly' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.system
@pytest.mark.parametrize("module", ["html", "terminal", "text", "charts", "presentable", "document"])
def test_no_renderer_imports_torch(module: str) -> None:
    code = f"import sys, normsurgeon.render.{module}; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_finding_links_to_its_row() -> None:
    page = _Page(to_page(SAMPLE))
    assert ("a", {"href": "#layers-2"}) in page.elements
    assert ("tr", {"id": "layers-2"}) in page.elements


def test_shades_follow_the_numbers() -> None:
    shades = re.findall(r'style="--shade: ([\d.]+)%"[^>]*>([^<]*)<', to_page(SAMPLE))
    assert shades == [("22.5", "50.0 ± 1.0"), ("0.0", "40.0 ± 1.0"), ("0.0", "–"), ("45.0", "60.0 ± 2.0")]


def test_a_notebook_runs_nothing_and_styles_only_itself() -> None:
    html = to_notebook(SAMPLE)
    assert not _Page(html).tags() & {"script", "img", "link", "iframe", "html", "body"}
    styles = re.findall(r"^([^\s}].*?)\{", html[html.index("<style>") + 7 : html.index("</style>")], re.M)
    assert styles
    assert all(rule.startswith(".normsurgeon-document") for rule in styles)


def test_what_is_presentable_prints_shows_and_draws_its_document() -> None:
    class Result(Presentable):
        def document(self) -> Document:
            return SAMPLE

    assert "a network no longer computes what it did" in str(Result())
    assert "normsurgeon-document" in Result()._repr_html_()
    file = io.StringIO()
    Console(file=file, force_terminal=True, width=100, color_system=None).print(Result())
    assert "✖ problem" in file.getvalue()


# Charts


def test_a_line_carries_its_numbers_and_whiskers() -> None:
    (gn, ln) = line_figure().data
    assert list(gn.y) == [0.5, 0.6, 0.7]
    assert list(gn.error_y.array) == pytest.approx([0.1, 0.1, 0.05])
    assert list(gn.error_y.arrayminus) == pytest.approx([0.1, 0.1, 0.05])
    assert all(x < y for x, y in zip(gn.x, ln.x, strict=True))  # next to each other: whiskers hide nothing


def test_bands_and_values_that_a_logarithm_cannot_show() -> None:
    series = charts.Series("a", [0, 1, 2], [1.0, 0.0, 10.0], [0.5, 0.1, 5.0], [2.0, 1.0, 20.0])
    low, high, line = charts.lines([series], log_y=True).data
    assert (list(low.y), list(high.y), high.fill) == ([0.5, 0.1, 5.0], [2.0, 1.0, 20.0], "tonexty")
    assert list(line.y) == [1.0, None, 10.0]


def test_a_menu_shows_one_figure_at_a_time() -> None:
    figure = map_figure()
    assert [trace.visible for trace in figure.data] == [None, False]
    buttons = figure.layout.updatemenus[0].buttons
    assert [(button.label, button.args[0]["visible"]) for button in buttons] == [
        ("CKA", [True, False]), ("cosine", [False, True]),
    ]  # fmt: skip
    drawn = json.loads(figure.to_json())["data"][0]["z"]
    assert drawn["shape"] == "6, 6"
    assert figure.data[0].z.ravel().tolist() == pytest.approx([value for row in CKA for value in row], abs=1e-6)


def test_plotly_takes_no_label_for_markup() -> None:
    figure = charts.bars([(NASTY, 1.0, None)], unit=NASTY)
    assert "<img" not in figure.to_json()
    assert "<script" not in figure.to_json()


def test_ticks_are_where_parts_begin_and_apart() -> None:
    names = ["conv1", "bn1", *(f"layer{i}.{k}" for i in (1, 2, 3) for k in range(20)), "fc"]
    assert charts.ticks(names) == [(2, "layer1"), (22, "layer2"), (42, "layer3"), (62, "fc")]
    assert charts.ticks(["a", "b"], few=2) == [(0, "a"), (1, "b")]
    assert len(charts.ticks([f"blocks.{i}" for i in range(300)])) <= 12


# Numbers


numbers = st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False, width=32))


@given(st.floats(-1e300, 1e300))
def test_three_digits_are_within_half_a_percent(value: float) -> None:
    assert float(significant(value)) == pytest.approx(value, rel=5.1e-3, abs=1e-320)


@given(st.lists(numbers, max_size=200), st.integers(1, 80), st.booleans())
def test_a_sparkline_never_outgrows_its_width(values: list[float | None], width: int, log: bool) -> None:
    assert len(sparkline(values, width, log)) == min(width, len(values))


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=40)
def test_shrinking_keeps_a_constant_and_the_size_asked_for(rows: int, columns: int, high: int, wide: int) -> None:
    small = shrunk(((0.5,) * columns,) * rows, high, wide)
    assert len(small) == min(rows, high)
    assert {len(row) for row in small} == {min(columns, wide)}
    assert {value for row in small for value in row} == {0.5}
