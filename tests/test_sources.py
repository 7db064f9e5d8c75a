"""Every kind of batch norm is found, read and converted; whatever is none is left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise_
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct, convert_sync_batchnorm
from timm.layers.inplace_abn import InplaceAbn
from timm.layers.norm_act import freeze_batch_norm_2d
from timm.layers.split_batchnorm import SplitBatchNorm2d
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

import normsurgeon as ns
from normsurgeon.norms.batchnorm import is_batch_norm, read, why_unreadable


class Plain(nn.BatchNorm2d):
    """A subclass that changes nothing."""


class Renamed(nn.BatchNorm2d):
    """A subclass with a forward of its own that is still a batch norm."""

    def forward(self, x):
        return super().forward(x.contiguous())


class Doubling(nn.BatchNorm2d):
    """A subclass that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


SOURCES = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(8), 1),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(8), 2),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(8), 3),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(8), 2),
    "BatchNormAct2d": (lambda: BatchNormAct2d(8, act_layer=nn.SiLU), 2),
    "BatchNormAct2d without act": (lambda: BatchNormAct2d(8, apply_act=False), 2),
    "SyncBatchNormAct": (lambda: convert_sync_batchnorm(BatchNormAct2d(8)), 2),
    "FrozenBatchNormAct2d": (lambda: FrozenBatchNormAct2d(8), 2),
    "FrozenBatchNorm2d": (lambda: FrozenBatchNorm2d(8), 2),
    "timm's freeze_batch_norm_2d": (lambda: freeze_batch_norm_2d(nn.BatchNorm2d(8)), 2),
    "SplitBatchNorm2d": (lambda: SplitBatchNorm2d(8), 2),
    "subclass": (lambda: Plain(8), 2),
    "subclass with its own forward": (lambda: Renamed(8), 2),
    "without affine": (lambda: nn.BatchNorm2d(8, affine=False), 2),
}


def network(norm: nn.Module, dims: int, between: nn.Module | None = None) -> nn.Module:
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](3, 8, 3, padding=1)
    return nn.Sequential(conv, *([between] if between else []), norm, nn.Tanh())


@pytest.mark.parametrize("between", [None, nn.Sigmoid()], ids=["foldable", "not foldable"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_converts_to_affine_exactly(source, between):
    make, dims = SOURCES[source]
    model = randomise_(network(make(), dims, between)).double().eval()
    x = torch.randn(2, 3, *[9] * dims, dtype=torch.float64)
    expected = model(x)
    result = ns.convert(model, to="affine", example_inputs=x)
    assert result.counts == {"converted": 1, "kept": 0, "refused": 0}
    assert not any(is_batch_norm(module) for module in result.model.modules())
    torch.testing.assert_close(result.model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("target", ["gn", "ln", "ln2d", "in", "rms", "rms2d", "fold"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_converts_to_every_target(source, target):
    make, dims = SOURCES[source]
    x = torch.randn(2, 3, *[9] * dims)
    result = ns.convert(randomise_(network(make(), dims)).eval(), to=target, example_inputs=x)
    assert result.counts["converted"] == 1
    assert result.model(x).shape == (2, 8, *[9] * dims)


@pytest.mark.parametrize(
    ("act", "function"),
    [
        ("leaky_relu", lambda x: F.leaky_relu(x, 0.01)),
        ("elu", lambda x: F.elu(x, 0.01)),
        ("identity", lambda x: x),
    ],
)
def test_inplace_abn_is_read_with_its_activation(act, function):
    """The compiled inplace_abn package is not needed to convert away from it."""
    norm = randomise_(InplaceAbn(8, act_layer=act)).double().eval()
    model = nn.Sequential(nn.Conv2d(3, 8, 1).double(), norm)
    fixed = read(norm).fixed
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    expected = function(model[0](x) * fixed.scale.view(1, -1, 1, 1) + fixed.shift.view(1, -1, 1, 1))
    result = ns.convert(model, to="affine")
    torch.testing.assert_close(result.model(x), expected)


def test_a_subclass_that_computes_something_else_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Doubling(8))
    result = ns.convert(model, to="gn")
    assert result.counts == {"converted": 0, "kept": 0, "refused": 1}
    assert result.sites[0].reason == (
        "Doubling overrides forward, and in eval mode it is not the affine map of its buffers"
    )


def test_a_lazy_batch_norm_is_refused_until_a_dry_run_and_converted_after_it():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.LazyBatchNorm2d())
    assert "run the model once" in ns.plan(model, to="gn").decisions[0].reason
    model(torch.randn(2, 3, 4, 4))
    assert ns.plan(model, to="gn").counts["converted"] == 1


def test_without_running_statistics_the_affine_is_copied_and_this_is_said():
    norm = nn.BatchNorm2d(32, track_running_stats=False)
    nn.init.constant_(norm.weight, 3.0)
    model = nn.Sequential(nn.Conv2d(3, 32, 1), norm)
    result = ns.convert(model, to="ln")
    assert result.sites[0].whitening == "none"
    assert "no running statistics" in result.sites[0].reason
    assert torch.all(result.model[1].weight == 3.0)
    assert ns.convert(model, to="affine").counts["refused"] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_refused_with_the_reason(value):
    norm = nn.BatchNorm2d(8)
    norm.running_var[3] = value
    assert why_unreadable(norm) == "running_var holds values that are not finite"


def test_a_norm_in_training_mode_converts_by_its_running_statistics_and_stays_in_training_mode():
    model = randomise_(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))).train()
    result = ns.convert(model, to="affine")
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(result.model(x), model.eval()(x))
    assert result.model[1].training


@pytest.mark.parametrize("source", ["FrozenBatchNorm2d", "FrozenBatchNormAct2d", "without affine"])
def test_what_did_not_train_does_not_train_after(source):
    make, dims = SOURCES[source]
    result = ns.convert(network(make(), dims), to="gn")
    assert not any(p.requires_grad for p in result.model[1].parameters())


@pytest.mark.long
def test_drop_and_act_of_a_norm_act_module_survive():
    norm = BatchNormAct2d(32, act_layer=nn.Hardswish, drop_layer=nn.Dropout)
    for target in ns.TARGETS:
        layer = ns.convert(nn.Sequential(nn.Conv2d(3, 32, 1), norm), to=target).model[1]
        assert isinstance(layer.act, nn.Hardswish), target
        assert isinstance(layer.drop, nn.Dropout), target


def test_group_and_layer_norms_are_no_sources():
    for module in (
        nn.GroupNorm(2, 8),
        nn.LayerNorm(8),
        nn.InstanceNorm2d(8, track_running_stats=True),
        nn.ReLU(),
    ):
        assert not is_batch_norm(module)


def test_sync_batch_norm_act_is_recognised_before_its_base_class():
    assert isinstance(convert_sync_batchnorm(BatchNormAct2d(8)), SyncBatchNormAct)
    assert isinstance(read(convert_sync_batchnorm(BatchNormAct2d(8))).act, nn.ReLU)
