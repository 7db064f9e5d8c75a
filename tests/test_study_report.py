"""The report as JSON, as text, at a terminal and as a page in a real browser."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rendering import terminal, visible
from rich.console import Console
from sample_study import BY_RATE, RATES, full_study, rates_study, run, study

from normsurgeon.errors import NormSurgeonError, UsageError
from normsurgeon.render.terminal import print_document
from normsurgeon.study.records import Outcome, Results
from normsurgeon.study.report import StudyReport, study_report
from normsurgeon.study.statistics import mean_curves

NASTY = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 2'>&[red]x[/red]"


def show(report: StudyReport, console: Console | None = None) -> None:
    print_document(report.document(), console)


def nasty_study() -> Results:
    """Names that try to break out of the markup, the script, the plots and the terminal's."""
    results = full_study(3)
    outcomes = tuple(
        replace(o, cell=replace(o.cell, activation=NASTY if o.cell.activation == "silu" else "relu", model="m" * 150),
                reason=o.reason and NASTY)
        for o in results.outcomes
    )  # fmt: skip
    return Results(NASTY, outcomes, f"title {NASTY}", {NASTY: NASTY})


REPORTS = {
    "full": study_report(full_study()),
    "two seeds": study_report(full_study(2)),
    "rates": study_report(rates_study()),
    "small": study_report(study({"bn": [900, 910, 905], "gn": [890, 899, 905]})),
    "one run": study_report(Results("one", (run(900),))),
    "lost": study_report(Results("lost", (run(0, "failed", "out of memory"), run(0, "diverged", "nan", norm="gn")))),
    "empty": study_report(Results("empty", ())),
    "nasty": study_report(nasty_study()),
}


@pytest.mark.parametrize("name", REPORTS)
def test_the_json_has_every_key_and_no_nan(name: str) -> None:
    document = json.loads(json.dumps(REPORTS[name].to_dict(), allow_nan=False))
    assert list(document) == [
        "format", "version", "study", "training", "counts", "table", "comparisons", "ranking", "crossings", "findings",
        "cells",
    ]  # fmt: skip
    for row in document["table"]:
        assert {"model", "dataset", "norm", "batch_size", "mean", "ci", "n", "diverged", "failed", "skipped"} <= set(
            row
        )
        assert row["mean"] is None or 0 <= row["mean"] <= 1
        assert row["ci"] is None or row["ci"][0] <= row["mean"] <= row["ci"][1]
    assert document["counts"] == REPORTS[name].results.counts()


def test_the_cells_of_the_json_are_the_results_again() -> None:
    document = json.loads(json.dumps(REPORTS["full"].to_dict()))
    assert tuple(Outcome.from_dict(cell) for cell in document["cells"]) == REPORTS["full"].results.outcomes
    assert document["study"]["axes"]["batch_size"] == [2, 8, 32]
    assert document["study"]["norms"] == ["bn", "gn", "gn:64", "ln"]


def test_the_documentation_names_every_key_of_the_json() -> None:
    text = (Path(__file__).parents[1] / "docs" / "study.md").read_text(encoding="utf-8")
    document = REPORTS["full"].to_dict()
    keys = set(document) | set(document["study"]) | set(document["counts"]) | set(document["cells"][0])
    for part in ("comparisons", "ranking", "crossings", "findings"):
        keys |= set(document[part][0])
    keys |= set(document["table"][0]) - set(document["cells"][0]["cell"])
    assert {key for key in keys if f"`{key}`" not in text} == set()


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("width", [20, 40, 80, 160])
def test_fits_every_width(name: str, width: int) -> None:
    assert max(map(len, visible(terminal(show, REPORTS[name], width)))) <= width


def test_forty_columns_keep_words_and_numbers() -> None:
    text = " ".join(" ".join(visible(terminal(show, REPORTS["full"], 40, None))).split())
    for words in (
        "Which norm suits small batches?",
        "✔ batch size The smaller the batch, the better gn does against bn",
        "Holm p < 0.0001, n = 5 seeds).",
        "2 77.5 ± 0.1",
        "bn − gn −5.2 *",
        "Training",
        "CKA of the layers",
        "64 groups do not divide 32 channels",
    ):
        assert words in text


