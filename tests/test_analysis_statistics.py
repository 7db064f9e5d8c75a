"""Statistics: every figure equals an independent float64 NumPy oracle, however the images arrive."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import timm
import torch
from conftest import ConvNet, randomise_
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import normsurgeon as ns
from normsurgeon.analysis import fused, moments
from normsurgeon.analysis.capture import captured
from normsurgeon.analysis.layers import choose_layers
from normsurgeon.analysis.sampling import VectorSample, ranks
from normsurgeon.norms.catalogue import auto_groups

STATISTICS = ["statistics"]


def stored_outputs(model: nn.Module, images: torch.Tensor) -> dict[str, np.ndarray]:
    """Every module's output, kept whole: what the streaming pass must not need."""
    outputs: dict[str, np.ndarray] = {}
    handles = [
        module.register_forward_hook(
            lambda module, inputs, output, name=name: outputs.__setitem__(name, output.detach().double().numpy().copy())
        )
        for name, module in model.named_modules()
        if name
    ]
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    return outputs


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


def test_a_layer_that_breaks_is_located_and_its_successors_are_told_apart():
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


def test_an_output_is_read_before_an_in_place_activation_overwrites_it():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(inplace=True), nn.BatchNorm2d(4)).eval()
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        expected = model[0](images)
    (record,) = ns.analyze(model, [images], only=STATISTICS, layers=["0"]).statistics
    assert record.min == pytest.approx(expected.min().item())
    assert record.min < 0


def test_an_input_that_was_overwritten_in_place_is_read_anew():
    """The group statistics of a norm come from its producer's output only where that is still the norm's input."""
    model = nn.Sequential(nn.Conv2d(1, 16, 1), nn.ReLU(inplace=True), nn.GroupNorm(1, 16)).eval()
    images = torch.randn(6, 1, 8, 8) * torch.linspace(0.5, 3, 6).view(-1, 1, 1, 1)
    with torch.no_grad():
        x = model[1](model[0](images)).double().numpy().reshape(6, -1)
    record = ns.analyze(model, [images], only=STATISTICS).statistics[-1]
    assert record.group_fluctuation == pytest.approx(x.std(1).std() / x.std(1).mean(), rel=1e-5)


def test_every_call_of_a_shared_module_counts():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(self.conv(x))

    model = Twice().eval()
    images = torch.randn(4, 3, 5, 5)
    with torch.no_grad():
        first = model.conv(images)
        both = torch.cat([first, model.conv(first)]).double()
    (record,) = ns.analyze(model, images.split(3), only=STATISTICS).statistics
    assert (record.calls, record.values) == (2, both.numel())
    assert record.mean == pytest.approx(both.mean().item(), rel=1e-5)


@pytest.mark.parametrize("wrap", [lambda x: (x, None), lambda x: {"out": x}, lambda x: [None, x]])
def test_outputs_in_tuples_lists_and_dicts_are_found(wrap):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(x)

    class Inner(nn.Module):
        def forward(self, x):
            return wrap(x * 2)

    images = torch.randn(4, 3, 5, 5)
    (record,) = ns.analyze(Wrapped(), [images], only=STATISTICS, layers=["inner"]).statistics
    assert record.mean == pytest.approx(2 * images.mean().item(), rel=1e-4)


def test_channels_last_memory_half_precision_and_autocast_are_read_rightly(convnet):
    images = torch.randn(4, 3, 16, 16)
    plain = ns.analyze(convnet, [images], only=STATISTICS).statistics
    last = ns.analyze(
        convnet.to(memory_format=torch.channels_last), [images.to(memory_format=torch.channels_last)], only=STATISTICS
    ).statistics
    for a, b in zip(plain, last, strict=True):
        assert (a.layer, a.shape) == (b.layer, b.shape)
        assert b.var == pytest.approx(a.var, rel=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ns.analyze(convnet, [images], only=STATISTICS).statistics
    for a, b in zip(plain, cast, strict=True):
        assert b.var == pytest.approx(a.var, rel=0.05)


def test_no_hook_is_left_behind_after_an_error_or_an_interruption(convnet):
    layers = choose_layers(convnet)
    for error in (ValueError, KeyboardInterrupt):

        def fail(layer, x, error=error):
            raise error("stop")

        with pytest.raises(error, match="stop"), captured(layers, fail, fail):
            convnet(torch.randn(1, 3, 8, 8))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in convnet.modules())


def test_the_model_comes_back_as_it_was(convnet):
    convnet.train()
    convnet.bn2.eval()
    before = {name: tensor.clone() for name, tensor in convnet.state_dict().items()}
    ns.analyze(convnet, [torch.randn(4, 3, 8, 8)], only=["statistics", "similarity"])
    assert convnet.training
    assert not convnet.bn2.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in convnet.state_dict().items())
    assert all(parameter.grad is None for parameter in convnet.parameters())


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


