"""Statistics: every figure equals an independent float64 NumPy oracle, however the images arrive."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import timm
import torch
from conftest import randomise_, stored_outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import normsurgeon as ns
from normsurgeon.inference import fused, moments
from normsurgeon.norms.targets import auto_groups

STATISTICS = ["statistics"]


def oracle(x: np.ndarray) -> dict[str, float]:
    """The definitions of docs/report.md, on all values at once. ``x`` is (N, C, …)."""
    x = x.reshape(*x.shape[:2], -1)
    channel_mean = x.mean((0, 2))
    image_mean = x.mean(2)
    return {
        "mean": x.mean(),
        "var": x.var(),
        "min": x.min(),
        "max": x.max(),
        "abs_mean": np.abs(x).mean(),
        "zero_fraction": (x == 0).mean(),
        "skewness": scipy.stats.skew(x.ravel()),
        "kurtosis": scipy.stats.kurtosis(x.ravel()),
        "squared_mean": np.square(channel_mean).mean(),
        "channel_var": x.var((0, 2)).mean(),
        "between_var": image_mean.var(0).mean(),
        "within_var": x.var(2).mean(),
    }


@pytest.fixture(params=["fused", "torch"])
def path(request, monkeypatch):
    """Both ways of summing: the compiled loop and plain torch."""
    if request.param == "fused":
        pytest.importorskip("numba")
    monkeypatch.setattr(fused, "available", lambda: request.param == "fused")
    return request.param


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_every_statistic_equals_a_float64_oracle_on_stored_outputs(name, path):
    torch.manual_seed(0)
    model = randomise_(timm.create_model(name)).eval()
    side = model.pretrained_cfg["input_size"][1]
    images = torch.randn(6, 3, side, side)
    outputs = stored_outputs(model, images)
    report = ns.analyze(model, images.split(4), only=STATISTICS)
    assert len(report.statistics) > 10
    for record in report.statistics:
        x = outputs[record.layer]
        x = np.moveaxis(x, -1, 1) if x.ndim == 3 else x
        expected = oracle(x)
        scale = max(abs(expected["mean"]), math.sqrt(expected["var"]))
        for key, value in expected.items():
            found = getattr(record, key)
            # A mean near 0, and shape figures near 0, are relative to their own natural scale.
            size = {"mean": scale, "skewness": max(1.0, abs(value)), "kurtosis": max(1.0, abs(value))}.get(
                key, abs(value)
            )
            assert abs(found - value) <= 1e-5 * max(size, 1e-12), (record.layer, key, found, value)
        assert record.values == x.size
        assert record.channels == x.shape[1]
        np.testing.assert_allclose(record.channel_means, x.reshape(*x.shape[:2], -1).mean((0, 2)), atol=1e-5 * scale)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    offset=st.sampled_from([0.0, 30.0, -1e3]),
    positions=st.sampled_from([1, 7, 600]),
    compiled=st.booleans(),
)
def test_any_chunking_gives_the_same_table(sizes, offset, positions, compiled):
    if compiled and not fused.available():
        return
    generator = torch.Generator().manual_seed(sum(sizes))
    x = torch.randn(sum(sizes), 3, positions, generator=generator) * torch.tensor([1.0, 0.01, 20.0])[:, None] + offset
    update = moments.update if compiled else moments._update
    whole, parts, merged = (moments.empty(3) for _ in range(3))
    update(whole, x)
    for chunk in x.split(sizes):
        update(parts, chunk)
        one = moments.empty(3)
        update(one, chunk)
        moments.merge(merged, one)
    deviation = np.sqrt(whole[:, moments.M2] / whole[:, moments.COUNT])
    count = whole[:, moments.COUNT]
    scale = np.abs(whole) + 1e-30
    scale[:, moments.MEAN] = scale[:, moments.IMAGE_MEAN] = np.abs(offset) + deviation + 1e-3
    scale[:, moments.M3] = count * deviation**3 + np.abs(whole[:, moments.M3]) + 1e-30
    scale[:, moments.IMAGE_M2] += deviation**2
    if abs(offset) < 1e3:  # float32 itself holds only four digits of a deviation of 0.01 from a mean of 1,000
        assert (np.abs(parts - whole) / scale).max() < 1e-6
        assert (np.abs(merged - whole) / scale).max() < 1e-6
    else:
        np.testing.assert_allclose(parts[:, moments.M2], whole[:, moments.M2], rtol=1e-4)


def test_the_compiled_loop_and_torch_agree():
    pytest.importorskip("numba")
    x = torch.randn(4, 6, 700) * torch.logspace(-3, 3, 6)[:, None] + torch.linspace(-5, 5, 6)[:, None]
    x[0, 2, :10] = 0
    a, b = moments.empty(6), moments.empty(6)
    picks = np.array([0, 0, 3]), np.array([5, 699, 17])
    *rows_a, picked = fused.update(a, x.numpy(), *picks)
    rows_b = moments._update(b, x)
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-9)
    for left, right in zip(rows_a, rows_b, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5)
    np.testing.assert_array_equal(picked, x.numpy()[picks[0], :, picks[1]])


@pytest.mark.parametrize("scale", [1e-12, 1e12], ids=["tiny", "huge"])
def test_values_whose_fourth_power_leaves_float32_keep_their_kurtosis(scale, path):
    x = torch.randn(3, 2, 500, generator=torch.Generator().manual_seed(0))
    table = moments.empty(2)
    moments.update(table, x * scale)
    row = moments.pooled(table)[0]
    found = row[moments.COUNT] * row[moments.M4] / row[moments.M2] ** 2 - 3
    assert found == pytest.approx(scipy.stats.kurtosis(x.double().numpy().ravel()), abs=1e-4)


def test_a_mean_far_larger_than_the_deviation_costs_no_digits(path):
    x = torch.randn(8, 2, 400, generator=torch.Generator().manual_seed(0)) * 0.5 + torch.tensor([[1000.0], [-3000.0]])
    table = moments.empty(2)
    moments.update(table, x)
    exact = x.double().numpy().transpose(1, 0, 2).reshape(2, -1).var(1)
    np.testing.assert_allclose(table[:, moments.M2] / table[:, moments.COUNT], exact, rtol=1e-5)


def test_nan_and_inf_are_counted_located_and_left_out_of_everything_else(path):
    x = torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(0))
    spoilt = x.clone()
    spoilt[3, 1, 7], spoilt[4, 1, 8], spoilt[4, 2, 0] = torch.nan, torch.inf, -torch.inf
    table = moments.empty(3)
    moments.update(table, spoilt)
    assert table[:, moments.NAN].tolist() == [0, 1, 0]
    assert table[:, moments.INF].tolist() == [0, 1, 1]
    kept = [channel[np.isfinite(channel)] for channel in spoilt.double().numpy().transpose(1, 0, 2).reshape(3, -1)]
    np.testing.assert_allclose(table[:, moments.MEAN], [c.mean() for c in kept], rtol=1e-5)
    np.testing.assert_allclose(table[:, moments.M2] / table[:, moments.COUNT], [c.var() for c in kept], rtol=1e-5)
    np.testing.assert_allclose(table[:, moments.HIGH], [c.max() for c in kept])


def test_a_layer_that_breaks_is_located_and_distinguished_from_its_successors():
    class Broken(nn.Module):
        def forward(self, x):
            x = x.clone()
            x[x[:, 0, 0, 0] > 50] = torch.nan
            return x

    model = nn.Sequential(nn.Conv2d(1, 2, 1), Broken(), nn.Conv2d(2, 2, 1))
    nn.init.ones_(model[0].weight)
    images = torch.zeros(6, 1, 4, 4)
    images[4] = 100.0
    report = ns.analyze(model, images.split(2), only=STATISTICS, layers=["*"])
    by_name = {record.layer: record for record in report.statistics}
    assert (by_name["0"].nan, by_name["1"].nan, by_name["2"].nan) == (0, 32, 32)
    assert by_name["1"].first_nonfinite == 4
    assert report.findings[0].text.startswith("1 is the first layer with values that are not finite: 32 nan and 0 inf")


def test_dead_and_dormant_channels_are_found():
    model = nn.Sequential(nn.Conv2d(1, 8, 1, bias=True), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([1.0, -1, 1, 1, 1, 1, 1e-3, 0]))
        model[3].weight.zero_()
        model[3].bias.zero_()
    by_name = {r.layer: r for r in ns.analyze(model, [torch.randn(4, 1, 6, 6)], only=STATISTICS).statistics}
    assert by_name["0"].dead == (7,)  # exactly 0; nothing rectifies it, so -1 fires
    assert by_name["1"].dead == (1, 7)  # a ReLU reads it: below 0 never fires
    assert by_name["1"].dormant == (1, 6, 7)
    assert by_name["3"].dead_channels == 8


def test_dormant_scores_follow_the_papers_definition():
    """Sokar et al., 2302.12902, definition 3.1: mean |h| of a neuron over the layer's average, at most τ."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-4, 0, 32).view(-1, 1, 1, 1))
        model[0].bias.mul_(torch.logspace(-4, 0, 32))
    images = torch.randn(4, 3, 6, 6)
    with torch.no_grad():
        h = model[1](model[0](images)).double().mean((0, 2, 3)).numpy()
    by_name = {r.layer: r for r in ns.analyze(model, [images], only=STATISTICS).statistics}
    assert by_name["0"].dormant == tuple(np.flatnonzero(h / h.mean() <= 0.025))


def test_group_fluctuation_is_that_of_the_whitened_input_in_the_groups_gn_would_have():
    torch.manual_seed(0)
    model = randomise_(nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64))).eval()
    images = torch.randn(7, 3, 9, 9) * torch.linspace(0.5, 2, 7).view(-1, 1, 1, 1)
    with torch.no_grad():
        x = model[0](images).double()
    norm = model[1]
    xhat = (x - norm.running_mean.view(-1, 1, 1)) / (norm.running_var.view(-1, 1, 1) + norm.eps).sqrt()
    groups = auto_groups(64)
    xhat = xhat.view(7, groups, -1).numpy()
    std, mean = xhat.std(2), xhat.mean(2)
    record = ns.analyze(model, images.split(3), only=STATISTICS).statistics[1]
    assert record.groups == groups
    assert record.group_fluctuation == pytest.approx((std.std(0) / std.mean(0)).mean(), rel=1e-5)
    assert record.mean_fluctuation == pytest.approx((mean.std(0) / np.sqrt(xhat.var(2).mean(0))).mean(), rel=1e-5)
