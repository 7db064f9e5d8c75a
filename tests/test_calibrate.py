"""Calibration: the converted norms' outputs have the original's mean and variance, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import normsurgeon as ns
from normsurgeon._util.progress import Progress
from normsurgeon.errors import DataError, UsageError
from normsurgeon.inference.hooks import listening
from normsurgeon.models.checkpoint import origin_of
from normsurgeon.norms.affine import Affine, Moments
from normsurgeon.norms.targets import TARGETS
from normsurgeon.recovery.matching import match_
from normsurgeon.recovery.rebalancing import rescaled_affine
from normsurgeon.surgery.whitening import matching_affine
from tests.conftest import ConvNet, randomise_, stored_outputs

SITES = ("bn1", "bn2", "bn3")


def images(count: int = 48, side: int = 24, seed: int = 1) -> torch.Tensor:
    """Smooth random images, which differ in brightness and contrast."""
    generator = torch.Generator().manual_seed(seed)
    x = nn.functional.avg_pool2d(torch.randn(count, 3, side + 4, side + 4, generator=generator), 5, 1)
    return x * (1 + 3 * torch.rand(count, 1, 1, 1, generator=generator)) + torch.randn(
        count, 3, 1, 1, generator=generator
    )


def channel_moments(x_NCHW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x_NCHW.mean((0, 2, 3)), x_NCHW.std((0, 2, 3))


@pytest.mark.parametrize("target", ["gn", "ln", "rms", "in", "ln2d", "rms2d"])
def test_every_sites_output_has_the_originals_mean_and_spread(convnet: ConvNet, target: str) -> None:
    x = images()
    result = ns.convert(convnet, to=target, balance=False)
    ns.calibrate_(result, [(x, None)])
    before, after = stored_outputs(convnet, x), stored_outputs(result.model, x)
    for site in SITES:
        (mean, sd), (wanted_mean, wanted_sd) = channel_moments(after[site]), channel_moments(before[site])
        assert np.abs(mean - wanted_mean).max() < 1e-4, site
        assert np.abs(sd / wanted_sd - 1).max() < 1e-3, site


def test_a_norm_with_its_own_activation_is_matched_before_it() -> None:
    original = randomise_(timm.create_model("test_efficientnet")).eval()
    assert type(original.bn1).__name__ == "BatchNormAct2d"
    x = images(32, 64)
    result = ns.convert(original, to="gn", example_inputs=x[:2], verdict=False)
    ns.calibrate_(result, [x])
    found: dict[str, torch.Tensor] = {}
    bn, new = original.bn1, result.model.bn1
    with torch.no_grad(), listening([(bn, "input", lambda t: found.__setitem__("x", t.clone()))]):
        original(x)
    with torch.no_grad(), listening([(new.drop, "input", lambda t: found.__setitem__("y", t.clone()))]):
        result.model(x)
    shape = (1, -1, 1, 1)
    wanted = (found["x"] - bn.running_mean.view(shape)) / (bn.running_var.view(shape) + bn.eps).sqrt()
    wanted = wanted * bn.weight.view(shape) + bn.bias.view(shape)
    assert torch.allclose(found["y"].mean((0, 2, 3)), wanted.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(found["y"].std((0, 2, 3)), wanted.std((0, 2, 3)), rtol=1e-3)


def test_the_answer_does_not_depend_on_the_batches(convnet: ConvNet) -> None:
    x = images()
    states = []
    for size in (48, 7):
        result = ns.convert(convnet, to="gn")
        ns.calibrate_(result, [(part, None) for part in x.split(size)])
        states.append(result.model.state_dict())
    for key, value in states[0].items():
        assert torch.allclose(value, states[1][key], rtol=1e-4, atol=1e-5), key


def test_three_forward_passes_whatever_the_depth(convnet: ConvNet) -> None:
    calls = {"original": 0, "converted": 0}
    result = ns.convert(convnet, to="gn")
    convnet.register_forward_hook(lambda *_: calls.__setitem__("original", calls["original"] + 1))
    result.model.register_forward_hook(lambda *_: calls.__setitem__("converted", calls["converted"] + 1))
    done = ns.calibrate_(result, [images()]).history[-1]
    assert calls == {"original": 2, "converted": 1}
    assert done.forward_passes == 3
    assert (done.sites, done.balanced) == (3, 1)  # only conv1 has no other reader than its norm


def test_it_brings_the_logits_nearer_to_the_originals(convnet: ConvNet) -> None:
    x, unseen = images(), images(seed=2)
    result = ns.convert(convnet, to="gn", balance=False)
    before = ns.evaluate(result.model, [(unseen, None)], baseline=convnet).kl
    ns.calibrate_(result, [x])
    after = ns.evaluate(result.model, [(unseen, None)], baseline=convnet).kl
    assert before is not None
    assert after is not None
    assert after < before


def test_few_images_change_no_signs(convnet: ConvNet) -> None:
    assert ns.calibrate_(ns.convert(convnet, to="gn"), [images(8)]).history[-1].balanced == 0


def test_a_large_data_set_is_not_gone_through_unless_asked_for(convnet: ConvNet) -> None:
    many = list(images(600, side=6).split(64))
    assert ns.calibrate_(ns.convert(convnet, to="gn"), many).history[-1].images == 512
    assert ns.calibrate_(ns.convert(convnet, to="gn"), many, max_images=600).history[-1].images == 600


def test_only_so_many_images_are_held_at_once(convnet: ConvNet) -> None:
    done = ns.calibrate_(ns.convert(convnet, to="gn"), [images()], matched_images=16).history[-1]
    assert (done.images, done.matched_images) == (48, 16)


@given(
    target=st.sampled_from([t for t in TARGETS.values() if not t.exact]),
    seed=st.integers(0, 1000),
    groups=st.sampled_from([1, 2, 4]),
)
@settings(max_examples=50, deadline=None)
def test_rebalancing_leaves_the_fixed_affine_alone(target, seed, groups) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> torch.Tensor:
        return torch.rand(8, generator=generator, dtype=torch.float64) * (high - low) + low

    moments, now = Moments(draw(-1, 1), draw(0.5, 2)), Affine(draw(0.5, 2), draw(-1, 1))
    scale = Affine(draw(0.5, 2) * (draw(-1, 1).sign() + 0.01).sign(), draw(-1, 1))
    new, eps = rescaled_affine(now, 1e-5, scale, moments, target, groups, None)

    def fixed(affine: Affine, inputs: Moments) -> Affine:
        """What a norm does to a sample of average statistics, by its formula and not by the code under test."""
        pools = groups if target.pools == "groups" else 1
        mean, square = (v.view(pools, -1) for v in (inputs.mean, inputs.var + inputs.mean**2))
        centre = mean.mean(1, keepdim=True) if target.centres else torch.zeros(pools, 1, dtype=torch.float64)
        spread = (square.mean(1, keepdim=True) - centre**2 + 1e-5).sqrt().expand_as(mean).reshape(-1)
        slope = affine.scale / spread
        return Affine(slope, affine.shift - slope * centre.expand_as(mean).reshape(-1))

    before, after = fixed(now, moments), fixed(new, scale.after(moments))
    assert eps == 1e-5
    assert torch.allclose(after.scale * scale.scale, before.scale)
    assert torch.allclose(after.scale * scale.shift + after.shift, before.shift)


def test_a_channel_that_never_varied_is_made_constant_again() -> None:
    norm = nn.GroupNorm(1, 3)
    found = Moments(torch.zeros(3).double(), torch.tensor([1.0, 1.0, 0.5]).double())
    wanted = Moments(torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([1.0, 4.0, 0.0]).double())
    match_(norm, found, wanted)
    assert norm.weight.tolist() == [1.0, 2.0, 0.0]
    assert norm.bias.tolist() == [0.0, 1.0, 2.0]


def test_the_original_and_everything_but_the_weights_stay_as_they_were(convnet: ConvNet) -> None:
    convnet.conv1.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in convnet.state_dict().items()}
    result = ns.convert(convnet, to="gn")
    result.model.train()
    result.model.bn2.eval()
    ns.calibrate_(result, [images()])
    assert all(torch.equal(value, before[key]) for key, value in convnet.state_dict().items())
    assert result.model.training
    assert not result.model.bn2.training
    assert not result.model.conv1.weight.requires_grad
    for module in (*result.model.modules(), *convnet.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_an_error_on_the_way_leaves_the_weights_as_they_were(convnet: ConvNet) -> None:
    result = ns.convert(convnet, to="gn")
    before = {key: value.clone() for key, value in result.model.state_dict().items()}

    def interrupt(progress: Progress) -> None:
        if (
            progress.stage == "matching" and progress.done == 5
        ):  # three sites of the original are seen by then, and two are matched
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ns.calibrate_(result, [images()], on_progress=interrupt)
    assert all(torch.equal(value, before[key]) for key, value in result.model.state_dict().items())
    assert result.history == []
    assert not any(module._forward_hooks for module in result.model.modules())


def test_what_was_done_travels_with_the_file(tmp_path: Path) -> None:
    original, x = timm.create_model("test_resnet").train(), images(40, 96)
    for module in original.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    original(x)  # statistics of these images, as a trained network has them
    result = ns.convert(original.eval(), to="gn", example_inputs=x[:2], verdict=False)
    done = ns.calibrate_(result, [x]).history[-1]
    path = ns.save(result, tmp_path / "gn.safetensors")
    loaded = ns.load(path)
    assert torch.equal(loaded(x), result.model(x))
    assert json.loads(json.dumps(done.to_dict())) == done.to_dict() == result.history[0].to_dict()
    # A loaded model carries its plan: calibrated again, with the original given, hardly anything is left to do.
    again = ns.calibrate_(loaded, [x], original=original, balance=False).history[-1]
    assert again.worst_error < 1e-3 < done.worst_error


def test_bad_input_is_an_error_of_one_line(convnet: ConvNet) -> None:
    x = images(4)
    result = ns.convert(convnet, to="gn")
    with pytest.raises(
        UsageError, match=r"there is no original of ConvNet to follow .* try original=the BatchNorm model"
    ):
        ns.calibrate_(ns.convert_(randomise_(ConvNet()).eval(), to="gn"), [x])
    with pytest.raises(UsageError, match=r"ConvNet is no conversion: .* try result = normsurgeon.convert"):
        ns.calibrate_(result.model, [x], original=convnet)
    with pytest.raises(UsageError, match="is the model itself"):
        ns.calibrate_(result, [x], original=result.model)
    with pytest.raises(UsageError, match="test_resnet is not the original of this conversion: bn2 is not there in it"):
        ns.calibrate_(result, [x], original=nn_resnet_without("bn2"))
    with pytest.raises(UsageError, match="an iterator, which can be passed over only once; try a list"):
        ns.calibrate_(result, iter([x]))
    with pytest.raises(DataError, match="there are no images in list of batches"):
        ns.calibrate_(result, [])
    with pytest.raises(UsageError, match="matched_images=0 must be at least 1"):
        ns.calibrate_(result, [x], matched_images=0)


def nn_resnet_without(site: str) -> nn.Module:
    model = timm.create_model("test_resnet")
    model.bn1 = nn.BatchNorm2d(32)
    assert site not in dict(model.named_modules())
    return model


def test_matching_affine_is_what_rebalancing_inverts() -> None:
    """The unit affine's formula: weight sqrt(V + eps), bias M."""
    moments = Moments(torch.tensor([1.0, 3.0]).double(), torch.tensor([1.0, 1.0]).double())
    unit, _ = matching_affine(
        Affine(torch.ones(2).double(), torch.zeros(2).double()), moments, TARGETS["ln"], 1, 0.0, None
    )
    assert torch.allclose(unit.scale, torch.full((2,), 2**0.5).double())
    assert torch.allclose(unit.shift, torch.full((2,), 2.0).double())


