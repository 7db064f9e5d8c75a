"""The algebra under the conversion, as properties."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import ConvNet, randomise_
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import normsurgeon as ns
from normsurgeon.norms import targets
from normsurgeon.norms.affine import Affine, Moments
from normsurgeon.norms.layers import LayerNormC, RmsNormC, RmsNormChw
from normsurgeon.surgery import whitening
from normsurgeon.surgery.whitening import fold_, matching_affine

PRODUCERS = [
    lambda bias, groups: nn.Conv1d(4, 8, 3, bias=bias, groups=groups),
    lambda bias, groups: nn.Conv2d(4, 8, 3, padding=1, bias=bias, groups=groups),
    lambda bias, groups: nn.Conv2d(4, 8, 3, padding=2, padding_mode="reflect", bias=bias, groups=groups),
    lambda bias, groups: nn.Conv3d(4, 8, 2, bias=bias, groups=groups),
    lambda bias, groups: nn.ConvTranspose1d(4, 8, 3, bias=bias, groups=groups),
    lambda bias, groups: nn.ConvTranspose2d(4, 8, 3, stride=2, bias=bias, groups=groups),
    lambda bias, groups: nn.ConvTranspose3d(4, 8, 2, bias=bias, groups=groups),
    lambda bias, groups: nn.Linear(4, 8, bias=bias),
]


@settings(max_examples=60, deadline=None)
@given(
    make=st.sampled_from(PRODUCERS),
    bias=st.booleans(),
    groups=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**16),
    chunk=st.sampled_from([1, 70, whitening.CHUNK]),
)
def test_folding_an_affine_into_any_producer_is_exact(make, bias, groups, seed, chunk):
    """In however many pieces a large weight is scaled."""
    torch.manual_seed(seed)
    producer = make(bias, groups).double()
    rank = {nn.Linear: 0, nn.Conv1d: 1, nn.ConvTranspose1d: 1, nn.Conv3d: 3, nn.ConvTranspose3d: 3}.get(
        type(producer), 2
    )
    x = torch.randn(2, 4, *[6] * rank, dtype=torch.float64)
    affine = Affine(torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64))
    shape = (1, -1, *[1] * rank)
    expected = producer(x) * affine.scale.view(shape) + affine.shift.view(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whitening, "CHUNK", chunk)
        fold_(producer, affine)
    torch.testing.assert_close(producer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trainable", [True, False])
def test_a_bias_gained_by_folding_trains_exactly_when_the_weight_does(trainable):
    producer = nn.Conv2d(3, 4, 1, bias=False).requires_grad_(trainable)
    fold_(producer, Affine(torch.ones(4).double(), torch.ones(4).double()))
    assert producer.bias.requires_grad is trainable
    assert producer.bias.dtype == producer.weight.dtype


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["gn", "ln", "in", "rms"]),
    groups=st.sampled_from([1, 2, 4]),
    softening=st.sampled_from([None, 0.3, 3.0]),
    seed=st.integers(0, 2**16),
)
def test_the_matching_affine_is_exact_for_a_sample_of_average_statistics(name, groups, softening, seed):
    """When a sample's own channel moments equal the running ones, T with the solved affine is the batch norm."""
    generator = torch.Generator().manual_seed(seed)
    target, channels, eps = targets.TARGETS[name], 8, 1e-3
    groups = {"gn": groups, "in": channels}.get(name, 1)
    x = torch.randn(1, channels, 5, 5, generator=generator, dtype=torch.float64) * 3 + 2
    moments = Moments(x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False))
    wanted = Affine(
        torch.randn(channels, generator=generator, dtype=torch.float64),
        torch.randn(channels, generator=generator, dtype=torch.float64),
    )
    affine, layer_eps = matching_affine(wanted, moments, target, groups, eps, softening)
    spec = targets.LayerSpec(channels, groups, layer_eps, True, 4, None, None, torch.device("cpu"), torch.float64)
    layer = target.build(spec)
    with torch.no_grad():
        layer.weight.copy_(affine.scale)
        layer.bias.copy_(affine.shift)
    expected = x * wanted.scale.view(1, -1, 1, 1) + wanted.shift.view(1, -1, 1, 1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


PER_SAMPLE = sorted(name for name, target in targets.TARGETS.items() if not target.exact)


@settings(max_examples=80, deadline=None)
@given(name=st.sampled_from(PER_SAMPLE), groups=st.sampled_from([1, 2, 4]), seed=st.integers(0, 2**16))
def test_any_positive_factor_per_pool_leaves_the_converted_function_as_it_is(name, groups, seed):
    """What a norm divides by, a producer's weights may keep or not: the scale is free (where eps is 0)."""
    generator = torch.Generator().manual_seed(seed)
    target, channels = targets.TARGETS[name], 8
    groups = {"gn": groups, "in": channels}.get(name, 1)
    producer = nn.Conv2d(3, channels, 3).double()

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    whole = Affine(random(channels), random(channels))
    moments = Moments(random(channels), random(channels).square() + 0.1)
    white = Affine(random(channels), random(channels))
    pools = groups if target.pools == "groups" else 1
    factors = random(pools).mul(2).exp().repeat_interleave(channels // pools)
    x, outputs = random(2, 3, 6, 6), []
    for seen in (white, Affine(white.scale * factors, white.shift * factors)):
        conv = copy.deepcopy(producer)
        fold_(conv, seen)
        wanted = Affine(whole.scale / seen.scale, whole.shift - whole.scale / seen.scale * seen.shift)
        affine, eps = matching_affine(wanted, seen.after(moments), target, groups, 0.0, None)
        spec = targets.LayerSpec(channels, groups, eps, True, 4, None, None, torch.device("cpu"), torch.float64)
        layer = target.build(spec)
        with torch.no_grad():
            layer.weight.copy_(affine.scale)
            layer.bias.copy_(affine.shift)
        outputs.append(layer(conv(x)))
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", PRODUCERS)
@pytest.mark.parametrize("name", ["gn", "ln", "rms2d"])
def test_at_a_scale_each_pools_weights_have_their_norm_times_the_gain(make, name, dtype):
    producer, target, groups = make(True, 2).to(dtype), targets.TARGETS[name], 2 if name == "gn" else 1
    before = copy.deepcopy(producer)
    affine = Affine(torch.randn(8).double(), torch.randn(8).double())
    kept = whitening.at_scale(producer, affine, target, groups, 3.0)
    assert torch.equal(producer.weight, before.weight)
    ratio = (kept.scale / affine.scale).view(groups, -1)
    assert (ratio > 0).all()
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    torch.testing.assert_close(kept.shift / affine.shift, ratio.flatten())
    fold_(producer, Affine(kept.scale, torch.zeros_like(kept.shift)))

    old, new = (_row_norms(layer).view(groups, -1).sum(1) for layer in (before, producer))
    torch.testing.assert_close(new, 9 * old, rtol=1e-5, atol=0)


def _row_norms(producer):
    """The squared L2 norm of each output channel's weights."""
    weight = producer.weight.detach()
    if "Transpose" in type(producer).__name__:  # (in, out / groups, *kernel), groups one after the other
        return torch.cat([part.square().flatten(2).sum((0, 2)) for part in weight.chunk(producer.groups)])
    return weight.square().flatten(1).sum(1)


def test_weights_of_zeros_have_no_scale_to_keep():
    producer = nn.Linear(3, 8)
    nn.init.zeros_(producer.weight)
    affine = Affine(torch.ones(8).double(), torch.ones(8).double())
    assert whitening.at_scale(producer, affine, targets.TARGETS["gn"], 2, 3.0).scale.tolist() == [1.0] * 8


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("target", PER_SAMPLE)
def test_conversion_doubles_the_scale_of_every_producers_weights_and_calibration_keeps_it(target, balance):
    model = randomise_(ConvNet())
    result = ns.convert(model, to=target, balance=balance, example_inputs=torch.randn(2, 3, 16, 16))

    def ratios():
        for site in result.sites:
            if site.folds:
                pools = site.groups or 1
                old, new = (_row_norms(m.get_submodule(site.site.producer)) for m in (model, result.model))
                yield new.view(pools, -1).sum(1) / old.view(pools, -1).sum(1)

    assert any(site.folds for site in result.sites)
    for ratio in ratios():
        torch.testing.assert_close(ratio, torch.full_like(ratio, 4.0), rtol=1e-4, atol=0)
    ns.calibrate_(result, [(torch.randn(40, 3, 16, 16), None)])
    for ratio in ratios():
        torch.testing.assert_close(ratio, torch.full_like(ratio, 4.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("target", sorted(targets.TARGETS))
def test_a_structure_made_without_values_has_the_eps_of_one_made_with_them(target):
    """So that the state of a converted network makes a converted skeleton the same network."""
    model = randomise_(ConvNet())
    example = torch.randn(2, 3, 16, 16)
    plan = ns.plan(model, target, example_inputs=example)
    full, ghost = ns.convert(model, plan).model, ns.convert(copy.deepcopy(model).to("meta"), plan).model
    eps = [{n: m.eps for n, m in each.named_modules() if hasattr(m, "eps")} for each in (full, ghost)]
    assert eps[0] == eps[1]
    if target in PER_SAMPLE:
        assert {d.name: eps[0][d.name] / d.site.eps for d in plan.decisions} == {
            d.name: pytest.approx(4.0 if d.folds else 1.0) for d in plan.decisions
        }


def test_softened_groups_share_one_scale_since_they_share_one_eps():
    model = randomise_(ConvNet())
    result = ns.convert(model, to="gn", eps=0.3, balance=False, example_inputs=torch.randn(2, 3, 16, 16))
    site = result.sites[0]
    assert (site.folds, site.groups) == (True, 2)
    old, new = (_row_norms(m.get_submodule(site.site.producer)) for m in (model, result.model))
    assert new.sum() / old.sum() == pytest.approx(4.0, rel=1e-4)
    per_channel = (new / old) * (model.bn1.running_var + model.bn1.eps)  # the whitening taken out again
    torch.testing.assert_close(per_channel, per_channel[:1].expand_as(per_channel), rtol=1e-4, atol=0)


def test_on_whitened_input_gamma_and_beta_are_copied():
    whitened = Moments(torch.zeros(8).double(), torch.ones(8).double())
    wanted = Affine(torch.randn(8).double(), torch.randn(8).double())
    affine, _ = matching_affine(wanted, whitened, targets.TARGETS["gn"], 2, 0.0, None)
    torch.testing.assert_close(affine.scale, wanted.scale)
    torch.testing.assert_close(affine.shift, wanted.shift)


def test_softening_grows_gamma_by_sqrt_one_plus_eps():
    whitened = Moments(torch.zeros(8).double(), torch.ones(8).double())
    wanted = Affine(torch.ones(8).double(), torch.zeros(8).double())
    affine, eps = matching_affine(wanted, whitened, targets.TARGETS["ln"], 1, 1e-5, 3.0)
    assert eps == pytest.approx(3.0)
    torch.testing.assert_close(affine.scale, torch.full((8,), 2.0).double())


def test_composing_affines_is_applying_one_after_the_other():
    outer, inner = (Affine(torch.randn(5), torch.randn(5)) for _ in range(2))
    x = torch.randn(5)
    both = outer.compose(inner)
    torch.testing.assert_close(both.scale * x + both.shift, outer.scale * (inner.scale * x + inner.shift) + outer.shift)


@pytest.mark.parametrize("shape", [(3, 32), (3, 32, 7), (3, 32, 5, 4), (3, 32, 2, 3, 4)])
def test_ln_is_layer_norm_over_all_of_a_sample(shape):
    x = torch.randn(shape, dtype=torch.float64)
    spec = targets.LayerSpec(32, 1, 1e-5, True, len(shape), None, None, torch.device("cpu"), torch.float64)
    flat = x.flatten(1)
    expected = (flat - flat.mean(1, True)) / torch.sqrt(flat.var(1, unbiased=False, keepdim=True) + 1e-5)
    torch.testing.assert_close(targets.TARGETS["ln"].build(spec)(x), expected.view(shape))


@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 7), (3, 8, 5, 4), (3, 8, 2, 3, 4)])
@pytest.mark.parametrize("name", ["ln2d", "rms2d", "rms"])
def test_norms_of_any_rank_equal_their_formula(name, shape):
    x = torch.randn(shape, dtype=torch.float64) + 1
    spec = targets.LayerSpec(8, 1, 1e-3, True, len(shape), None, None, torch.device("cpu"), torch.float64)
    layer = targets.TARGETS[name].build(spec)
    axes = tuple(range(1, x.ndim)) if name == "rms" else (1,)
    centred = x - x.mean(axes, True) if name == "ln2d" else x
    expected = centred / torch.sqrt(centred.square().mean(axes, True) + 1e-3)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("cls", [RmsNormChw, RmsNormC, LayerNormC])
def test_own_layers_keep_half_precision(cls):
    layer = cls(8, dtype=torch.bfloat16)
    x = (torch.randn(2, 8, 4, 4) * 300).to(torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("target", sorted(targets.TARGETS))
def test_a_converted_samples_output_does_not_depend_on_its_neighbours(target):
    model = ns.convert(randomise_(ConvNet()), to=target).model.double().train()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


@settings(max_examples=50, deadline=None)
@given(channels=st.integers(1, 4096))
def test_auto_groups_divide_and_leave_sixteen_channels(channels):
    groups = targets.auto_groups(channels)
    assert channels % groups == 0
    assert groups <= 32
    assert groups == 1 or channels // groups >= 16
    better = [g for g in range(groups + 1, 33) if channels % g == 0 and channels // g >= 16]
    assert not better, "more groups would have fitted"
