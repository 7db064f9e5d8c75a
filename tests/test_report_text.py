"""The report at a terminal, in a pipe and in a notebook."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
import sample_report as samples
from hypothesis import given
from hypothesis import strategies as st
from rendering import terminal, visible
from rich.console import Console

from normsurgeon.analysis.records import Finding
from normsurgeon.analysis.report import Report
from normsurgeon.render.terminal import print_document
from normsurgeon.surgery.history import curves, summaries

REPORTS = {
    "small": samples.small_report(),
    "resnet50": samples.resnet50_report(),
    "bare": samples.bare_report(),
    "hollow": samples.hollow_report(),
}
ESCAPE = "\x1b"


def print_report(report: Report, console: Console) -> None:
    print_document(report.document(), console)


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("width", [20, 40, 80, 120, 200])
def test_fits_every_width(name: str, width: int) -> None:
    assert max(map(len, visible(terminal(print_report, REPORTS[name], width)))) <= width


def test_begins_with_what_was_analysed_and_the_findings() -> None:
    lines = visible(terminal(print_report, REPORTS["small"], 100))
    assert [line.rstrip() for line in lines[:15]] == [
        "smallnet (gn) compared with smallnet",
        "Same answer: 86.2 ± 1.5 %",
        "Right: 80.6 ± 1.8 %",
        "Right before: 88.4 ± 1.4 %",
        "KL from the baseline: 0.173 nats",
        "Data: imagenet-sample",
        "Images: 500 (3 skipped)",
        "Layers: 12",
        "Measured: statistics, similarity, comparison, sensitivity (taylor, fisher, hessian_trace, noise),",
        "settings, history",
        "",
        "Findings",
        "✖ problem  neck_norm no longer computes what it did: its output differs from the baseline's by 61.2",
        "           % (relative error 0.612)",
        "           → Keep it as a frozen affine: --keep neck_norm",
    ]


def test_severity_is_a_colour_and_a_word() -> None:
    text = terminal(print_report, REPORTS["small"], 100, "standard")
    assert f"{ESCAPE}[1;31mproblem" in text
    assert f"{ESCAPE}[33mwarning" in text


def test_forty_columns_keep_words_and_numbers() -> None:
    text = " ".join(" ".join(visible(terminal(print_report, REPORTS["resnet50"], 40))).split())
    for words in (
        "no longer computes what it did",
        "layer4.0.downsample.0",
        "0.735",
        "→ Prefer rms",
        "123 rows averaged",
    ):
        assert words in text


def test_without_colours_the_matrix_is_digits() -> None:
    for text in (
        terminal(print_report, REPORTS["small"], 100, None),
        terminal(print_report, REPORTS["small"], 100, no_color=True),
    ):
        assert "       stage1.conv 998866222211111100001100" in visible(text)
        assert "▀" not in text
        assert "38;2;" not in text
    assert "▀" in terminal(print_report, REPORTS["resnet50"], 100)


def test_a_pipe_gets_plain_text_with_everything() -> None:
    file = io.StringIO()
    print_report(REPORTS["resnet50"], Console(file=file, width=40))
    text = file.getvalue()
    assert ESCAPE not in text
    table = text[text.index("\nLayers\n") + 8 :].split("\n\n")[0].splitlines()
    assert len(table) == 124
    assert table[0].split()[:6] == ["layer", "kind", "mean", "std", "mean", "|x|"]
    assert all(line.split()[0] == layer for line, (layer, *_) in zip(table[1:], samples.resnet50_layers(), strict=True))
    assert "…" not in text
    sweep = text[text.index("\nSettings of the norm layers\n") :].split("\n\n")[0].splitlines()[2:]
    assert len(sweep) == 1 + len(REPORTS["resnet50"].sweep)


def test_a_pipe_of_another_encoding_is_not_a_crash() -> None:
    raw = io.BytesIO()
    print_report(REPORTS["small"], Console(file=io.TextIOWrapper(raw, encoding="cp1252"), width=80))
    print_report(REPORTS["small"], Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=80))


def test_the_terminal_of_another_encoding_gets_plain_signs() -> None:
    report = replace(REPORTS["small"], sweep=(), history=())
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    console = Console(file=file, force_terminal=True, width=100, color_system=None)
    with console.capture() as capture:
        print_report(report, console)
    assert "x problem" in capture.get()
    assert "████" not in capture.get()


def test_square_brackets_are_no_markup() -> None:
    finding = Finding("k", "warning", "a[bold]", "see [red]x[/red] and [/]", "m[0]", 1.0, "[link=x]y")
    report = replace(REPORTS["bare"], findings=(finding,))
    text = "\n".join(visible(terminal(print_report, report, 100)))
    assert "see [red]x[/red] and [/]" in text
    assert "[link=x]y" in text
    assert "a[bold]" in text


def test_print_shows_every_part_and_repr_is_one_line() -> None:
    text = str(REPORTS["small"])
    headings = ("Findings", "Over the depth of the network (12 layers)", "Similarity", "Comparison", "Sensitivity",
                "Settings of the norm layers", "History", "Layers", "Provenance")  # fmt: skip
    places = [text.index(f"\n\n{heading}\n") for heading in headings]
    assert places == sorted(places)
    for words in ("Layers that stand out", "Farthest from the baseline", "Highest by noise", "(relative error 0.612)",
                  "stage1.conv  986221110010", "taylor: nats: sum of |gradient · weight|",
                  "3 files could not be read"):  # fmt: skip
        assert words in text
    assert repr(REPORTS["small"]) == "<Report of smallnet (gn) against smallnet: 500 images, 12 layers, 5 findings>"
    assert repr(REPORTS["bare"]) == "<Report of nothing: 0 images, 0 findings>"


def test_a_report_of_nothing_says_where_it_comes_from() -> None:
    assert str(REPORTS["bare"]) == (
        "normsurgeon report: nothing\n\nData    demo\nImages  0\n\nProvenance\n  Model       nothing\n"
        "  Data        demo (labels not used)\n  Images      0 images\n  Batch size  1\n  Seed        0\n"
        "  Device      cpu\n"
    )


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


@pytest.mark.parametrize("name", REPORTS)
def test_a_notebook_shows_a_fragment_that_runs_nothing(name: str) -> None:
    html = REPORTS[name]._repr_html_()
    found = _Tags()
    found.feed(html)
    assert not found.tags & {"script", "img", "link", "iframe", "html", "body"}
    assert found.attributes <= {"class", "scope", "title", "open"}
    styles = re.findall(r"^([^\s}].*?)\{", html[html.index("<style>") + 7 : html.index("</style>")], re.M)
    assert styles
    assert all(rule.startswith(".normsurgeon-document") for rule in styles)
    assert len(html) < 150_000


def test_a_notebook_escapes_names() -> None:
    report = replace(
        REPORTS["bare"], provenance=replace(REPORTS["bare"].provenance, model="<script>alert('1')</script>")
    )
    assert "<script" not in report._repr_html_()
    assert "&lt;script&gt;" in report._repr_html_()


@pytest.mark.system
def test_a_report_comes_without_torch() -> None:
    code = "import sys, normsurgeon.analysis.report; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_curves_come_from_flat_and_nested_histories() -> None:
    nested = ({"event": "finetune", "epochs": 2, "log": [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0}]},)
    (curve,) = curves(nested)
    assert (curve.title, curve.axis, curve.x, curve.y) == ("loss", "epoch", (1.0, 2.0), (2.0, 1.0))
    assert summaries(nested) == ("event finetune, epochs 2",)
    assert [c.title for c in curves(samples.history())] == ["loss", "lr", "top1"]
    assert curves(({"step": 1, "loss": 2.0},)) == ()


def test_each_event_has_a_line_and_its_logs_are_curves_over_the_updates() -> None:
    assert summaries(samples.DONE) == (
        "Converted to gn: 15 norms, 1 kept",
        "Calibrated on 512 images: 15 norms matched, 14 balanced again; largest error before 0.331 at layer4.0.bn2; "
        "3 s",
        "Reconstructed on 270 images in 60 updates, the best after 40: KL from the original 0.829 → not finite on "
        "1 held-out image; 100 s",
        "Fine-tuned on digits for 440 updates: top-1 93.1 % → 97.5 %, KL 0.0400 → 0.0106, loss 0.250 → 0.100; "
        "the best after 400 updates; 12 s",
    )
    assert [(c.title, c.axis, c.x, c.y) for c in curves(samples.DONE)] == [
        ("training loss", "update", (1.0, 2.0), (2.0, 1.0)),
        ("held-out top-1", "update", (0.0, 400.0), (0.931, 0.975)),
        ("reconstruction KL", "update", (0.0, 40.0), (0.829, 0.494)),
    ]
    twice = [c.title for c in curves((samples.DONE[-1], samples.DONE[-1]))]
    assert twice == ["run 1: training loss", "run 1: held-out top-1", "run 2: training loss", "run 2: held-out top-1"]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.sampled_from(["a", "finetune", "calibrate"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["event", "steps", "step", "curves", "curve", "epochs", "best", "images", "loss", "sites"]
                ),
                inner,
                max_size=4,
            )
        ),
    )
)
def test_a_history_that_another_program_wrote_is_read_as_far_as_possible(entry: Any) -> None:
    history = entry if isinstance(entry, list) else [entry]
    assert all(isinstance(line, str) and line for line in summaries(history))
    assert all(len(c.x) == len(c.y) > 1 for c in curves(history))


@pytest.mark.parametrize("width", [20, 40, 100])
def test_the_history_fits_the_terminal(width: int) -> None:
    report = replace(samples.bare_report(), history=samples.DONE)
    text = terminal(print_report, report, width, colours=None)
    assert ESCAPE not in text
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    assert "History Converted to gn: 15 norms, 1 kept" in words
    assert "top-1 93.1 % → 97.5 %" in words
    assert re.search(r"held-out top-1 .*0\.931 → 0\.975", words)


def test_the_history_needs_no_more_than_ascii_where_there_is_no_more() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    print_report(
        replace(samples.bare_report(), history=samples.DONE), Console(file=file, force_terminal=True, width=100)
    )
    file.flush()
    assert b"top-1 93.1 % -> 97.5 %" in raw.getvalue()
