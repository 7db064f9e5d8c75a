"""A study's networks: what a cell asks for is what is built."""

from __future__ import annotations

import pytest
import torch
from timm.layers import GroupNormAct
from torch import nn

from normsurgeon.errors import LoadingError, TargetError, UsageError
from normsurgeon.models.small_resnets import SMALL
from normsurgeon.study.networks import build_network
from normsurgeon.study.records import Cell
from normsurgeon.surgery.swap_activations import is_activation, with_activation

DIGITS = {"classes": 10, "channels": 1}


@pytest.mark.parametrize(("name", "layers"), [("resnet8", 8), ("resnet14", 14), ("resnet20", 20)])
def test_the_small_resnets_are_those_of_the_paper(name: str, layers: int):
    model = SMALL[name](num_classes=10, in_chans=1)
    weighted = [m for p, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "downsample" not in p]
    assert len(weighted) == layers
    assert model.forward_features(torch.zeros(1, 1, 32, 32)).shape == (1, 64, 8, 8)  # He et al., section 4.2
    assert model(torch.zeros(1, 1, 28, 28)).shape == (1, 10)


def test_the_norms_of_one_seed_start_from_the_same_weights_and_other_seeds_from_others():
    nets = {norm: build_network(Cell("resnet8", "digits", norm=norm), **DIGITS) for norm in ("bn", "gn", "ln", "rms")}
    other = build_network(Cell("resnet8", "digits", norm="bn", seed=1), **DIGITS)
    for net in nets.values():
        assert torch.equal(net.layer2[0].conv1.weight, nets["bn"].layer2[0].conv1.weight)
        assert torch.equal(net.fc.weight, nets["bn"].fc.weight)
    assert not torch.equal(other.fc.weight, nets["bn"].fc.weight)


def test_building_a_network_leaves_the_callers_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_network(Cell("resnet8", "digits", norm="gn"), **DIGITS)
    assert torch.equal(torch.rand(3), expected)


def test_every_batch_norm_is_swapped_and_the_groups_are_those_asked_for():
    net = build_network(Cell("test_efficientnet", "digits", norm="gn:4"), **DIGITS)
    norms = [m for m in net.modules() if isinstance(m, (nn.GroupNorm, GroupNormAct))]
    assert norms
    assert {m.num_groups for m in norms} == {4}
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())


def test_groups_that_do_not_divide_are_an_error_that_names_the_layer():
    with pytest.raises(TargetError, match=r"^3 groups do not divide the 16 channels of bn1; try a divisor of them$"):
        build_network(Cell("resnet8", "digits", norm="gn:3"), **DIGITS)


def test_activations_are_swapped_and_gates_are_not():
    model = build_network(Cell("test_efficientnet_gn", "digits"), **DIGITS)
    gates = [type(m) for p, m in model.named_modules() if p.endswith("gate")]
    swapped = with_activation(model, "gelu")
    assert [type(m) for p, m in swapped.named_modules() if p.endswith("gate")] == gates
    assert {type(m).__name__ for m in swapped.modules() if is_activation(m)} <= {"GELU", "Identity"}
    assert torch.isfinite(swapped(torch.zeros(2, 1, 32, 32))).all()


def test_an_activation_changes_what_the_network_computes_and_not_its_weights():
    relu = build_network(Cell("resnet8", "digits"), **DIGITS).eval()
    silu = build_network(Cell("resnet8", "digits", activation="silu"), **DIGITS).eval()
    images = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(relu.parameters(), silu.parameters(), strict=True))
    assert not torch.allclose(relu(images), silu(images))


def test_what_has_no_activation_module_cannot_be_given_another():
    with pytest.raises(UsageError, match=r"^the activations of Linear are no modules, and cannot be swapped for silu$"):
        with_activation(nn.Linear(2, 2), "silu")
    with pytest.raises(UsageError, match=r"^timm has no activation 'sulu'; try relu, silu, gelu or leaky_relu$"):
        with_activation(SMALL["resnet8"](), "sulu")


def test_small_resnets_have_no_pretrained_weights_to_start_from():
    cell = Cell("resnet8", "digits", start="converted")
    with pytest.raises(
        UsageError,
        match=r"^there are no pretrained weights of resnet8; try start: scratch, or a file that finetune wrote$",
    ):
        build_network(cell, **DIGITS)


def test_an_unknown_network_is_a_loading_error():
    with pytest.raises(LoadingError, match="resnot8"):
        build_network(Cell("resnot8", "digits"), **DIGITS)


def test_a_converted_cell_keeps_the_function_of_its_file(tmp_path):
    import normsurgeon as ns

    torch.manual_seed(0)
    original = ns.load("test_resnet", pretrained=False, num_classes=10, in_chans=1)
    original.train()
    with torch.no_grad():
        for _ in range(30):  # running statistics that are those of the images
            original(torch.rand(16, 1, 32, 32))
    original.eval()
    path = tmp_path / "bn.safetensors"
    ns.save(original, path)
    images = torch.rand(64, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    wanted = original(images)
    assert torch.equal(build_network(Cell(str(path), "digits", start="converted"), **DIGITS)(images), wanted)
    exact = build_network(Cell(str(path), "digits", start="converted", norm="affine"), **DIGITS)
    torch.testing.assert_close(exact(images), wanted, rtol=1e-4, atol=1e-4)
    swapped = build_network(Cell(str(path), "digits", start="converted", norm="ln"), **DIGITS)
    torch.testing.assert_close(swapped(images), ns.convert(original, to="ln").model(images))
