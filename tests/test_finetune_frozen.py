"""What is frozen stays frozen: running statistics move only where a batch norm trains."""

from __future__ import annotations

import signal

import pytest
import timm
import torch
from conftest import randomise_
from torch import nn

import normsurgeon as ns
from normsurgeon.errors import TrainingError, TrainingStopped
from normsurgeon.norms.sources import is_batch_norm

STEPS = {"steps": 3, "device": "cpu", "lr": 1e-2}


def batches(count: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 3 + 1
    return [(images, torch.arange(count) % 10)]


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return randomise_(timm.create_model("test_resnet", num_classes=10)).eval()


def moved(before: nn.Module, after: nn.Module) -> set[str]:
    """The batch norms whose buffers changed."""
    modules = dict(after.named_modules())
    return {
        name
        for name, module in before.named_modules()
        if is_batch_norm(module) and not all(map(torch.equal, module.buffers(), modules[name].buffers()))
    }


def names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if is_batch_norm(module)}


def test_all_statistics_move_where_everything_trains(network):
    assert moved(network, ns.finetune(network, batches(), **STEPS).model) == names(network)


def test_no_statistics_move_where_only_the_classifier_trains(network):
    tuned = ns.finetune(network, batches(), train_what="fc.*", **STEPS).model
    assert moved(network, tuned) == set()
    assert not torch.equal(tuned.fc.weight, network.fc.weight)


def test_norms_that_the_caller_froze_do_not_move_and_the_others_do(network):
    network.bn1.requires_grad_(False)
    assert moved(network, ns.finetune(network, batches(), **STEPS).model) == names(network) - {"bn1"}


def test_one_parameter_that_trains_is_enough_to_move(network):
    network.bn1.weight.requires_grad_(False)
    assert "bn1" in moved(network, ns.finetune(network, batches(), **STEPS).model)


def test_norms_in_eval_mode_in_a_network_in_training_mode_do_not_move(network):
    network.train()
    network.layer1.eval()
    tuned = ns.finetune(network, batches(), **STEPS).model
    assert moved(network, tuned) == {name for name in names(network) if not name.startswith("layer1")}


def test_what_is_frozen_stays_so_after_a_validation(network):
    network.bn1.requires_grad_(False)
    tuned = ns.finetune(network, batches(), batches(), keep="last", **STEPS).model
    assert moved(network, tuned) == names(network) - {"bn1"}


def test_batch_norms_that_the_plan_kept_train_as_before(network):
    result = ns.convert(network, to="gn", keep=["bn1"])
    assert moved(network, ns.finetune(result, batches(), **STEPS).model) >= {"bn1"}
    frozen = ns.convert(network, to="gn", keep=["bn1"])
    frozen.model.bn1.requires_grad_(False)
    assert torch.equal(ns.finetune(frozen, batches(), **STEPS).model.bn1.running_mean, network.bn1.running_mean)


def test_resuming_freezes_the_same(network, tmp_path):
    network.bn1.requires_grad_(False)
    settings = {**STEPS, "steps": 4, "say": print}
    whole = ns.finetune(network, batches(), **settings).model

    def stop(update):
        if update["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(TrainingStopped, match="SIGINT"):
        ns.finetune(network, batches(), output=tmp_path, on_progress=stop, **settings)
    again = ns.finetune(network, batches(), output=tmp_path, resume=True, **settings).model
    assert all(map(torch.equal, whole.state_dict().values(), again.state_dict().values()))


class Pooled(nn.Module):
    """A batch norm on pooled features, as projection heads have it."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm1d(4), nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x).mean((2, 3))))


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 2, "grad_accum": 2}])
def test_a_batch_of_one_at_a_batch_norm_is_one_line_that_names_the_layer(options):
    data = batches(options["batch_size"])
    match = (
        r"^norm \(BatchNorm1d\) gets one value a channel, which has no variance to train on; try a larger batch_size "
        r"\(with grad_accum, each part counts\), freeze it \(its eval\(\), in a model in training mode\), or "
        r"convert it$"
    )
    with pytest.raises(TrainingError, match=match):
        ns.finetune(Pooled(), data, **STEPS, **options)


def test_a_frozen_batch_norm_takes_a_batch_of_one():
    network = Pooled().train()
    network.norm.eval()
    assert ns.finetune(network, batches(1), batch_size=1, **STEPS).steps == 3
