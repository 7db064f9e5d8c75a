"""swap_layers: any layer for any other, with the guarantees of a conversion."""

from __future__ import annotations

import pytest
import timm
import torch
from conftest import ConvNet
from torch import nn

import normsurgeon as ns
from normsurgeon.errors import ConversionError, PatternError, UsageError


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
    with pytest.raises(UsageError, match=r"build returned dict for conv1; it must return an nn\.Module"):
        ns.swap_layers(ConvNet(), nn.Conv2d, dict)
    with pytest.raises(UsageError, match=r"build returned NoneType for conv1; it must return an nn\.Module"):
        ns.swap_layers(ConvNet(), nn.Conv2d, lambda old: None)


@pytest.mark.parametrize("build", [nn.SiLU, nn.SiLU(), lambda old: nn.SiLU()])
def test_a_class_a_layer_and_a_function_all_say_what_takes_the_place(build):
    swap = ns.swap_layers(ConvNet(), nn.ReLU, build)
    assert type(swap.model.relu) is nn.SiLU
    assert swap.model(torch.zeros(1, 3, 8, 8)).shape == (1, 10)


def test_a_class_gets_the_old_layers_settings_of_the_same_name():
    class Fast(nn.Conv2d):
        pass

    old = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, bias=False), nn.ReLU(inplace=True))
    new = ns.swap_layers(ns.swap_layers(old, nn.Conv2d, Fast).model, nn.ReLU, nn.LeakyReLU).model
    assert (type(new[0]), new[0].extra_repr(), new[0].bias) == (Fast, old[0].extra_repr(), None)
    assert new[1].inplace


def test_a_class_that_takes_a_layer_gets_the_old_one():
    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    model = ConvNet()
    assert isinstance(ns.swap_layers(model, nn.Conv2d, Around).model.conv1.inner, nn.Conv2d)


def test_no_place_shares_the_weights_of_a_layer_that_was_given():
    given = nn.PReLU()
    model = ns.swap_layers(nn.Sequential(nn.ReLU(), nn.ReLU()), nn.ReLU, given).model
    assert len({id(model[0].weight), id(model[1].weight), id(given.weight)}) == 3


def test_an_instance_norm_gets_no_statistics_that_it_has_not_seen():
    model = ns.swap_layers(nn.Sequential(nn.BatchNorm2d(4)), nn.BatchNorm2d, nn.InstanceNorm2d).model
    assert (model[0].num_features, model[0].running_mean) == (4, None)


@pytest.mark.parametrize(
    ("build", "line"),
    [
        (
            nn.GroupNorm,
            r"^a GroupNorm cannot be made from the settings of bn1, a BatchNorm2d: it also needs num_groups, "
            r"num_channels; give a function instead, as in lambda old: GroupNorm\(…\)$",
        ),
        (
            nn.LayerNorm,
            r"^a LayerNorm cannot be made from the settings of bn1, a BatchNorm2d: ",
        ),
    ],
)
def test_a_class_that_needs_other_settings_names_them(build, line):
    with pytest.raises(UsageError, match=line):
        ns.swap_layers(ConvNet(), nn.BatchNorm2d, build)


def test_what_swapping_returns_can_be_converted_and_saved(tmp_path):
    swap = ns.swap_layers(ConvNet().eval(), nn.ReLU, nn.SiLU)
    said = []
    saved = ns.load(ns.save(swap, tmp_path / "swap.pt", on_message=said.append), model=swap.model)
    assert type(saved.relu) is nn.SiLU
    result = ns.convert(swap, to="gn", verdict=False, example_inputs=torch.zeros(2, 3, 8, 8))
    assert isinstance(result.model.bn1, nn.GroupNorm)
    assert isinstance(result.model.relu, nn.SiLU)
    assert isinstance(swap.model.bn1, nn.BatchNorm2d)
    assert said == [
        f"{tmp_path / 'swap.pt'}: ConvNet is none of timm's or torchvision's networks, and its architecture is "
        "not in the file: loading it takes load(path, model=one built alike)"
    ]


@pytest.mark.parametrize("convert", [ns.convert, ns.convert_, ns.plan, lambda model, to: ns.inspect(model)])
def test_a_name_is_not_taken_for_a_network(convert):
    with pytest.raises(ConversionError, match=r"^'resnet18' is a name, not a module: convert normsurgeon.load"):
        convert("resnet18", to="gn")


def test_what_is_no_network_cannot_be_saved(tmp_path):
    with pytest.raises(UsageError, match=r"^a str is no network: save takes a conversion or a torch.nn.Module$"):
        ns.save("resnet18", tmp_path / "net.pt")
