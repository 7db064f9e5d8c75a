"""The page in a real browser: what it says, what its buttons do, that it asks nobody for anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import sample_document
import sample_report as samples

from normsurgeon.analysis.records import LayerStatistics
from normsurgeon.analysis.report import Report
from normsurgeon.render.html import to_page

pytest.importorskip("websocket", reason="websocket-client is not installed")
from chromium import PROGRAM, Page, browser

NASTY = sample_document.NASTY


pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    if PROGRAM is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    made = {
        "small": samples.small_report(),
        "resnet50": samples.resnet50_report(),
        "bare": samples.bare_report(),
        "hollow": samples.hollow_report(),
        "statistics": samples.make_report(samples.small_layers(), "smallnet", whole=False),
        "nasty": nasty_report(),
        "single": single_report(),
        "trained": replace(samples.bare_report(), history=samples.DONE),
    }
    (folder / "sample.html").write_text(to_page(sample_document.sample(NASTY)), encoding="utf-8")
    return {
        "sample": folder / "sample.html",
        **{name: report.save(folder / f"{name}.html") for name, report in made.items()},
    }


def nasty_report() -> Report:
    """Names that try to break out of the markup, the script and the plots; and very long ones."""
    layers = [(f"{name}{NASTY}", *rest) for name, *rest in samples.small_layers()]
    layers[3] = ("a_very_long_name_without_any_dot_" * 5, *layers[3][1:])
    layers[4] = ("encoder.layers.11.attention.output." * 5, *layers[4][1:])
    report = samples.make_report(layers, f"model {NASTY} " + "x" * 200)
    return replace(
        report,
        provenance=replace(report.provenance, command=f"run {NASTY}", notes=(NASTY,), data=NASTY),
        history=({"event": NASTY, "step": 1, NASTY: 1.0}, {"event": NASTY, "step": 2, NASTY: 2.0}),
    )


def single_report() -> Report:
    """One layer, whose name is a number."""
    return samples.make_report([("0", "norm", "GroupNorm", (8, 4, 4))], "one layer")


SIZES = [
    (name, 1280, False) for name in ("small", "resnet50", "bare", "hollow", "statistics", "nasty", "single", "sample")
]
SIZES += [(name, 390, True) for name in ("resnet50", "bare", "nasty", "trained", "sample")]


@pytest.mark.parametrize(("name", "width", "phone"), SIZES)
def test_opens_quietly_at_every_size(page: Page, reports: dict[str, Path], name: str, width: int, phone: bool) -> None:
    """No request but for the file itself, nothing on the console, no sideways scrolling, nothing injected."""
    page.open(reports[name], width, 844, phone=phone)
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    assert page.errors == []
    assert [url for url in page.requests if not url.startswith("data:")] == [reports[name].as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("window.hit") is None
    assert page.evaluate("document.querySelectorAll('h1').length") == 1


def test_headings_say_what_was_measured(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["small"])
    assert page.evaluate("document.querySelector('h1').textContent") == "smallnet (gn)"
    assert texts(page, "h2") == [
        "Findings", "Layer profile", "Similarity", "Comparison", "Sensitivity", "Settings", "History",
        "Layers", "Provenance",
    ]  # fmt: skip
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => Number(h.tagName[1]))")
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))


def test_only_sections_for_what_there_is(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["bare"])
    assert texts(page, "h2") == ["Provenance"]
    assert page.evaluate("document.scripts.length") == 0
    page.open(reports["statistics"])
    assert texts(page, "h2") == ["Findings", "Layer profile", "Layers", "Provenance"]
    assert "Nothing stands out." in page.evaluate("document.body.innerText")


def test_the_history_lists_what_was_done_and_draws_curves_over_the_updates(
    page: Page, reports: dict[str, Path]
) -> None:
    page.open(reports["trained"])
    assert texts(page, "h2") == ["Findings", "History", "Provenance"]
    titles = texts(page, "#history figure h3")
    assert titles == ["training loss", "held-out top-1", "reconstruction KL"]
    drawn = page.evaluate("[...document.querySelector('#history [data-plot]')._fullData[0].y]")
    assert drawn == [2.0, 1.0]
    done = page.evaluate("[...document.querySelectorAll('#history .notes li')].map(li => li.textContent)")
    assert len(done) == 4
    assert done[0] == "Converted to gn: 15 norms, 1 kept"
    assert "top-1 93.1 % → 97.5 %" in done[3]


def test_findings_stand_at_the_top_with_number_and_advice(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["small"])
    first = page.evaluate("document.querySelector('.findings li').innerText")
    for words in ("problem", "no longer computes what it did", "relative error", "0.612", "--keep neck_norm"):
        assert words in first
    assert page.evaluate("document.querySelector('.findings a').hash") == "#layers-10"
    assert page.evaluate("document.querySelector('#layers-10 th').textContent") == "neck_norm"


def test_every_figure_holds_a_plot_that_says_what_it_shows(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["small"])
    ids = page.evaluate("[...document.querySelectorAll('figure')].map(f => f.id)")
    # profile, similarity, comparison, tree and channels, map, sensitivity, sweep, history
    assert len(ids) == 8 + 1 + 6 + 2 + 1 + 1 + 1 + 3
    drawn = page.evaluate("[...document.querySelectorAll('.plot')].filter(p => p.querySelector('.main-svg')).length")
    assert drawn == len(ids)
    labels = page.evaluate("[...document.querySelectorAll('.plot')].map(p => p.getAttribute('aria-label'))")
    assert labels[0] == "Magnitude: mean |x| lies between 0.724 (stage1.norm) and 2.17 (stage3)"
    assert all(len(label) > 20 for label in labels)


def test_a_layer_is_pointed_at_and_all_its_numbers_are_shown(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["small"])
    page.evaluate("document.querySelector('#profile-abs_mean').scrollIntoView({behavior: 'instant'})")
    page.evaluate(
        "Plotly.Fx.hover(document.querySelector('#profile-abs_mean .plot'), [{curveNumber: 0, pointNumber: 0}])"
    )
    page.wait("!!document.querySelector('#profile-abs_mean .hovertext')")
    shown = page.evaluate("document.querySelector('#profile-abs_mean .hovertext').textContent")
    for words in ("stage1.conv", "Conv2d, 16 × 32 × 32", "eff. rank 10.4", "rel. error 0.0200", "skewness 1.10",
                  "before: std"):  # fmt: skip
        assert words in shown
    box = page.evaluate("(({left, top, right, bottom}) => [left, top, right, bottom])"
                        "(document.querySelector('#profile-abs_mean .hovertext').getBoundingClientRect())")  # fmt: skip
    assert box[0] >= 0
    assert box[1] >= 0
    assert box[2] <= 1280
    assert box[3] <= 900


def test_the_table_sorts_by_its_buttons_and_says_so(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["small"])
    names = "[...document.querySelectorAll('table.searchable tbody th')].map(c => c.textContent)"
    order = page.evaluate(names)
    column = page.evaluate(
        "[...document.querySelectorAll('table.searchable thead th')].findIndex(h => h.textContent === 'cosine')"
    )
    head = f"document.querySelectorAll('table.searchable thead th')[{column}]"
    cells = f"[...document.querySelectorAll('table.searchable tbody tr')].map(r => r.cells[{column}].textContent)"
    page.evaluate(f"{head}.querySelector('button').click()")
    assert page.evaluate(f"{head}.getAttribute('aria-sort')") == "descending"
    values = page.evaluate(cells)
    assert values[-1] == "–"  # no value: last, whichever way the rest is sorted
    assert [float(v) for v in values[:-1]] == sorted((float(v) for v in values[:-1]), reverse=True)
    page.evaluate(f"{head}.querySelector('button').click()")
    assert page.evaluate(f"{head}.getAttribute('aria-sort')") == "ascending"
    values = page.evaluate(cells)
    assert values[-1] == "–"
    assert [float(v) for v in values[:-1]] == sorted(float(v) for v in values[:-1])
    page.evaluate(f"{head}.querySelector('button').click()")
    assert page.evaluate(f"{head}.getAttribute('aria-sort')") == "none"
    assert page.evaluate(names) == order


def test_the_table_is_filtered_by_name_and_kind(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["resnet50"])
    page.evaluate(
        "(() => { const box = document.querySelector('.filter input'); box.value = 'layer4 groupnorm';"
        " box.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    assert page.evaluate("document.querySelector('.filter output').textContent") == "10 of 123 layers"
    page.evaluate(
        "(() => { const kind = document.querySelector('.filter select'); kind.value = 'block';"
        " kind.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    assert page.evaluate("document.querySelector('.filter output').textContent") == "0 of 123 layers"


def choose(page: Page, figure: str, option: str) -> None:
    """Click on an option of a figure's menu, opening it first where it is folded."""
    click = "dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    buttons = f"[...document.querySelectorAll('#{figure} :is(.updatemenu-button, .updatemenu-dropdown-button)')]"
    if page.evaluate(f"{buttons}.length") == 0:
        page.evaluate(f"document.querySelector('#{figure} .updatemenu-header').{click}")
    page.wait(f"{buttons}.length > 0")
    page.evaluate(f"{buttons}.find(b => b.textContent === '{option}').{click}")
    page.evaluate("new Promise(done => setTimeout(() => done(true), 300))")