def test_ranks_equal_the_covariance_eigenvalues_of_the_sampled_vectors():
    rng = np.random.default_rng(0)
    for count, channels in ((40, 8), (8, 40)):
        x = rng.normal(size=(count, channels)) * np.logspace(0, -2, channels) + 5
        eigenvalues = np.linalg.eigvalsh(np.cov(x.T, bias=True)).clip(0)
        p = eigenvalues / eigenvalues.sum()
        p = p[p > 1e-14]
        effective, participation, samples = ranks(x)
        assert effective == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
        assert participation == pytest.approx(1 / (p**2).sum(), rel=1e-6)
        assert samples == count
    assert ranks(np.ones((5, 3))) == (0.0, 0.0, 5)
    assert ranks(np.ones((1, 3))) == (None, None, 1)


def test_where_all_vectors_fit_the_effective_rank_is_that_of_the_full_covariance(convnet):
    images = torch.randn(2, 3, 8, 8)
    outputs = stored_outputs(convnet, images)
    for record in ns.analyze(convnet, images.split(1), only=STATISTICS, kinds=["convolution"]).statistics:
        x = outputs[record.layer]
        vectors = np.moveaxis(x, 1, -1).reshape(-1, x.shape[1])
        assert record.rank_samples == len(vectors)
        assert record.effective_rank == pytest.approx(ranks(vectors)[0], rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_the_sample_of_vectors_does_not_depend_on_the_batches(sizes):
    x = torch.randn(sum(sizes), 300, 70, generator=torch.Generator().manual_seed(1))
    whole, parts = VectorSample(300), VectorSample(300)
    whole.add(x, 0)
    first = 0
    for chunk in x.split(sizes):
        parts.add(chunk, first)
        first += len(chunk)
    a, b = np.argsort(whole.priorities), np.argsort(parts.priorities)
    np.testing.assert_array_equal(whole.vectors[a], parts.vectors[b])
    assert len(whole.vectors) == min(256, 64 * sum(sizes))


def test_the_sample_is_uniform_over_images_and_positions():
    counts = np.zeros((40, 10))
    for seed in range(400):
        x = torch.stack([torch.arange(400.0).view(40, 10)] * 256, 1)  # every vector says where it comes from
        sample = VectorSample(256, seed)
        sample.capacity = 50
        sample.add(x, 0)
        for value in sample.vectors[:, 0]:
            counts[divmod(int(value), 10)] += 1
    expected = counts.sum() / counts.size
    assert scipy.stats.chisquare(counts.ravel()).pvalue > 1e-4
    assert abs(counts / expected - 1).max() < 0.6


def test_positions_folded_into_the_batch_are_given_back_to_their_images():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x):
            tokens = x.flatten(2).transpose(1, 2)
            return self.norm(tokens.flatten(0, 1)).reshape_as(tokens)

    model = randomise_(Folded()).eval()
    images = torch.randn(4, 6, 3, 3)
    with torch.no_grad():
        y = model(images).double().numpy()  # (N, T, C)
    (record,) = ns.analyze(model, [images], only=STATISTICS, layers=["norm"]).statistics
    assert record.between_var == pytest.approx(y.mean(1).var(0).mean(), rel=1e-5)
    assert record.within_var == pytest.approx(y.var(1).mean(), rel=1e-5)


def test_convnet_outputs_are_listed_in_the_order_of_the_forward_pass():
    report = ns.analyze(ConvNet().eval(), [torch.randn(4, 3, 8, 8)], only=STATISTICS)
    assert [record.layer for record in report.statistics] == ["conv1", "bn1", "conv2", "bn2", "bn3", "head"]


def test_layers_are_chosen_by_glob_or_kind():
    model = timm.create_model("test_resnet")
    assert [layer.name for layer in choose_layers(model, kinds=["block"])] == [
        "layer1.0", "layer2.0", "layer3.0", "layer4.0",
    ]  # fmt: skip
    assert [layer.name for layer in choose_layers(model, ["layer1.*.act?", "fc"])] == [
        "layer1.0.act1",
        "layer1.0.act2",
        "fc",
    ]
    with pytest.raises(
        ns.NormSurgeonError, match=r"^the pattern 'layer9\.\*' matches no module; there are: conv1\.0, "
    ):
        choose_layers(model, ["layer9.*"])
    with pytest.raises(
        ns.NormSurgeonError, match=r"^there is no kind of layer 'pool'; try norm, convolution, linear, block$"
    ):
        choose_layers(model, kinds=["pool"])