def test_without_colours_there_are_none_and_severity_is_a_sign_too() -> None:
    for text in (
        terminal(show, REPORTS["full"], 100, None),
        terminal(show, REPORTS["full"], 100, no_color=True),
    ):
        assert "38;2;" not in text
        assert any(line.startswith("✖ failed") for line in visible(text))
    assert "\x1b[1;31mfailed" in terminal(show, REPORTS["full"], 100, "standard")


def test_a_pipe_gets_plain_text_with_everything() -> None:
    file = io.StringIO()
    show(REPORTS["full"], Console(file=file, width=40))
    assert file.getvalue() == str(REPORTS["full"]) == str(REPORTS["full"])
    text = file.getvalue()
    assert "\x1b" not in text
    table = text[text.index("\nEvery cell\n") :].split("\n\n")[0].strip().splitlines()
    assert len(table) == 3 + 2 * 2 * 3 * 4
    file = io.StringIO()
    Console(file=file, width=40).print(REPORTS["small"])
    assert file.getvalue().splitlines()[0] == "normsurgeon study: small"


def test_a_pipe_of_another_encoding_is_not_a_crash() -> None:
    for encoding in ("cp1252", "ascii"):
        show(REPORTS["full"], Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding), width=80))


def test_square_brackets_are_no_markup() -> None:
    assert "[red]x[/red]" in "".join("".join(visible(terminal(show, REPORTS["nasty"], 160))).split())


def test_the_text_has_a_row_and_a_curve_for_every_start_and_norm() -> None:
    text = str(REPORTS["rates"])
    table = text[text.index("\nAccuracy against learning rate\n") :].split("\n\n")[0].strip().splitlines()
    assert [" ".join(line.split()) for line in table[2:]] == [
        "norm, start best rate accuracy within 2 points 0.001 0.01 0.1 1",
        "bn, scratch 0.1 90.3 % 0.1 to 1 30.3 ± 0.5 70.3 ± 0.5 90.3 ± 0.5 89.3 ± 0.5",
        "gn, scratch 0.1 80.3 % 0.1 alone 20.3 ± 0.5 50.3 ± 0.5 80.3 ± 0.5 10.3 ± 0.5",
        "bn, converted 0.1 95.8 % 0.001 to 0.1 94.3 ± 0.5 95.3 ± 0.5 95.8 ± 0.5 70.3 ± 0.5",
        "gn, converted 0.001 94.8 % 0.001 to 0.01 94.8 ± 0.5 94.3 ± 0.5 12.3 ± 0.5 2.1 ± 6.2",
    ]
    assert "A diverged run counts as 0 right." in table[1]
    curves = text[text.index("\nAccuracy over the learning rates, from the lowest to the highest\n") :].split("\n\n")[0]
    assert "bn, scratch |▁▆██| 30.3 % 89.3 %" in " ".join(curves.split())
    shown = " ".join(" ".join(visible(terminal(show, REPORTS["rates"], 60, None))).split())
    assert "gn, converted" in shown
    assert "██▁▁" in shown
    assert "Learning rate" not in str(REPORTS["small"])


def test_repr_is_one_line() -> None:
    assert repr(REPORTS["full"]) == (
        "<StudyReport of norms-and-batches: 176 done, 2 diverged, 2 failed, 60 skipped, 12 findings>"
    )


@pytest.mark.parametrize("ending", [".html", ".json", ".JSON"])
def test_the_ending_chooses_and_the_path_comes_back(tmp_path: Path, ending: str) -> None:
    path = REPORTS["small"].save(str(tmp_path / f"study{ending}"))
    assert path == tmp_path / f"study{ending}"
    assert os.listdir(tmp_path) == [path.name]
    if ending != ".html":
        assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(REPORTS["small"].to_dict()))


def test_another_ending_and_a_missing_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"^cannot tell how to write x\.csv: a study's report ends in \.html \(a page\) or \.json$"
    ):
        REPORTS["small"].save("x.csv")
    with pytest.raises(NormSurgeonError, match=r"^cannot write .*x\.json: there is no folder .*nowhere$"):
        REPORTS["small"].save(tmp_path / "nowhere" / "x.json")
    assert os.listdir(tmp_path) == []