SHOWN = "document.querySelector('#{} .plot')._fullData.filter(t => t.visible === true)"


def test_menus_choose_the_measure(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["small"])
    value = SHOWN.format("similarity-map") + "[0].z[0][1]"
    before = page.evaluate(value)
    choose(page, "similarity-map", "Gram cosine")
    assert page.evaluate(value) != before
    assert page.evaluate(SHOWN.format("similarity-map") + ".length") == 1
    choose(page, "sensitivity-bars", "hessian_trace")
    assert page.evaluate(SHOWN.format("sensitivity-bars") + "[0].error_x.visible")
    choose(page, "sweep-lines", "groups: loss change")
    title = "document.querySelector('#sweep-lines .plot')._fullLayout.{}axis.title.text"
    assert [page.evaluate(title.format(axis)) for axis in "xy"] == ["groups", "loss change"]
    assert page.errors == []


def test_a_legend_hides_a_kind_of_layer(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["small"])
    names = SHOWN.format("profile-abs_mean") + ".map(t => t.name)"
    assert page.evaluate(names) == ["convolution", "norm", "block", "linear"]
    legend = "document.querySelectorAll('#profile-abs_mean .legendtoggle')[1]"
    for event in ("mousedown", "mouseup"):
        page.evaluate(f"{legend}.dispatchEvent(new MouseEvent('{event}', {{bubbles: true}}))")
    page.wait(f"{names}.length === 3")
    assert page.evaluate(names) == ["convolution", "block", "linear"]


