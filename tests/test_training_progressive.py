"""Progressive conversion: exact at its start, gone at its end."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from conftest import randomise_
from torch import nn

import normsurgeon as ns
from normsurgeon.errors import UsageError
from normsurgeon.finetuning.blending import Blend, blend_, plain_state, set_shares_, shares
from normsurgeon.surgery.whitening import change_of_producer


def converted(model, to):
    return ns.convert(model, to=to, example_inputs=torch.zeros(1, 3, 32, 32, dtype=next(model.parameters()).dtype))


def digits_like(count=8, size=32, dtype=torch.float32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("target", ["gn", "ln", "ln2d", "in", "rms", "rms2d"])
def test_at_its_start_the_network_is_the_batch_norm_original(convnet, target):
    original = copy.deepcopy(convnet).double()
    result = converted(original, target)
    names = blend_(result.model, result.plan, original)
    assert names == ("bn1", "bn2", "bn3")
    x = digits_like(dtype=torch.float64)
    assert torch.allclose(result.model(x), original(x), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(converted(original, target).model(x), original(x), atol=1e-3)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet"])
def test_at_its_start_a_timm_network_is_the_original_in_single_precision(name):
    torch.manual_seed(0)
    original = randomise_(timm.create_model(name)).eval()
    result = converted(original, "gn")
    blend_(result.model, result.plan, original)
    x = digits_like(2, 96)
    assert torch.allclose(result.model(x), original(x), rtol=1e-4, atol=1e-4)


def test_a_calibrated_norm_starts_at_the_original_too(convnet):
    result = converted(convnet, "gn")
    with torch.no_grad():
        for name in ("bn1", "bn2", "bn3"):
            result.model.get_submodule(name).weight.mul_(1.3)
            result.model.get_submodule(name).bias.add_(0.2)
    blend_(result.model, result.plan, convnet)
    x = digits_like()
    assert torch.allclose(result.model(x), convnet(x), rtol=1e-4, atol=1e-4)


def test_at_its_end_the_network_is_the_converted_one_and_its_state_without_the_blends_fits_it():
    torch.manual_seed(0)
    original = randomise_(timm.create_model("test_efficientnet")).eval()  # norm+act modules
    result = converted(original, "gn")
    blended = copy.deepcopy(result.model)
    names = blend_(blended, result.plan, original)
    set_shares_(blended, names, 1.0, "together")
    x = digits_like(2, 96)
    assert torch.allclose(blended(x), result.model(x), rtol=1e-6, atol=1e-6)
    state = plain_state(blended.state_dict(), names)
    assert set(state) == set(result.model.state_dict())
    assert all(torch.equal(state[key], value) for key, value in result.model.state_dict().items())


def test_halfway_the_output_is_halfway():
    norm = nn.GroupNorm(2, 4)
    blend = Blend(norm, torch.full((4,), 0.5), torch.ones(4)).double()
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    for share in (0.0, 0.25, 1.0):
        blend.set_share(share)
        expected = (1 - share) * 0.5 * (x - 1) + share * norm(x)
        assert torch.allclose(blend(x), expected, atol=1e-7)


def test_a_channel_whose_gamma_is_zero_stays_its_beta(convnet):
    with torch.no_grad():
        convnet.bn1.weight[3] = 0
    result = converted(convnet, "gn")
    blend_(result.model, result.plan, convnet)
    x = digits_like()
    assert torch.allclose(result.model(x), convnet(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, groups=2, bias=False),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.ConvTranspose2d(4, 6, 3),
        nn.Linear(4, 6),
    ],
)
def test_the_change_of_a_producer_is_read_off_its_weights(layer):
    from normsurgeon.norms.affine import Affine
    from normsurgeon.surgery.whitening import fold_

    layer = layer.double()
    changed = copy.deepcopy(layer)
    scale, shift = torch.linspace(-2, 2.5, 6).double(), torch.linspace(3, 1, 6).double()
    fold_(changed, Affine(scale, shift))
    found = change_of_producer(layer, changed)
    assert torch.allclose(found.scale, scale)
    assert torch.allclose(found.shift, shift)


def test_sites_follow_one_another_or_go_together():
    assert shares(0.0, 3, "sites") == [0, 0, 0]
    assert shares(0.5, 2, "sites") == [1, 0]
    assert shares(1.0, 3, "sites") == [1, 1, 1]
    assert shares(1.7, 2, "together") == [1, 1]


def test_a_conversion_without_per_sample_norms_or_from_elsewhere_is_one_line(convnet):
    result = converted(convnet, "affine")
    with pytest.raises(UsageError, match=r"^no site of \S+ can be blended in: none was converted to a per-sample n"):
        blend_(result.model, result.plan, convnet)
    result = converted(convnet, "gn")
    with pytest.raises(
        UsageError,
        match=r"^progressive conversion starts from the batch norm original, and bn1 is no batch norm ",
    ):
        blend_(result.model, result.plan, nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("order", ["together", "sites"])
def test_a_progressive_run_starts_as_the_original_and_leaves_plain_layers_that_load(convnet, tmp_path, order):
    result = converted(convnet, "gn")
    batches = [(digits_like(size=16), None)]
    tuned = ns.finetune(
        result,
        batches,
        steps=5,
        progressive=0.75,
        progressive_order=order,
        lr=1e-3,
        device="cpu",
        output=tmp_path / "run",
    )
    first, last = tuned.history[-1].curves.steps[0], tuned.history[-1].curves.steps[-1]
    assert first["blend"] == 0
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert first["features"] == pytest.approx(0, abs=1e-6)
    assert last["blend"] == 1
    assert last["kl"] > 1e-6
    classes = [type(m) for m in tuned.model.modules()]
    assert Blend not in classes
    assert classes == [type(m) for m in result.model.modules()]
    loaded = ns.load(tuned.history[-1].path, model=convnet)
    x = digits_like(size=16)
    assert torch.equal(loaded(x), tuned.model.eval()(x))
