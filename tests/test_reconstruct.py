"""Reconstruction: nearer to the original on images that were not fitted, or nothing changed."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from torch import nn

import normsurgeon as ns
from normsurgeon._util.progress import Progress
from normsurgeon.data.sources import open_source
from normsurgeon.data.splitting import split_numbers, split_source
from normsurgeon.errors import DataError, TrainingError, UsageError
from normsurgeon.recovery.block_fitting import fit_block
from normsurgeon.recovery.config import ReconstructionConfig
from normsurgeon.recovery.fitting import Fitting
from tests.conftest import ConvNet
from tests.test_calibrate import images

QUICK = {"steps": 12, "local_steps": 6, "lr": 2e-3, "check_every": 3, "batch_size": 16}


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def test_the_network_comes_nearer_to_the_original_on_images_that_it_never_saw(convnet: ConvNet) -> None:
    result = ns.convert(convnet, to="gn", balance=False)
    unseen = [(images(seed=9), None)]
    before = ns.evaluate(result.model, unseen, baseline=convnet).kl
    done = ns.reconstruct_(result, [images(96)], **QUICK).history[-1]
    after = ns.evaluate(result.model, unseen, baseline=convnet).kl
    assert before is not None
    assert after is not None
    assert after < 0.7 * before
    assert done.kl < done.kl_before
    assert done.images + done.held_out == 96
    assert done.blocks > 0


def test_what_is_reported_is_the_held_out_kl_of_what_was_kept(convnet: ConvNet) -> None:
    x = images(96)
    result = ns.convert(convnet, to="gn")
    done = ns.reconstruct_(result, [x], **QUICK).history[-1]
    held_out = x[list(split_numbers(96, done.held_out, 0)[1])]
    found = ns.evaluate(result.model, [(held_out, None)], baseline=convnet)
    assert found.kl == pytest.approx(done.kl, rel=1e-4)
    assert done.kl == dict(done.curve)[done.best_step]
    assert dict(done.curve)[done.best_step] == done.kl


def test_where_fitting_does_harm_the_start_is_kept(convnet: ConvNet) -> None:
    result = ns.convert(convnet, to="ln")
    result.model.head.requires_grad_(False)  # its scale would be put right
    before = snapshot(result.model)
    done = ns.reconstruct_(
        result, [images(32)], lr=3.0, steps=4, local_steps=0, check_every=1, batch_size=8, patience=2
    ).history[-1]
    assert done.best_step == 0
    assert done.steps == 2  # two looks without progress
    assert "in 2 updates, none of which was kept, " in done.summary
    assert same(before, snapshot(result.model))


def test_where_nothing_is_to_be_gained_nothing_is_done(convnet: ConvNet) -> None:
    result = ns.convert(convnet, to="affine")
    before = snapshot(result.model)
    done = ns.reconstruct_(result, [images(32)], **QUICK).history[-1]
    assert (done.steps, done.best_step) == (0, 0)
    assert same(before, snapshot(result.model))


def test_no_update_begins_after_the_minutes(convnet: ConvNet, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=10.0)  # each look at it takes ten seconds
    monkeypatch.setattr("normsurgeon.recovery.fitting.monotonic", lambda: next(clock))
    settings = {**QUICK, "local_steps": 50, "steps": 50, "check_every": 50}
    done = ns.reconstruct(ns.convert(convnet, to="gn"), [images(64)], **settings, minutes=2).history[-1]
    assert 2 <= done.steps <= 12  # 120 seconds, of which 84 are the blocks'
    assert done.curve[-1][0] == done.steps
    assert done.kl <= done.kl_before


def test_a_seed_gives_the_same_weights_again_and_leaves_the_callers_random_state(convnet: ConvNet) -> None:
    states = []
    for _ in range(2):
        result = ns.convert(convnet, to="gn")
        state = torch.get_rng_state()
        ns.reconstruct_(result, [images(48)], **QUICK)
        assert torch.equal(torch.get_rng_state(), state)
        states.append(snapshot(result.model))
    assert same(*states)


def test_labels_are_not_looked_at(convnet: ConvNet) -> None:
    x, states = images(32), []
    for labels in (None, torch.zeros(32, dtype=torch.int64)):
        result = ns.convert(convnet, to="gn")
        ns.reconstruct_(result, [(x, labels)], **QUICK)
        states.append(snapshot(result.model))
    assert same(*states)


def test_a_fitted_block_is_nearer_to_the_originals_for_what_the_converted_prefix_gives_it() -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 2))
    model = copy.deepcopy(original)
    with torch.no_grad():
        for parameter in (*model[0].parameters(), *model[1].parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    others = snapshot(model[0]), snapshot(model[2])
    fit, held = torch.randn(256, 4), torch.randn(64, 4)
    wanted = original[1](original[0](held)).detach()

    def error() -> float:
        """The relative squared error of an image, by its formula."""
        found = model[1](model[0](held))
        return float(((found.detach() - wanted).square().sum(1) / wanted.square().sum(1)).mean())

    before = error()
    steps = fit_block(model, original, "1", fit, (held, held), ReconstructionConfig(local_steps=200, local_lr=1e-2))
    assert steps > 0
    assert error() < 0.3 * before
    assert same(others[0], snapshot(model[0]))
    assert same(others[1], snapshot(model[2]))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_block_that_fitting_makes_worse_keeps_its_weights() -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model = copy.deepcopy(original)
    before = snapshot(model)
    x = torch.randn(32, 4)
    fit_block(model, original, "1", x, (x, x), ReconstructionConfig(local_steps=5, local_lr=10.0, check_every=1))
    assert same(before, snapshot(model))


def test_a_block_of_two_arguments_is_left_alone() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Bilinear(4, 4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(x, x)

    net = Two()
    before = snapshot(net)
    assert fit_block(net, Two(), "block", torch.randn(8, 4), (torch.randn(4, 4),) * 2, ReconstructionConfig()) == 0
    assert same(before, snapshot(net))


def test_flags_gradients_and_the_original_stay_as_they_were(convnet: ConvNet) -> None:
    original = snapshot(convnet)
    result = ns.convert(convnet, to="gn")
    result.model.train()
    result.model.head.bias.requires_grad_(False)
    ns.reconstruct_(result, [images(32)], **QUICK)
    assert same(original, snapshot(convnet))
    assert result.model.training
    assert not result.model.head.bias.requires_grad
    assert all(parameter.grad is None for parameter in result.model.parameters())
    for module in (*result.model.modules(), *convnet.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_an_interrupt_leaves_the_weights_as_they_were(convnet: ConvNet) -> None:
    result = ns.convert(convnet, to="gn")
    before = snapshot(result.model)

    def interrupt(progress: Progress) -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ns.reconstruct_(result, [images(32)], on_progress=interrupt, **QUICK)
    assert same(before, snapshot(result.model))
    assert result.history == []


def test_the_event_is_of_plain_types(convnet: ConvNet) -> None:
    result = ns.convert(convnet, to="gn")
    done = ns.reconstruct_(result, [images(32)], **QUICK).history[-1]
    assert json.loads(json.dumps(done.to_dict())) == done.to_dict() == result.history[0].to_dict()


def test_bad_input_is_an_error_of_one_line(convnet: ConvNet) -> None:
    result = ns.convert(convnet, to="gn")
    with pytest.raises(UsageError, match="reconstruction has no setting 'epochs'; did you mean steps"):
        ReconstructionConfig(epochs=3)
    with pytest.raises(TypeError, match="epochs"):
        ns.reconstruct_(result, [images(8)], epochs=3)
    with pytest.raises(UsageError, match="lr=-1 must be a number above 0"):
        ns.reconstruct_(result, [images(8)], lr=-1)
    with pytest.raises(UsageError, match="held_out=1 must be a share between 0 and 1"):
        ns.reconstruct_(result, [images(8)], held_out=1)
    with pytest.raises(DataError, match="2 images are too few to fit on and to judge by; try at least 32"):
        ns.reconstruct_(result, [images(2)])
    with pytest.raises(DataError, match="there are no images to fit on; the batches are empty"):
        ns.reconstruct_(result, [])
    with pytest.raises(UsageError, match="a batch is str of str and NoneType; give batches of tensors"):
        ns.reconstruct_(result, ["x"])
    broken = images(32)
    broken *= 1e30  # finite, and its squares are not
    before = snapshot(result.model)
    with pytest.raises(
        TrainingError, match="not finite at update 1 of block bn1, nothing was changed; try a lower local_lr"
    ):
        ns.reconstruct_(result, [broken], **QUICK)
    with pytest.raises(TrainingError, match=r"not finite at update 1 of the reconstruction, .* try a lower lr"):
        ns.reconstruct_(result, [broken], **{**QUICK, "local_steps": 0})
    assert same(before, snapshot(result.model))


def test_a_source_is_split_by_the_seed_alone_and_nothing_is_lost() -> None:
    digits = open_source("digits")
    fit, judge = split_source(digits, 100, seed=3)
    again, _ = split_source(digits, 100, seed=3)
    other, _ = split_source(digits, 100, seed=4)
    assert (len(fit), len(judge)) == (1697, 100)
    assert fit.reader.numbers == again.reader.numbers != other.reader.numbers
    assert sorted(fit.reader.numbers + judge.reader.numbers) == list(range(1797))
    assert judge[0][1] == digits[judge.reader.numbers[0]][1]
    with pytest.raises(DataError, match="digits has 1797 images, which cannot be cut into 1797 and others"):
        split_source(digits, 1797)


def test_logits_that_are_too_small_are_scaled_back_exactly(convnet: ConvNet) -> None:
    result = ns.convert(convnet, to="affine")
    with torch.no_grad():
        for parameter in result.model.head.parameters():
            parameter.div_(1.35)
    done = ns.reconstruct_(result, [images(48)], steps=0, local_steps=0).history[-1]
    assert done.logit_scale == pytest.approx(1.35, rel=1e-3)
    assert done.kl == pytest.approx(0, abs=1e-6)
    assert done.kl_before > 1e-3
    assert torch.allclose(result.model(images()), convnet(images()), rtol=1e-3, atol=1e-4)


def test_a_kl_that_is_not_finite_is_none_in_json() -> None:
    done = ns.ReconstructionRecord(8, 2, 1, 3, 0, float("inf"), 0.5, 1.0, ((0, float("inf")), (3, 0.5)), 1.0)
    document = json.loads(json.dumps(done.to_dict(), allow_nan=False))
    assert (document["kl_before"], document["kl"], document["curve"]) == (None, 0.5, [[0, None], [3, 0.5]])


def test_what_the_caller_froze_stays_as_it_is(convnet: ConvNet) -> None:
    result = ns.convert(convnet, to="gn")
    result.model.conv1.requires_grad_(False)
    before = snapshot(result.model.conv1)
    ns.reconstruct_(result, [images(32)], **QUICK)
    assert same(before, snapshot(result.model.conv1))
    result.model.requires_grad_(False)
    with pytest.raises(UsageError, match=r"every parameter of ConvNet is frozen; try .*requires_grad_\(True\)"):
        ns.reconstruct_(result, [images(32)], **QUICK)


def test_a_last_linear_layer_that_gives_no_logits_is_not_scaled() -> None:
    class Cosine(nn.Module):
        """Logits of a fixed length: scaling the last linear layer scales nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
            self.inner = nn.Linear(16, 10, bias=False)
            self.length = nn.Parameter(torch.tensor(5.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.length * nn.functional.normalize(self.inner(self.bn(self.conv(x)).mean((2, 3))), dim=1)

    torch.manual_seed(0)
    result = ns.convert(Cosine().eval(), to="affine")
    with torch.no_grad():
        result.model.length.div_(1.35)
    weight = result.model.inner.weight.detach().clone()
    done = ns.reconstruct_(result, [images(32)], steps=0, local_steps=0).history[-1]
    assert done.kl == done.kl_before > 1e-3
    assert done.logit_scale == 1
    assert torch.equal(result.model.inner.weight, weight)


def test_a_gain_within_its_standard_error_is_no_gain(convnet: ConvNet, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    calls = []

    def noisy(self: Fitting) -> torch.Tensor:
        calls.append(None)
        kls = 1.0 + 0.1 * torch.randn(16, generator=generator, dtype=torch.float64)
        return kls - kls.mean() + 1.0 - 1e-3 * len(calls)  # a little less every time, far within the noise

    monkeypatch.setattr(Fitting, "_held_out_kls", noisy)
    result = ns.convert(convnet, to="gn")
    done = ns.reconstruct_(result, [images(96)], **{**QUICK, "patience": 99}).history[-1]
    assert len(calls) > 5
    assert done.best_step == 0
