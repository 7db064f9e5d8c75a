"""Reconstruction: nearer to the original on images that were not fitted, or nothing changed."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import normsurgeon as ns
from normsurgeon.data.sources import open_source
from normsurgeon.data.splitting import split_numbers, split_source
from normsurgeon.errors import DataError, TrainingError, UsageError
from normsurgeon.recovery.reconstruction import _inputs_cut
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
    done = ns.reconstruct(result, [images(96)], **QUICK)
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
    done = ns.reconstruct(result, [x], **QUICK)
    held_out = x[list(split_numbers(96, done.held_out, 0)[1])]
    found = ns.evaluate(result.model, [(held_out, None)], baseline=convnet)
    assert found.kl == pytest.approx(done.kl, rel=1e-4)
    assert done.kl == min(kl for _, kl in done.curve)
    assert dict(done.curve)[done.best_step] == done.kl


def test_where_fitting_does_harm_the_start_is_kept(convnet: ConvNet) -> None:
    result = ns.convert(convnet, to="affine")
    before = snapshot(result.model)
    done = ns.reconstruct(result, [images(32)], lr=3.0, steps=4, local_steps=0, check_every=1, batch_size=8, patience=2)
    assert done.best_step == 0
    assert done.steps == 2  # two looks without progress
    assert same(before, snapshot(result.model))


def test_a_seed_gives_the_same_weights_again_and_leaves_the_callers_random_state(convnet: ConvNet) -> None:
    states = []
    for _ in range(2):
        result = ns.convert(convnet, to="gn")
        state = torch.get_rng_state()
        ns.reconstruct(result, [images(48)], **QUICK)
        assert torch.equal(torch.get_rng_state(), state)
        states.append(snapshot(result.model))
    assert same(*states)


def test_labels_are_not_looked_at(convnet: ConvNet) -> None:
    x, states = images(32), []
    for labels in (None, torch.zeros(32, dtype=torch.int64)):
        result = ns.convert(convnet, to="gn")
        ns.reconstruct(result, [(x, labels)], **QUICK)
        states.append(snapshot(result.model))
    assert same(*states)


def test_in_the_local_part_no_gradient_leaves_a_block() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    with _inputs_cut(net, ["1", "2"], {}):
        net(torch.ones(1, 2)).sum().backward()
    assert net[0].weight.grad is None
    assert net[1].weight.grad is None
    assert net[2].weight.grad is not None
    with _inputs_cut(net, ["2"], {"2": torch.full((1, 2), 5.0)}):
        assert torch.equal(net(torch.ones(1, 2)), net[2](torch.full((1, 2), 5.0)))
    assert not any(module._forward_pre_hooks for module in net)


def test_flags_gradients_and_the_original_stay_as_they_were(convnet: ConvNet) -> None:
    original = snapshot(convnet)
    result = ns.convert(convnet, to="gn")
    result.model.train()
    result.model.head.bias.requires_grad_(False)
    ns.reconstruct(result, [images(32)], **QUICK)
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

    def interrupt(step: str, done: int, total: int | None) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ns.reconstruct(result, [images(32)], on_progress=interrupt, **QUICK)
    assert same(before, snapshot(result.model))
    assert result.history == []


def test_the_event_is_of_plain_types(convnet: ConvNet) -> None:
    result = ns.convert(convnet, to="gn")
    done = ns.reconstruct(result, [images(32)], **QUICK)
    assert json.loads(json.dumps(result.history[0])) == result.history[0] == done.to_dict()


def test_bad_input_is_told_in_one_line(convnet: ConvNet) -> None:
    result = ns.convert(convnet, to="gn")
    with pytest.raises(UsageError, match="reconstruction has no setting 'epochs'; there are local_steps, "):
        ns.reconstruct(result, [images(8)], epochs=3)
    with pytest.raises(UsageError, match="lr=-1 must be above 0"):
        ns.reconstruct(result, [images(8)], lr=-1)
    with pytest.raises(UsageError, match="held_out=1 must be a share, between 0 and 1"):
        ns.reconstruct(result, [images(8)], held_out=1)
    with pytest.raises(DataError, match="2 images are too few to fit on and to judge by; try at least 32"):
        ns.reconstruct(result, [images(2)])
    with pytest.raises(UsageError, match="give batches of tensors"):
        ns.reconstruct(result, [])
    broken = images(32)
    broken[:, 0, 0, 0] = float("nan")
    before = snapshot(result.model)
    with pytest.raises(
        TrainingError, match=r"the loss is not finite at update 1 .* nothing was changed; try a lower lr"
    ):
        ns.reconstruct(result, [broken], **QUICK)
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