def test_plots_follow_the_colour_scheme(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["small"])
    colour = "document.querySelector('#profile-abs_mean .plot')._fullLayout.font.color"
    assert page.evaluate(colour) == "#1b1e23"
    choose(page, "similarity-map", "cosine")
    page.colours("dark")
    page.wait(f"{colour} === '#e7e8ea'")
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(231, 232, 234)"
    # What was chosen stays chosen.
    assert page.evaluate(SHOWN.format("similarity-map") + "[0].index") == 2


def test_heat_maps_carry_the_numbers_of_the_matrix(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["small"])
    similarity = samples.small_report().similarity
    assert similarity is not None
    choose(page, "similarity-map", "cosine")
    drawn = page.evaluate(
        SHOWN.format("similarity-map") + "[0].z.map(row => Array.from(row, v => isNaN(v) ? null : v))"
    )
    for row, expected in zip(drawn, similarity.cosine, strict=True):
        for cell, value in zip(row, expected, strict=True):
            assert (cell is None) == (value is None)
            if value is not None:
                assert cell == pytest.approx(value, abs=6e-5)


def test_a_printed_page_is_light_and_has_every_plot(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["small"], scheme="dark")
    page.send("Emulation.setEmulatedMedia", media="print")
    colour = "document.querySelector('#history-0 .plot')._fullLayout.font.color"
    page.wait(f"{colour} === '#1b1e23'")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.send("Emulation.setEmulatedMedia", media="")


def test_a_large_network_has_a_page_of_sane_size(page: Page, tmp_path: Path) -> None:
    layers = [(f"blocks.{i}.norm", "norm", "GroupNorm", (64, 7, 7)) for i in range(300)]
    path = samples.make_report(layers, "three hundred").save(tmp_path / "large.html")
    assert path.stat().st_size < 8_000_000
    page.open(path)
    labels = page.evaluate("document.querySelectorAll('#profile-abs_mean .xtick').length")
    assert 2 <= labels <= 12
    assert page.errors == []


def test_names_are_shown_as_they_are(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["nasty"])
    assert page.evaluate("document.querySelector('h1').textContent").startswith(f"model {NASTY}")
    assert page.evaluate("document.querySelector('#layers-0 th').textContent") == f"stage1.conv{NASTY}"


def texts(page: Page, selector: str) -> list[str]:
    return page.evaluate(f"[...document.querySelectorAll('{selector}')].map(e => e.textContent)")


def test_numbers_that_are_not_finite_do_not_break_the_page(page: Page, tmp_path: Path) -> None:
    report = samples.small_report()
    numbers = ("mean", "var", "abs_mean", "effective_rank", "zero_fraction", "between_var")
    broken: tuple[LayerStatistics, ...] = tuple(
        replace(entry, nan=3, **dict.fromkeys(numbers, float("nan" if i % 2 else "inf")))
        for i, entry in enumerate(report.statistics or ())
    )
    page.open(replace(report, statistics=broken).save(tmp_path / "broken.html"))
    assert page.errors == []
    assert "nan/inf" in page.evaluate("document.querySelector('table.searchable thead').textContent")
