"""Which outputs are read, when, and as what shape; and that nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from conftest import ConvNet, randomise_
from torch import nn

import normsurgeon as ns
from normsurgeon.analysis.choosing import choose_layers
from normsurgeon.analysis.streaming import captured

STATISTICS = ["statistics"]


def test_an_output_is_read_before_an_in_place_activation_overwrites_it():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(inplace=True), nn.BatchNorm2d(4)).eval()
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        expected = model[0](images)
    (record,) = ns.analyze(model, [images], only=STATISTICS, layers=["0"]).statistics
    assert record.min == pytest.approx(expected.min().item())
    assert record.min < 0


def test_an_input_that_was_overwritten_in_place_is_read_again():
    """The group statistics of a norm come from its producer's output only where that is still the norm's input."""
    model = nn.Sequential(nn.Conv2d(1, 16, 1), nn.ReLU(inplace=True), nn.GroupNorm(1, 16)).eval()
    images = torch.randn(6, 1, 8, 8) * torch.linspace(0.5, 3, 6).view(-1, 1, 1, 1)
    with torch.no_grad():
        x = model[1](model[0](images)).double().numpy().reshape(6, -1)
    record = ns.analyze(model, [images], only=STATISTICS).statistics[-1]
    assert record.group_fluctuation == pytest.approx(x.std(1).std() / x.std(1).mean(), rel=1e-5)


def test_every_call_of_a_shared_module_counts():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(self.conv(x))

    model = Twice().eval()
    images = torch.randn(4, 3, 5, 5)
    with torch.no_grad():
        first = model.conv(images)
        both = torch.cat([first, model.conv(first)]).double()
    (record,) = ns.analyze(model, images.split(3), only=STATISTICS).statistics
    assert (record.calls, record.values) == (2, both.numel())
    assert record.mean == pytest.approx(both.mean().item(), rel=1e-5)


@pytest.mark.parametrize("wrap", [lambda x: (x, None), lambda x: {"out": x}, lambda x: [None, x]])
def test_outputs_in_tuples_lists_and_dicts_are_found(wrap):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(x)

    class Inner(nn.Module):
        def forward(self, x):
            return wrap(x * 2)

    images = torch.randn(4, 3, 5, 5)
    (record,) = ns.analyze(Wrapped(), [images], only=STATISTICS, layers=["inner"]).statistics
    assert record.mean == pytest.approx(2 * images.mean().item(), rel=1e-4)


def test_channels_last_memory_half_precision_and_autocast_are_read_rightly(convnet):
    images = torch.randn(4, 3, 16, 16)
    plain = ns.analyze(convnet, [images], only=STATISTICS).statistics
    last = ns.analyze(
        convnet.to(memory_format=torch.channels_last), [images.to(memory_format=torch.channels_last)], only=STATISTICS
    ).statistics
    for a, b in zip(plain, last, strict=True):
        assert (a.layer, a.shape) == (b.layer, b.shape)
        assert b.var == pytest.approx(a.var, rel=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ns.analyze(convnet, [images], only=STATISTICS).statistics
    for a, b in zip(plain, cast, strict=True):
        assert b.var == pytest.approx(a.var, rel=0.05)


def test_no_hook_is_left_behind_after_an_error_or_an_interruption(convnet):
    layers = choose_layers(convnet)
    for error in (ValueError, KeyboardInterrupt):

        def fail(layer, x, error=error):
            raise error("stop")

        with pytest.raises(error, match="stop"), captured(layers, fail, fail):
            convnet(torch.randn(1, 3, 8, 8))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in convnet.modules())


def test_hooks_are_registered_in_one_file_alone():
    sources = Path(ns.__file__).parent.rglob("*.py")
    assert [path.name for path in sources if "register_forward" in path.read_text(encoding="utf-8")] == ["hooks.py"]


def test_the_model_comes_back_as_it_was(convnet):
    convnet.train()
    convnet.bn2.eval()
    before = {name: tensor.clone() for name, tensor in convnet.state_dict().items()}
    ns.analyze(convnet, [torch.randn(4, 3, 8, 8)], only=["statistics", "similarity"])
    assert convnet.training
    assert not convnet.bn2.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in convnet.state_dict().items())
    assert all(parameter.grad is None for parameter in convnet.parameters())


def test_positions_folded_into_the_batch_are_given_back_to_their_images():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x):
            tokens = x.flatten(2).transpose(1, 2)
            return self.norm(tokens.flatten(0, 1)).reshape_as(tokens)

    model = randomise_(Folded()).eval()
    images = torch.randn(4, 6, 3, 3)
    with torch.no_grad():
        y = model(images).double().numpy()  # (N, T, C)
    (record,) = ns.analyze(model, [images], only=STATISTICS, layers=["norm"]).statistics
    assert record.between_var == pytest.approx(y.mean(1).var(0).mean(), rel=1e-5)
    assert record.within_var == pytest.approx(y.var(1).mean(), rel=1e-5)


def test_convnet_outputs_are_listed_in_the_order_of_the_forward_pass():
    report = ns.analyze(ConvNet().eval(), [torch.randn(4, 3, 8, 8)], only=STATISTICS)
    assert [record.layer for record in report.statistics] == ["conv1", "bn1", "conv2", "bn2", "bn3", "head"]


def test_layers_are_chosen_by_glob_or_kind():
    model = timm.create_model("test_resnet")
    assert [layer.name for layer in choose_layers(model, kinds=["block"])] == [
        "layer1.0", "layer2.0", "layer3.0", "layer4.0",
    ]  # fmt: skip
    assert [layer.name for layer in choose_layers(model, ["layer1.*.act?", "fc"])] == [
        "layer1.0.act1",
        "layer1.0.act2",
        "fc",
    ]
    with pytest.raises(
        ns.NormSurgeonError, match=r"^the pattern 'layer9\.\*' matches no module; there are: conv1\.0, "
    ):
        choose_layers(model, ["layer9.*"])
    with pytest.raises(
        ns.NormSurgeonError, match=r"^there is no kind of layer 'pool'; try norm, convolution, linear, block$"
    ):
        choose_layers(model, kinds=["pool"])
