"""What is frozen stays frozen: running statistics move only where a norm trains."""

from __future__ import annotations

import copy
import signal

import pytest
import timm
import torch
from conftest import randomise_
from timm.layers import BatchNormAct2d, EvoNorm2dB0
from timm.layers.split_batchnorm import SplitBatchNorm2d
from torch import nn

import normsurgeon as ns
from normsurgeon.errors import TrainingStopped
from normsurgeon.finetuning.trainable import choose_trainable_, frozen_norms
from normsurgeon.norms.batchnorm import is_batch_norm

STEPS = {"steps": 3, "device": "cpu", "lr": 1e-2}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def batches(count=8, size=12):
    x = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 3 + 1
    return [(x, torch.arange(count) % 10)]


def moved(before, after):
    """The norms of which a statistic changed."""
    now = after.state_dict()
    return {
        key.rpartition(".")[0]
        for key, value in before.state_dict().items()
        if key.rpartition(".")[2] in STATISTICS and not torch.equal(value, now[key])
    }


def names(model):
    return {name for name, module in model.named_modules() if is_batch_norm(module)}


def tuned(network, **settings):
    return ns.finetune(network, batches(), **{**STEPS, **settings}).model


def test_all_statistics_move_where_everything_trains(convnet):
    assert moved(convnet, tuned(convnet)) == {"bn1", "bn2", "bn3"}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ema": 0.5},
        {"grad_accum": 3},
        {"channels_last": True},
        {"precision": "bf16"},
        {"drop": 0.5, "drop_path": 0.2},
    ],
    ids=str,
)
def test_no_statistics_move_where_only_the_classifier_trains(settings):
    torch.manual_seed(0)
    network = randomise_(timm.create_model("test_resnet", num_classes=10)).train()
    result = ns.finetune(
        network, batches(size=32), batches(size=32), train_what="fc.*", keep="last", **STEPS, **settings
    )
    assert moved(network, result.model) == set()
    assert not torch.equal(result.model.fc.weight, network.fc.weight)


def test_frozen_norms_give_what_they_give_in_eval_mode(convnet):
    convnet.double()
    [(x, y)] = batches()
    by_hand = copy.deepcopy(convnet)
    nn.functional.cross_entropy(by_hand(x.double()), y).backward()
    plain = {"opt": "momentum", "momentum": 0.0, "weight_decay": 0, "clip_grad": None, "sched": "constant"}
    for norm in (convnet.bn1, convnet.bn2, convnet.bn3):
        norm.requires_grad_(False)
    settings = {"steps": 1, "lr": 0.1, "warmup_epochs": 0.0, "device": "cpu", **plain}
    after = ns.finetune(convnet, [(x.double(), y)], **settings).model
    for name in ("conv1", "conv2", "head"):
        weight = by_hand.get_submodule(name).weight
        assert torch.allclose(after.get_submodule(name).weight, weight - 0.1 * weight.grad, atol=1e-12), name


def test_norms_that_the_caller_froze_do_not_move_and_the_others_do(convnet):
    convnet.bn1.requires_grad_(False)
    assert moved(convnet, tuned(convnet)) == {"bn2", "bn3"}


def test_one_parameter_that_trains_is_enough_to_move(convnet):
    convnet.bn1.weight.requires_grad_(False)
    assert moved(convnet, tuned(convnet)) == {"bn1", "bn2", "bn3"}
    assert moved(convnet, tuned(convnet, train_what="bn2.bias")) == {"bn2"}


def test_norms_in_eval_mode_in_a_network_in_training_mode_do_not_move(convnet):
    convnet.train()
    convnet.bn2.eval()
    after = tuned(convnet)
    assert moved(convnet, after) == {"bn1", "bn3"}
    assert not torch.equal(after.bn2.weight, convnet.bn2.weight)  # its parameters train
    assert [module.training for module in after.modules()] == [module.training for module in convnet.modules()]


def test_what_is_frozen_stays_so_after_a_validation(convnet):
    convnet.bn1.requires_grad_(False)
    after = ns.finetune(convnet, batches(), batches(), keep="last", **STEPS).model
    assert moved(convnet, after) == {"bn2", "bn3"}


class FitsFour(nn.Module):
    """A device that holds no more than four images."""

    num_classes = 10

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        if len(x) > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB")
        return self.net(x)


def test_a_network_in_eval_mode_in_a_wrapper_in_training_mode_gets_a_message(convnet):
    def messages(network, **settings):
        said = []
        ns.finetune(network, batches(4), on_message=said.append, **STEPS, **settings)
        return said

    assert messages(FitsFour(convnet)) == [
        "all 3 batch norms are in eval mode in a network in training mode, and keep their running statistics; call its "
        "train() first to have them move"
    ]
    assert messages(FitsFour(convnet), train_what="*.head.*") == []
    assert messages(FitsFour(convnet).eval()) == messages(FitsFour(convnet).train()) == []