@pytest.mark.system
@pytest.mark.parametrize("module", ["report", "figures", "statistics", "findings"])
def test_neither_the_numbers_nor_their_report_import_torch(module: str) -> None:
    code = f"import sys, normsurgeon.study.{module}; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_curve_is_the_mean_of_the_runs_that_finished() -> None:
    results = full_study()
    (setting, _), points = next(item for item in mean_curves(results).items() if item[0][1] == "ln")
    runs = [o for o in results.outcomes if o.cell.norm == "ln" and all(getattr(o.cell, k) == v for k, v in setting)]
    finished = [o for o in runs if o.status == "done"]
    assert len(finished) == len(runs) - 1
    for i, point in enumerate(points):
        values = [o.curve[i].accuracy or 0.0 for o in finished]
        assert (point.n, point.mean) == (4, pytest.approx(sum(values) / 4))


def test_the_frame_has_a_row_for_every_cell() -> None:
    frame = REPORTS["full"].frame
    assert len(frame) == len(REPORTS["full"].results.outcomes) == 240
    done = frame[frame.status == "done"]
    by_size = done[done.norm == "bn"].groupby("batch_size").accuracy.mean()
    (crossed,) = (c for c in REPORTS["full"].crossings if c.axis == "batch_size")
    assert by_size[2] == pytest.approx(crossed.cells[2, "bn"][0].mean, abs=0.01)
    assert len(REPORTS["empty"].frame) == 0


# The page, in a real browser.

pytest.importorskip("websocket", reason="websocket-client is not installed")
from chromium import PROGRAM, Page, browser  # noqa: E402


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    if PROGRAM is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("studies")
    return {name: it.save(folder / f"{name.replace(' ', '-')}.html") for name, it in REPORTS.items()}


def texts(page: Page, selector: str) -> list[str]:
    return page.evaluate(f"[...document.querySelectorAll('{selector}')].map(e => e.textContent)")


SIZES = [(name, 1280, False) for name in REPORTS] + [(name, 390, True) for name in ("full", "rates", "lost", "nasty")]


