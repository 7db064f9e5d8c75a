"""Balancing: a pre-scale that changes the norm's statistics and nothing else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from conftest import ConvNet, randomise_
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import normsurgeon as ns
from normsurgeon.calls import Call
from normsurgeon.norms.targets import TARGETS
from normsurgeon.surgery.balancing import balance, cancelling_signs
from normsurgeon.surgery.probing import FeatureProbe, probe_features, synthetic_images


def shaped_like(*shape: int, images: int = 64) -> list[Call]:
    return [Call((synthetic_images(images, shape[1], shape[2:]),))]


def objectives(means_CN: np.ndarray) -> dict[tuple[float, ...], float]:
    """For every sign vector: the squared sum of the signed means, added up over the samples."""
    every = itertools.product([1.0, -1.0], repeat=len(means_CN))
    return {signs: float(np.square(np.array(signs) @ means_CN).sum()) for signs in every}


@settings(max_examples=50, deadline=None)
@given(
    channels=st.integers(2, 9),
    samples=st.integers(1, 12),
    common=st.floats(0, 3),
    seed=st.integers(0, 2**16),
)
def test_signs_are_a_local_minimum_among_all_sign_vectors(channels, samples, common, seed):
    """Channels rise and fall together the more, the larger ``common`` is."""
    random = np.random.default_rng(seed)
    means = random.normal(size=(channels, samples)) + common * random.normal(size=samples)
    signs = tuple(cancelling_signs(torch.from_numpy(means)[None], sweeps=50)[0].tolist())
    every = objectives(means)
    rounding = 1e-9 * max(every.values())
    found = every[signs]  # a KeyError where an entry is no sign
    neighbours = [(*signs[:i], -signs[i], *signs[i + 1 :]) for i in range(channels)]
    assert found <= min(every[each] for each in neighbours) + rounding
    # At a local minimum the cross terms are not positive, and over all sign vectors they average to zero.
    assert found <= np.mean(list(every.values())) + rounding
    if channels <= 3:  # every other sign vector is a neighbour, up to the sign of the whole
        assert found <= min(every.values()) + rounding


def test_the_default_number_of_sweeps_comes_close_to_the_best_of_all_sign_vectors():
    random = np.random.default_rng(0)
    excess = []
    for _ in range(100):
        means = random.normal(size=(8, 32)) + random.normal(size=32)
        every = objectives(means)
        found = every[tuple(cancelling_signs(torch.from_numpy(means)[None])[0].tolist())]
        excess.append((found - min(every.values())) / (np.mean(list(every.values())) - min(every.values())))
    assert np.mean(excess) < 0.15  # 0.16 without sweeps
    assert max(excess) < 0.45


def test_groups_are_treated_one_by_one():
    means = torch.randn(3, 6, 20, generator=torch.Generator().manual_seed(0)).double()
    together = cancelling_signs(means)
    alone = torch.cat([cancelling_signs(means[g : g + 1]) for g in range(3)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize(("target", "groups"), [("gn", 4), ("ln", 1), ("rms", 1), ("ln2d", 1)])
def test_magnitudes_average_to_one_in_each_pool_and_rms_gets_no_signs(target, groups):
    generator = torch.Generator().manual_seed(0)
    probe = FeatureProbe(torch.randn(16, 32, generator=generator), 3 * torch.rand(32, generator=generator))
    alpha = balance(probe, TARGETS[target], groups)
    torch.testing.assert_close(alpha.square().view(groups, -1).mean(1), torch.ones(groups).double())
    assert bool((alpha < 0).any()) is (target != "rms")


def test_heavy_tails_get_a_smaller_say():
    probe = FeatureProbe(torch.zeros(4, 4), torch.tensor([0.0, 0.0, 0.0, 50.0]))
    alpha = balance(probe, TARGETS["rms"], 1)
    assert alpha[3] < alpha[0]


def test_values_that_are_not_finite_leave_a_channel_unbalanced():
    probe = FeatureProbe(torch.full((4, 8), float("nan")), torch.full((8,), float("nan")))
    assert torch.isfinite(balance(probe, TARGETS["ln"], 1)).all()


def test_balancing_cancels_out_of_the_fixed_affine():
    """With a huge eps a norm is a fixed affine but for the removed mean; rms removes none, so it must be exact."""
    model = randomise_(ConvNet()).double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    converted = ns.convert(model, to="rms", keep=["bn2", "bn3"], eps=1e12).model
    assert ns.convert(model, to="rms", keep=["bn2", "bn3"]).sites[0].balanced
    torch.testing.assert_close(converted(x), model(x), rtol=1e-6, atol=1e-6)


def test_probing_leaves_the_model_and_its_hooks_alone(convnet):
    calls = []
    convnet.bn1.register_forward_hook(lambda *a: calls.append(a))
    before = {k: v.clone() for k, v in convnet.state_dict().items()}
    found = probe_features(convnet.train(), ["bn1", "bn3"], shaped_like(2, 3, 64, 64, images=8))
    assert sorted(found) == ["bn1", "bn3"]
    assert found["bn1"].means_NC.shape == (8, 32)
    assert not calls
    assert convnet.bn1.training
    assert all(torch.equal(v, before[k]) for k, v in convnet.state_dict().items())


def test_a_probe_is_what_batch_statistics_say(convnet):
    x = synthetic_images(8, 3, (64, 64))
    y = convnet.conv1(x).double()
    xhat = (y - y.mean((0, 2, 3), True)) / torch.sqrt(y.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5)
    found = probe_features(convnet, ["bn1"], shaped_like(2, 3, 64, 64, images=8))["bn1"]
    torch.testing.assert_close(found.means_NC.double(), xhat.mean((2, 3)), rtol=1e-4, atol=1e-5)
    kurtosis = xhat.pow(4).mean((0, 2, 3)) / xhat.square().mean((0, 2, 3)).square() - 3
    torch.testing.assert_close(found.kurtosis_C.double(), kurtosis, rtol=1e-3, atol=1e-3)


def test_a_network_that_refuses_the_images_is_converted_without_balancing():
    class Picky(ConvNet):
        def forward(self, x):
            if not x.is_meta:
                raise ValueError("not these")
            return super().forward(x)

    model = randomise_(Picky()).eval()
    assert probe_features(model, ["bn1"], shaped_like(2, 3, 64, 64)) == {}
    plain = ns.convert(model, to="gn", balance=False).model.state_dict()
    balanced = ns.convert(model, to="gn").model.state_dict()
    assert all(torch.equal(plain[key], balanced[key]) for key in plain)


@pytest.mark.parametrize("channels", [1, 3, 12])
def test_synthetic_images_are_standardised_and_always_the_same(channels):
    images = synthetic_images(5, channels, (32, 48))
    assert images.shape == (5, channels, 32, 48)
    assert images.mean().abs() < 1e-5
    assert images.std() == pytest.approx(1.0, abs=1e-3)
    assert torch.equal(images, synthetic_images(5, channels, (32, 48)))


def test_synthetic_images_have_natural_spectra():
    """Power falls with frequency, as in photographs, and not as in white noise."""
    power = torch.fft.fft2(synthetic_images(32, 1, (64, 64))).abs().square().mean((0, 1))
    low, high = power[1:4, 1:4].mean(), power[24:32, 24:32].mean()
    assert low > 30 * high


def test_balancing_leaves_the_optimizer_and_what_is_trained_alone():
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU())
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain, balanced = (ns.convert(model, to="ln", balance=on, optimizer=optimizer) for on in (False, True))
    assert balanced.sites[0].balanced
    assert not plain.sites[0].balanced
    for result in (plain, balanced):
        trained = {name: p.requires_grad for name, p in result.model.named_parameters()}
        assert trained == {"0.weight": False, "0.bias": True, "1.weight": True, "1.bias": True}
        assert result.optimizer.param_groups[0]["params"] == list(result.model.parameters())
    assert not torch.equal(plain.model[0].weight, balanced.model[0].weight)
