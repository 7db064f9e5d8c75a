"""A report with a baseline tells the two networks apart: their answers, what got worse, and where it begins."""

from __future__ import annotations

import base64
import io
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sample_report import comparison, small_layers, statistics
from torch import nn

import normsurgeon as ns
from normsurgeon.analysis import figures
from normsurgeon.analysis.answers import MOST, AnswerCollector
from normsurgeon.analysis.findings import find
from normsurgeon.analysis.layer_table import layer_rows
from normsurgeon.analysis.records import Provenance, Score, Sensitivity
from normsurgeon.analysis.report import Report
from normsurgeon.data.thumbnails import SIZE, thumbnail
from normsurgeon.data.transforms import DataConfig
from normsurgeon.render.html import to_notebook, to_page
from normsurgeon.render.text import to_text

LAYERS = small_layers()


def made(**parts) -> Report:
    return Report(Provenance("net (gn)", "photographs", 500, 0, 16, 0, "cpu", baseline="net"), **parts)


def of_kind(report: Report, kind: str):
    return [finding for finding in find(report) if finding.kind == kind]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.lists(st.integers(1, 30), max_size=3))
def test_answers_are_counted_whatever_the_batches_and_processes(seed, images, cuts):
    rng = np.random.default_rng(seed)
    ours, theirs = (3 * rng.normal(size=(images, 5)) for _ in range(2))
    labels, pictures = rng.integers(0, 5, images), torch.zeros(images, 3, 4, 4)
    collectors = [AnswerCollector(), AnswerCollector()]
    edges = sorted({0, images, *(cut for cut in cuts if cut < images)})
    for i, (a, b) in enumerate(itertools.pairwise(edges)):
        batch = (torch.tensor(ours[a:b]), torch.tensor(theirs[a:b]), torch.tensor(labels[a:b]))
        collectors[i % 2].update(a, pictures[a:b], *batch)
    collectors[0].merge(collectors[1])
    agreement, kl, found = collectors[0].compute()

    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (theirs, ours))
    each = (p * np.log(p / q)).sum(1)
    mine, before = ours.argmax(1), theirs.argmax(1)
    assert agreement == pytest.approx((mine == before).mean())
    assert kl == pytest.approx(each.mean())
    assert found.accuracy == pytest.approx((mine == labels).mean())
    assert found.baseline_accuracy == pytest.approx((before == labels).mean())
    assert found.accuracy_stderr == pytest.approx(np.std(mine == labels) / math.sqrt(images))
    assert found.lost - found.gained == (before == labels).sum() - (mine == labels).sum()
    assert found.flipped == (mine != before).sum()
    farthest = sorted((i for i in range(images) if mine[i] != before[i]), key=lambda i: -each[i])[:MOST]
    assert [flip.image for flip in found.flips] == farthest
    for flip in found.flips:
        assert [int(guess.name) for guess in flip.after] == np.argsort(-ours[flip.image])[:3].tolist()
        assert flip.before[0].probability == pytest.approx(p[flip.image].max())


def test_answers_that_are_not_finite_agree_with_nothing_and_show_no_picture():
    sums = AnswerCollector()
    sums.update(0, torch.zeros(1, 3, 4, 4), torch.tensor([[math.nan, 0.0]]), torch.tensor([[1.0, 0.0]]), None)
    agreement, kl, found = sums.compute()
    assert agreement == 0
    assert math.isnan(kl)
    assert (found.flipped, found.flips, found.accuracy) == (1, (), None)