@pytest.mark.system
@pytest.mark.parametrize(("name", "width", "phone"), SIZES)
def test_opens_quietly_at_every_size(page: Page, pages: dict[str, Path], name: str, width: int, phone: bool) -> None:
    """No request but for the file itself, nothing on the console, no sideways scrolling, nothing injected."""
    page.open(pages[name], width, 844, phone=phone)
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    assert page.errors == []
    assert [url for url in page.requests if not url.startswith("data:")] == [pages[name].as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("window.hit") is None
    assert len(texts(page, "h1")) == 1


@pytest.mark.system
def test_only_sections_for_what_there_is(page: Page, pages: dict[str, Path]) -> None:
    page.open(pages["full"])
    assert texts(page, "h2") == [
        "What this study shows", "Batch size", "Comparisons", "Norm × everything else", "Training", "Layers",
        "Every layer", "Every cell", "Runs without a result", "How it was computed", "Training settings",
    ]  # fmt: skip
    assert page.evaluate("new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size") == page.evaluate(
        "document.querySelectorAll('[id]').length"
    )
    page.open(pages["empty"])
    assert texts(page, "h2") == ["What this study shows", "How it was computed"]
    page.open(pages["small"])
    assert texts(page, "h2") == ["What this study shows", "Comparisons", "Every cell", "How it was computed"]


@pytest.mark.system
def test_the_page_says_what_the_findings_say(page: Page, pages: dict[str, Path]) -> None:
    page.open(pages["full"])
    assert texts(page, ".findings .what") == [finding.text for finding in REPORTS["full"].findings]
    assert texts(page, "#findings tbody tr:first-child > *")[:2] == ["gn", "1"]


@pytest.mark.system
def test_the_batch_size_chart_holds_the_crossed_tables_numbers(page: Page, pages: dict[str, Path]) -> None:
    page.open(pages["full"])
    (by_size,) = (c for c in REPORTS["full"].crossings if c.axis == "batch_size")
    expected = {(norm, size): (it.mean, it.ci) for (size, norm), (it, _) in by_size.cells.items()}
    drawn = page.evaluate(
        "[...document.querySelector('#batch-lines .plot').data].filter(t => t.visible !== false)"
        ".map(t => [t.name, [...t.y], [...t.error_y.array]])"
    )
    assert [name for name, *_ in drawn] == ["bn", "gn", "ln"]
    for name, y, up in drawn:
        for size, value, error in zip((2, 8, 32), y, up, strict=True):
            mean, ci = expected[name, size]
            assert ci is not None
            assert (value, error) == (pytest.approx(mean, abs=1e-5), pytest.approx(ci[1] - (mean or 0.0), abs=1e-5))
    row = texts(page, "#batch tbody tr:first-child > *")
    assert row[:3] == ["2", "77.5 ± 0.1", "90.5 ± 0.4"]


@pytest.mark.system
def test_the_learning_rate_chart_has_a_line_for_every_start_and_norm(page: Page, pages: dict[str, Path]) -> None:
    page.open(pages["rates"])
    drawn = page.evaluate(
        "[...document.querySelector('#rate-lines .plot').data].map(t => [t.name, [...t.y], t.line.dash, [...t.x]])"
    )
    assert [(name, dash) for name, _, dash, _ in drawn] == [
        ("bn, scratch", "dot"), ("gn, scratch", "dot"), ("bn, converted", "solid"), ("gn, converted", "solid"),
    ]  # fmt: skip
    for name, y, _, x in drawn:
        norm, start = name.split(", ")
        expected = [(right + 3) / 1000 for right in BY_RATE[start, norm]]  # seeds add 1, 3 and 5
        assert y[:3] == pytest.approx(expected[:3], abs=1e-5)
        assert x == pytest.approx(RATES, rel=0.2)  # whiskers do not hide each other
    axis = "document.querySelector('#rate-lines .plot').layout.xaxis"
    assert page.evaluate(f"[{axis}.type, {axis}.ticktext]") == ["log", ["0.001", "0.01", "0.1", "1"]]
    assert texts(page, "#rates tbody tr:last-child > *")[:4] == [
        "gn, converted",
        "0.001",
        "94.8 %",
        "0.001 to 0.01",
    ]
    assert "Learning rate" in texts(page, "h2")


@pytest.mark.system
def test_menus_choose_what_is_drawn(page: Page, pages: dict[str, Path]) -> None:
    page.open(pages["full"])
    value = "document.querySelector('#training-curves .plot').data.filter(t => t.visible !== false).at(-1).y.at(-1)"
    choose = (
        "(i => { const box = document.querySelector('{}'); const b = box.layout.updatemenus[0].buttons[i];"
        " Plotly.update(box, b.args[0], b.args[1]); })({})"
    )
    page.wait("document.querySelector('#training-curves .plot').data !== undefined")
    before = page.evaluate(value)
    seen = {before}
    for number in (4, 13):  # another setting; another measure
        page.evaluate(choose.replace("{}", "#training-curves .plot", 1).replace("{}", str(number), 1))
        seen.add(page.evaluate(value))
    assert len(seen) == 3
    page.wait("document.querySelector('#differences .plot').data !== undefined")
    rows = "document.querySelector('#differences .plot').data.filter(t => t.visible !== false)[0].x.length"
    assert page.evaluate(rows) == 3
    page.evaluate(choose.replace("{}", "#differences .plot", 1).replace("{}", "2", 1))
    assert page.evaluate(rows) == 36
    assert page.errors == []


@pytest.mark.system
def test_plots_follow_the_colour_scheme(page: Page, pages: dict[str, Path]) -> None:
    page.open(pages["small"])
    plot = "document.querySelector('#differences .plot')"
    page.wait(f"Boolean({plot}._fullLayout)")
    colour = f"{plot}._fullLayout.font.color"
    light = page.evaluate(colour)
    page.colours("dark")
    page.wait(f"{colour} !== '{light}'")


@pytest.mark.system
def test_the_table_of_cells_sorts_and_filters(page: Page, pages: dict[str, Path]) -> None:
    page.open(pages["full"])
    column = texts(page, "#cells thead th").index("accuracy")
    page.evaluate(f"document.querySelectorAll('#cells thead button')[{column}].click()")
    shown = texts(page, f"#cells tbody tr > :nth-child({column + 1})")
    known = [float(cell.split()[0]) for cell in shown if cell != "–"]
    assert known == sorted(known, reverse=True)
    assert shown[-1] == "–"
    page.evaluate(
        "(() => { const box = document.querySelector('#cells input'); box.value = 'ln silu';"
        " box.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    assert texts(page, "#cells output") == ["6 of 48 cells"]
