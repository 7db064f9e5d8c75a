"""Swap sensitivity: what brute force gives, for less; and predictors that rank sites as the truth does."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import ConvNet, randomise_
from test_replay import Moody
from torch import Tensor, nn

import normsurgeon as ns
from normsurgeon.errors import CheckpointError, DataError, UsageError
from normsurgeon.selection.damage import Answers, Damage, damages
from normsurgeon.selection.swap_sensitivity import swap_sensitivity
from normsurgeon.selection.sweep import Change, Sweep, original_answers
from normsurgeon.selection.switching import Switchable


def images(count: int = 6, side: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def kl(p_logits: Tensor, q_logits: Tensor) -> float:
    """Written out, in NumPy."""
    p, q = (x.double().numpy() for x in (p_logits, q_logits))
    log_p = p - np.log(np.exp(p).sum(1, keepdims=True))
    log_q = q - np.log(np.exp(q).sum(1, keepdims=True))
    return float((np.exp(log_p) * (log_p - log_q)).sum(1).mean())


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return randomise_(timm.create_model("test_resnet", num_classes=10)).eval()


@pytest.mark.parametrize("to", ["gn", "ln", "rms", "ln2d", "in"])
def test_the_sweep_equals_converting_one_site_at_a_time(network: nn.Module, to: str) -> None:
    x = images()
    found = swap_sensitivity(
        network, [(x[:4], None), (x[4:], None)], to=to, harmless=0, all_but_one=False, example_inputs=x
    )
    plan = ns.plan(network, to, example_inputs=x)
    with torch.no_grad():
        before = network(x)
        for point in found.points[::4]:
            others = [d.name for d in plan.decisions if d.name != point.site]
            changed = ns.convert(network, plan.keep(*others), verdict=False).model(x)
            assert point.damage == pytest.approx(kl(before, changed), abs=1e-5)
            assert point.lost == pytest.approx(float((before.argmax(1) != changed.argmax(1)).float().mean()))


def test_all_but_one_equals_converting_all_but_one(network: nn.Module) -> None:
    x = images()
    found = swap_sensitivity(network, [(x, None)], to="gn", harmless=0, example_inputs=x)
    plan = ns.plan(network, "gn", example_inputs=x)
    with torch.no_grad():
        before = network(x)
        everything = kl(before, ns.convert(network, plan, verdict=False).model(x))
        assert found.all_damage == pytest.approx(everything, abs=1e-5)
        for point in found.points[::5]:
            left = kl(before, ns.convert(network, plan.keep(point.site), verdict=False).model(x))
            assert point.left_out == pytest.approx(everything - left, abs=1e-5)


def test_the_model_is_left_as_it_was(network: nn.Module) -> None:
    before = {k: v.clone() for k, v in network.state_dict().items()}
    flags = [m.training for m in network.modules()]
    swap_sensitivity(network.train(), [(images(4), None)], to="ln", all_but_one=False)
    network.eval()
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert flags == [m.training for m in network.modules()]
    assert not any("forward" in vars(m) for m in network.modules())
    assert all(p.grad is None for p in network.parameters())


def test_of_a_network_that_is_no_classifier_the_outputs_relative_error_counts() -> None:
    class Maps(ConvNet):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.relu(self.bn1(self.conv1(x)))
            return {"maps": self.bn2(self.conv2(y)), "early": y}

    model = randomise_(Maps()).eval()
    x = images(5, 16)
    found = swap_sensitivity(model, [(x, None)], to="gn", harmless=0, all_but_one=False, example_inputs=x)
    assert found.measure == "squared error"
    point = next(p for p in found.points if p.site == "bn2")
    plan = ns.plan(model, "gn", example_inputs=x)
    changed = ns.convert(model, plan.keep("bn1", "bn3"), verdict=False).model
    with torch.no_grad():
        pairs = [(model(x)[k].double(), changed(x)[k].double()) for k in ("maps", "early")]
    squares = sum(float((a - b).square().sum()) for a, b in pairs)
    whole = sum(float((a - a.mean(0)).square().sum()) for a, _ in pairs)
    assert point.damage == pytest.approx(squares / whole, rel=1e-4)
    assert point.lost is None


def test_a_network_whose_calls_change_their_order_is_run_as_a_whole() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Moody()).eval()
    randomise_(model)
    board = Switchable(model, [ns.plan(model, "ln", example_inputs=images(2, 16))])
    changes = {Change(site, options[0]): Damage() for site, options in board.options.items()}
    sweep = Sweep(board, {}, changes)
    x = images(4, 16)
    sweep.update(x, original_answers(board, x))
    assert len(sweep.found) == len(changes) > 0
    assert all(math.isfinite(each.compute()[0]) for each in sweep.found.values())


def test_a_harmless_site_is_measured_on_fewer_images(network: nn.Module) -> None:
    batches = [(images(32, 32, seed), None) for seed in range(3)]
    found = swap_sensitivity(network, batches, to="ln", harmless=0.05, all_but_one=False)
    seen = {point.images for point in found.points}
    assert seen <= {32, 64, 96}
    assert min(seen) < 96
    for point in found.points:
        assert point.images == 96 or point.damage + 3 * point.stderr < 0.05


def test_the_taylor_estimate_is_the_damage_where_the_damage_is_small(network: nn.Module) -> None:
    """Against the truth, with a norm that is softened until it hardly differs."""
    x = images(16, 64)
    found = swap_sensitivity(network, [(x, None)], to="rms", eps=300.0, harmless=0, all_but_one=False)
    large = [p for p in found.points if p.damage > 1e-9]
    assert len(large) >= 5
    for point in large:
        assert point.taylor == pytest.approx(point.damage, rel=0.75)  # four samples of the Fisher information
    assert found.rank_correlation("taylor") > 0.9


def test_damages_not_finite_are_infinite() -> None:
    before = Answers((torch.zeros(2, 3),), True)
    after = Answers((torch.tensor([[0.0, 0, 0], [float("nan"), 0, 0]]),), True)
    found, _ = damages(before, after, 2)
    assert found.tolist() == [0.0, math.inf]
    other_shape, lost = damages(before, Answers((torch.zeros(2, 4),), True), 2)
    assert other_shape.tolist() == [math.inf, math.inf]
    assert lost is None


def test_lost_answers_with_labels_are_right_answers_lost() -> None:
    before = Answers((torch.eye(3),), True, torch.tensor([0, 1, 0]))
    after = Answers((torch.eye(3)[[1, 1, 0]],), True)
    _, lost = damages(before, after, 3)
    assert lost is not None
    assert lost.tolist() == [1.0, 0.0, -1.0]


def test_damage_is_streamed() -> None:
    values = torch.rand(10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, parts = Damage(), Damage()
    one.update(values, None)
    for part in values.split(3):
        parts.update(part, None)
    mean, error = one.compute()
    assert parts.compute() == (mean, error)
    assert mean == pytest.approx(values.mean().item())
    assert error == pytest.approx(values.std().item() / math.sqrt(10))


def test_one_image_is_too_few(network: nn.Module) -> None:
    with pytest.raises(DataError, match="1 image: a damage and its standard error need at least two"):
        swap_sensitivity(network, [(images(1), None)], to="ln")


def test_a_negative_threshold_is_refused(network: nn.Module) -> None:
    with pytest.raises(UsageError, match="harmless=-1 must not be negative"):
        swap_sensitivity(network, [(images(2), None)], harmless=-1)


def test_the_document_shows_the_worst_site_first(network: nn.Module) -> None:
    found = swap_sensitivity(network, [(images(4), None)], to="gn", all_but_one=False)
    worst = max(found.points, key=lambda point: point.damage)
    text = str(found)
    assert text.index(worst.site) < text.index(min(found.points, key=lambda point: point.damage).site)
    assert "rank correlation" in text


@pytest.mark.long
def test_a_stopped_run_goes_on_and_gives_the_same(network: nn.Module, tmp_path: Path) -> None:
    batches = [(images(3, 48, seed), None) for seed in range(3)]
    whole = swap_sensitivity(network, batches, to="ln", harmless=0)
    file = tmp_path / "swap.json"

    def stop(progress: Any) -> None:
        if progress.done > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        swap_sensitivity(network, batches, to="ln", harmless=0, resume=file, on_progress=stop)
    assert len(json.loads(file.read_text())["sums"]["batches"]) == 1
    assert swap_sensitivity(network, batches, to="ln", harmless=0, resume=file) == whole
    assert swap_sensitivity(network, batches, to="ln", harmless=0, resume=file) == whole


def test_a_file_of_other_settings_images_or_none_is_refused(network: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "swap.json"
    settings = {"to": "ln", "all_but_one": False, "resume": file}
    swap_sensitivity(network, [(images(2, 48), None)], **settings)
    with pytest.raises(UsageError, match=r"swap.json is of another network or other settings"):
        swap_sensitivity(network, [(images(2, 48), None)], **settings | {"to": "rms"})
    with pytest.raises(UsageError, match=r"swap.json is of other images"):
        swap_sensitivity(network, [(images(2, 48, 1), None)], **settings)
    file.unlink()
    os.mkfifo(file)  # nobody writes into it: reading it would not end
    with pytest.raises(CheckpointError, match=r"swap.json is not what a swap sensitivity leaves: OSError$"):
        swap_sensitivity(network, [(images(2, 48), None)], **settings)
    file.unlink()
    file.write_text("{}")
    with pytest.raises(CheckpointError, match=r"swap.json is not what a swap sensitivity leaves"):
        swap_sensitivity(network, [(images(2, 48), None)], **settings)