def test_a_thumbnail_shows_the_pixels_that_the_network_was_made_from():
    config = DataConfig()
    pixels = torch.rand(3, 1, 1).expand(3, 2 * SIZE, SIZE)
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (config.mean, config.std))
    picture = Image.open(io.BytesIO(base64.b64decode(thumbnail((pixels - mean) / std, config))))
    assert picture.size == (SIZE // 2, SIZE)
    assert np.abs(np.asarray(picture) / 255 - pixels[:, 0, 0].numpy()).max() < 0.02
    assert thumbnail(torch.zeros(2, 8, 8)) is None


def test_what_the_baseline_shows_as_well_is_no_finding():
    before = statistics(LAYERS)
    assert of_kind(made(statistics=before), "dead")
    same = made(statistics=before, baseline_statistics=before, comparison=comparison(LAYERS, "net"))
    assert of_kind(same, "dead") == []
    place = next(i for i, entry in enumerate(before) if entry.dead_channels)
    worse = list(before)
    worse[place] = replace(before[place], dead_channels=before[place].dead_channels + 3)
    (found,) = of_kind(replace(same, statistics=tuple(worse)), "dead")
    assert found.layer == before[place].layer
    assert found.text.endswith(f"; baseline: {before[place].dead_channels}")


def test_a_layer_that_differs_by_design_is_no_finding():
    before = statistics(LAYERS)
    against = comparison(LAYERS, "net")
    place = next(i for i, entry in enumerate(before) if entry.kind == "convolution")
    broken = (*before[:place], replace(before[place], var=1e12), *before[place + 1 :])
    seen = made(statistics=broken, baseline_statistics=before, comparison=against)
    assert [finding.layer for finding in of_kind(seen, "scale")] == [before[place].layer]
    pairs = tuple(replace(pair, rewritten=pair.layer == before[place].layer) for pair in against.pairs)
    assert of_kind(replace(seen, comparison=replace(against, pairs=pairs)), "scale") == []


@pytest.mark.parametrize(
    ("errors", "where", "advice"),
    [
        ((0.1, 0.1, 0.9), "99% is at stage3", "concentrated: keep the batch norms there (--keep 'stage3*')"),
        ((0.5, 0.7, 0.86), "34% is at stage1", "it grows along the network"),
    ],
)
def test_advice_fits_the_pattern_of_the_drift(errors, where, advice):
    mine, against = statistics(LAYERS), comparison(LAYERS, "net")
    sizes = dict(zip(("stage1", "stage2", "stage3"), errors, strict=True))
    pairs = tuple(
        replace(pair, relative_error=sizes.get(pair.layer, 0.01), cosine=1 - 0.5 * sizes.get(pair.layer, 0.0))
        for pair in against.pairs
    )
    seen = made(statistics=mine, baseline_statistics=mine, comparison=replace(against, pairs=pairs))
    (found,) = of_kind(seen, "drift")
    assert where in found.text
    assert found.advice.startswith(advice)


def test_a_comparison_has_one_finding_of_a_kind():
    found = find(made(statistics=statistics(LAYERS, drift=2.0), baseline_statistics=statistics(LAYERS, 1),
                      comparison=comparison(LAYERS, "net")))  # fmt: skip
    assert len({finding.kind for finding in found}) == len(found) > 2


def test_a_block_does_not_take_its_childrens_share_of_the_sensitivity():
    scores = tuple(Score(name, value) for name, value in
                   (("a", 10.0), ("a.one", 4.0), ("a.two", 6.0), ("b", 1.0), ("c", 1.0), ("d", 1.0)))  # fmt: skip
    (found,) = of_kind(made(sensitivity=(Sensitivity("taylor", "labels", scores),)), "sensitive")
    assert found.layer == "a.two"
    assert "holds 46% of" in found.text  # 6 of 13


def test_rewritten_layers_are_drawn_on_request_only():
    mine, against = statistics(LAYERS), comparison(LAYERS, "net")
    pairs = tuple(replace(pair, rewritten=pair.layer.endswith(".conv")) for pair in against.pairs)
    rows = layer_rows(mine, mine, None, replace(against, pairs=pairs), {})
    for chart in (*figures.profile_charts(rows), *figures.comparison_charts(rows)[:2]):
        drawn = {(trace.name, trace.visible) for trace in chart.figure().data if trace.name}
        assert {name for name, visible in drawn if visible == "legendonly"} <= {"convolution, rewritten"}
        assert "convolution" not in {name for name, _ in drawn}


def test_every_module_of_the_tree_has_the_colour_of_the_worst_layer_in_it():
    mine, against = statistics(LAYERS), comparison(LAYERS, "net")
    rows = layer_rows(mine, mine, None, against, {})
    (chart,) = (c for c in figures.comparison_charts(rows) if c.id == "comparison-tree")
    (tree,) = chart.figure().data
    errors = {f".{pair.layer}": pair.relative_error for pair in against.pairs}
    for path, colour in zip(tree.ids, tree.marker.colors, strict=True):
        assert colour == errors.get(path) or path == "network"
    assert tree.marker.colors[0] == max(errors.values())
    assert all(parent in tree.ids for parent in tree.parents[1:])


def test_two_networks_of_one_name_are_told_apart():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(8, 4)).eval()  # fmt: skip
    x, y = torch.randn(6, 3, 12, 12), torch.arange(6) % 4
    converted = ns.convert(net, to="ln", example_inputs=x, verdict=False)
    report = ns.analyze(converted, [(x, y)], baseline=net, only=["statistics"])
    assert (report.provenance.model, report.provenance.baseline) == ("Sequential (ln)", "Sequential (original)")
    assert report.comparison.baseline == "Sequential (original)"
    assert report.comparison.answers.images == 6
    assert report.comparison.answers.baseline_accuracy == (net(x).argmax(1) == y).double().mean()


def test_flipped_images_are_shown_with_their_answers_escaped():
    document = made(statistics=statistics(LAYERS), comparison=comparison(LAYERS, "net")).document()
    page = to_page(document)
    assert page.count('<img src="data:image/jpeg;base64,/9j/') == 1
    assert "&lt;b&gt;" in page
    assert '<th scope="row"><b>' not in page
    text = to_text(document)
    assert "image 17, labelled tiger cat" in text
    assert "tabby, tabby cat 61 %, tiger cat 22 %" in text
    (section,) = (section for section in document.sections if section.id == "comparison")
    notebook = to_notebook(replace(document, sections=(replace(section, only=None),)))
    assert "tabby, tabby cat 61 %, tiger cat 22 %" in notebook
