"""swap_layers: any layer for any other, with the guarantees of a conversion."""

from __future__ import annotations

import pytest
import timm
import torch
from conftest import ConvNet
from torch import nn

import normsurgeon as ns
from normsurgeon.errors import PatternError, UsageError


def test_relu_becomes_silu_everywhere():
    model = timm.create_model("test_resnet")
    swap = ns.swap_layers(model, nn.ReLU, lambda relu: nn.SiLU(inplace=relu.inplace))
    assert not any(isinstance(m, nn.ReLU) for m in swap.model.modules())
    assert any(isinstance(m, nn.ReLU) for m in model.modules())
    assert swap.model(torch.randn(2, 3, 160, 160)).shape == (2, 1000)


@pytest.mark.parametrize(
    "match", ["conv*", nn.Conv2d, (nn.Conv2d, nn.Conv1d), lambda name, module: name.startswith("conv")]
)
def test_layers_are_chosen_by_glob_class_or_function(match):
    swap = ns.swap_layers(ConvNet(), match, lambda old: nn.Conv2d(old.in_channels, 32, 5, padding=2))
    assert swap.swapped == ("conv1", "conv2")
    assert swap.model.conv1.kernel_size == (5, 5)


def test_build_may_take_the_name_too():
    names = []
    ns.swap_layers(ConvNet(), nn.Conv2d, lambda old, name: names.append(name) or old)
    assert names == ["conv1", "conv2"]


def test_returning_the_old_layer_leaves_it_in_place():
    swap = ns.swap_layers(ConvNet(), nn.Conv2d, lambda old: nn.Identity() if old.bias is None else old)
    assert swap.swapped == ("conv1",)
    assert isinstance(swap.model.conv2, nn.Conv2d)


def test_a_shared_layer_is_built_once_and_stays_shared():
    model = ConvNet()
    model.again = model.relu
    built = []
    swap = ns.swap_layers(model, nn.ReLU, lambda old: built.append(1) or nn.GELU())
    assert len(built) == 1
    assert swap.model.again is swap.model.relu


def test_a_new_layer_takes_dtype_and_training_flag():
    model = ConvNet().double().eval()
    swap = ns.swap_layers(model, "conv2", lambda old: nn.Conv2d(32, 32, 1))
    assert swap.model.conv2.weight.dtype == torch.float64
    assert not swap.model.conv2.training


def test_an_optimizer_follows():
    model = ConvNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    swap = ns.swap_layers(model, "head", lambda old: nn.Linear(32, 5), optimizer=optimizer)
    assert swap.optimizer.param_groups[0]["params"][-2:] == list(swap.model.head.parameters())


def test_what_matches_nothing_shows_what_was_there():
    with pytest.raises(PatternError, match="'nope' matches no layer; there are: conv1, bn1, relu, conv2"):
        ns.swap_layers(ConvNet(), "nope", lambda old: old)
    with pytest.raises(UsageError, match="its layers are: BatchNorm2d, Conv2d, ConvNet, Linear, ReLU"):
        ns.swap_layers(ConvNet(), nn.Conv3d, lambda old: old)


def test_build_must_return_a_module():
    with pytest.raises(UsageError, match=r"build returned NoneType for conv1; it must return an nn\.Module"):
        ns.swap_layers(ConvNet(), nn.Conv2d, lambda old: None)