@pytest.mark.parametrize("function", [ns.calibrate, ns.reconstruct])
def test_a_new_conversion_is_returned_and_nothing_that_is_given_is_changed(function, convnet: ConvNet) -> None:
    """The same as the twin in place, on a copy."""
    result = ns.convert(convnet, to="gn", optimizer=torch.optim.SGD(convnet.parameters(), lr=0.1))
    given = [{key: value.clone() for key, value in net.state_dict().items()} for net in (result.model, convnet)]
    options = {} if function is ns.calibrate else {"steps": 2, "local_steps": 2, "batch_size": 8, "check_every": 1}
    new = function(result, [images(40)], **options)
    for net, state in zip((result.model, convnet), given, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert result.history == []
    assert [record.to_dict()["event"] for record in new.history] == [function.__name__]
    assert (new.plan, new.original, new.check) == (result.plan, convnet, result.check)
    held = {id(p) for group in new.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in new.model.parameters()}
    in_place = getattr(ns, f"{function.__name__}_")
    assert in_place(result, [images(40)], **options) is result
    assert all(torch.equal(value, new.model.state_dict()[key]) for key, value in result.model.state_dict().items())


def test_a_network_without_a_plan_of_its_own_keeps_its_records(tmp_path: Path, convnet: ConvNet) -> None:
    """A loaded model is calibrated: the record is in the result, on the model, and in the file, once each."""
    result = ns.calibrate(ns.convert(convnet, to="gn"), [images(40)])
    loaded = ns.load(ns.save(result, tmp_path / "one.safetensors", on_message=lambda text: None), model=convnet)
    again = ns.calibrate(loaded, [images(40)], original=convnet, balance=False)
    assert (again.plan, again.sites, len(again.history)) == (None, (), 1)
    assert len(origin_of(loaded).history) == 1
    path = ns.save(again, tmp_path / "two.safetensors", on_message=lambda text: None)
    events = [dict(event) for event in origin_of(ns.load(path, model=convnet)).history]
    assert events == [record.to_dict() for record in (*result.history, *again.history)]
    assert len(origin_of(ns.load(path, model=convnet)).plans) == 1


def test_a_verdict_from_before_the_calibration_says_so():
    result = ns.convert(timm.create_model("test_resnet").eval(), to="gn", example_inputs=torch.zeros(2, 3, 32, 32))
    assert "\nverdict: function " in result.summary
    calibrated = ns.calibrate(result, [(torch.randn(4, 3, 64, 64), None)])
    assert "\nverdict before calibrate: function " in calibrated.summary
    assert "verdict before calibrate" in str(calibrated)
    assert "\nverdict: function " in result.summary, "the conversion that was handed in stays as it was"