def test_what_is_frozen_stays_so_when_memory_runs_out(convnet):
    convnet.bn1.requires_grad_(False)
    network = FitsFour(convnet).eval()
    after = ns.finetune(network, batches(), on_message=lambda text: None, **STEPS).model
    assert moved(network, after) == {"net.bn2", "net.bn3"}


def test_batch_norms_that_the_plan_kept_train_like_others(convnet):
    def kept():
        return ns.convert(convnet, to="gn", keep=["bn[12]"], example_inputs=torch.zeros(1, 3, 12, 12))

    result = kept()
    given = result.model
    assert names(given) == {"bn1", "bn2"}
    assert moved(given, tuned(result)) == {"bn1", "bn2"}
    result = kept()
    given = result.model
    given.bn1.requires_grad_(False)
    assert moved(given, tuned(result)) == {"bn2"}
    result = kept()
    given = result.model.train()
    given.bn2.eval()
    assert moved(given, tuned(result)) == {"bn1"}


def test_a_norm_without_parameters_is_frozen_by_its_mode_alone(convnet):
    convnet.bn1 = nn.BatchNorm2d(32, affine=False)
    assert "bn1" in moved(convnet, tuned(convnet.eval(), train_what="head.*"))
    convnet.train().bn1.eval()
    assert moved(convnet, tuned(convnet)) == {"bn2", "bn3"}


@pytest.mark.parametrize("again", ["as it was", "moving average"])
def test_resuming_freezes_the_same(convnet, tmp_path, again):
    convnet.train()
    convnet.bn1.requires_grad_(False)
    convnet.bn2.eval()
    settings = {**STEPS, "steps": 4, "on_message": lambda text: None, "ema": None if again == "as it was" else 0.5}
    whole = ns.finetune(convnet, batches(), **settings).model

    def stop(update):
        if update.done == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(TrainingStopped, match="SIGINT"):
        ns.finetune(convnet, batches(), output=tmp_path, on_progress=stop, **settings)
    resumed = ns.finetune(convnet, batches(), output=tmp_path, resume=True, **settings).model
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))
    assert moved(convnet, resumed) == {"bn3"}


class Pixelwise(nn.Module):
    """Somebody's norm whose statistics are of another shape."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 1, 1))
        self.register_buffer("running_mean", torch.zeros(4, 1, 1))


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        EvoNorm2dB0(4),
        Pixelwise(),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_every_norm_with_running_statistics_is_frozen_with_its_parameters(norm):
    network = nn.Sequential(norm, nn.Linear(4, 2))
    assert frozen_norms(network.eval()) == ()
    choose_trainable_(network, "1.*")
    assert frozen_norms(network) == ("0",)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.InstanceNorm2d(4, affine=True), nn.Dropout()])
def test_norms_without_running_statistics_and_dropout_are_left_as_they_are(norm):
    network = nn.Sequential(norm, nn.Linear(4, 2)).train()
    norm.eval().requires_grad_(False)
    assert frozen_norms(network) == ()


def test_the_parameters_of_a_fused_activation_are_not_the_norms():
    norm = BatchNormAct2d(4, act_layer=nn.PReLU)
    network = nn.Sequential(norm, nn.Linear(4, 2))
    choose_trainable_(network, "0.act.*")
    assert frozen_norms(network) == ("0",)


def test_a_parametrized_weight_is_the_norms_own():
    norm = nn.utils.parametrizations.weight_norm(nn.BatchNorm1d(4), dim=None)
    network = nn.Sequential(norm, nn.Linear(4, 2))
    norm.bias.requires_grad_(False)
    assert frozen_norms(network) == ()
    choose_trainable_(network, "1.*")
    assert frozen_norms(network) == ("0",)


def test_batch_norms_within_one_are_frozen_on_their_own():
    network = nn.Sequential(SplitBatchNorm2d(4, num_splits=2), nn.Linear(4, 2))
    choose_trainable_(network, "0.aux_bn.*")
    assert frozen_norms(network) == ("0",)


class Watched(nn.Module):
    """Tells which of its dropouts drop."""

    num_classes = 10

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)
        self.norm = BatchNormAct2d(4, drop_layer=nn.Dropout)
        self.drop = nn.Dropout()
        self.seen = []

    def forward(self, x):
        if self.training:
            self.seen.append((self.norm.training, self.norm.drop.training, self.drop.training))
        return self.head(self.drop(self.norm(self.conv(x)).mean((2, 3))))


def test_dropout_goes_on_also_within_a_frozen_norm():
    network, seen = Watched(), []
    network.seen = Shared(seen)
    tuned(network, train_what="head.*")
    assert set(seen) == {(False, True, True)}


class Shared:
    """Hands what copies of a network append to one list."""

    def __init__(self, target):
        self.append = target.append

    def __deepcopy__(self, memo):
        return self
