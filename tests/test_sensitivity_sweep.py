"""sweep_norms(): each point is what changing that one setting by hand does, and every layer gets its setting back."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from conftest import ConvNet, randomise_
from timm.layers import GroupNorm1, GroupNormAct, LayerNorm2d, RmsNorm, RmsNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

import normsurgeon as ns
from normsurgeon.analysis.sensitivity.changes import changed, sweep_norms
from normsurgeon.errors import PatternError, UsageError


class Norms(nn.Module):
    """One norm of every kind, on 12 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3)
        self.bn = nn.BatchNorm2d(12)
        self.gn = nn.GroupNorm(3, 12, eps=1e-3)
        self.gna = GroupNormAct(12, num_groups=4)
        self.gn1 = GroupNorm1(12, affine=False)
        self.ln = LayerNorm2d(12)
        self.rms = RmsNorm2d(12)
        self.plain = nn.InstanceNorm2d(12)
        self.last = RmsNorm(12)
        self.default = nn.RMSNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(self.rms(self.ln(self.gn1(self.gna(self.gn(self.bn(self.stem(x))))))) + 1)
        return self.head(self.default(self.last((x * x.abs()).mean((2, 3)))))


@pytest.fixture
def norms() -> Norms:
    torch.manual_seed(0)
    return randomise_(Norms()).eval()


def batches(size: int = 6, labels: bool = True):
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(6, 3, 8, 8, generator=generator)
    answers = torch.randint(0, 5, (6,), generator=generator)
    return [(x, y if labels else None) for x, y in zip(images.split(size), answers.split(size), strict=True)]


def test_every_norm_is_swept_over_what_it_has(norms):
    found: dict[str, dict[str, list[float]]] = {}
    for point in sweep_norms(norms, batches()):
        found.setdefault(point.layer, {}).setdefault(point.setting, []).append(point.value)
    scale = [0.9, 1.1]
    assert found == {
        "bn": {"eps": [1e-6, 1e-4, 1e-2], "scale": scale},
        "gn": {"eps": [1e-4, 1e-2, 1.0], "groups": [1, 2, 4, 6, 12], "scale": scale},
        "gna": {"eps": [1e-6, 1e-4, 1e-2], "groups": [1, 2, 3, 6, 12], "scale": scale},
        "gn1": {"eps": [1e-6, 1e-4, 1e-2], "groups": [2, 3, 4, 6, 12]},
        "ln": {"eps": [1e-7, 1e-5, 1e-3], "scale": scale},
        "rms": {"eps": [1e-7, 1e-5, 1e-3], "scale": scale},
        "plain": {"eps": [1e-6, 1e-4, 1e-2]},
        "last": {"eps": [1e-7, 1e-5, 1e-3], "scale": scale},
        "default": {"scale": scale},
    }


@pytest.mark.parametrize("size", [2, 6])
def test_a_point_is_what_the_same_change_by_hand_does(norms, size):
    images, labels = batches()[0]
    before = norms(images).double()
    for point in sweep_norms(norms, batches(size), layers=["bn", "gn"]):
        twin = copy.deepcopy(norms)
        layer = twin.get_submodule(point.layer)
        if point.setting == "scale":
            layer.weight.data *= point.value
        else:
            setattr(layer, {"eps": "eps", "groups": "num_groups"}[point.setting], point.value)
        after = twin(images).double()
        change = F.cross_entropy(after, labels) - F.cross_entropy(before, labels)
        p = before.softmax(1)
        kl = (p * (before.log_softmax(1) - after.log_softmax(1))).sum(1).mean()
        assert point.loss_change == pytest.approx(change.item(), abs=1e-6)
        assert point.kl == pytest.approx(kl.item(), abs=1e-6)
        assert point.kl >= 0


def test_another_number_of_groups_or_a_large_eps_does_change_something(norms):
    points = {(point.layer, point.setting, point.value): point.kl for point in sweep_norms(norms, batches())}
    assert points["gna", "groups", 12] > 1e-4
    assert points["gn", "eps", 1.0] > 1e-6
    assert points["gn", "eps", 1.0] > points["gn", "eps", 1e-2]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_every_layer_gets_its_setting_back_also_after_an_error(norms, error):
    norms.train()
    passes = []

    def fail(*_):
        passes.append(1)
        if len(passes) == 20:
            raise error("broken")

    state = {name: tensor.clone() for name, tensor in norms.state_dict().items()}
    settings = [(getattr(m, "eps", 0), getattr(m, "num_groups", 0), m.training) for m in norms.modules()]
    sweep_norms(norms, batches())
    hook = norms.head.register_forward_hook(fail)
    with pytest.raises(error, match="broken"):
        sweep_norms(norms, batches())
    hook.remove()
    assert settings == [(getattr(m, "eps", 0), getattr(m, "num_groups", 0), m.training) for m in norms.modules()]
    assert all(torch.equal(state[name], tensor) for name, tensor in norms.state_dict().items())


def test_a_setting_is_changed_inside_and_own_again_outside(norms):
    norms.bn.weight.data[0] = 0.1
    for layer, setting, value, read in (
        (norms.gn, "groups", 12, lambda: norms.gn.num_groups),
        (norms.bn, "eps", 0.5, lambda: norms.bn.eps),
        (norms.bn, "scale", 0.9, lambda: norms.bn.weight[0].item()),
    ):
        own = read()
        with changed(layer, setting, value):
            assert read() == pytest.approx(own * 0.9 if setting == "scale" else value)
        assert read() == own


def test_without_labels_the_network_s_own_answer_is_the_reference(norms):
    images, _ = batches()[0]
    answers = norms(images).argmax(1)
    assert sweep_norms(norms, batches(labels=False)) == sweep_norms(norms, [(images, answers)])


def test_a_converted_network_is_swept():
    torch.manual_seed(0)
    network = randomise_(timm.create_model("test_resnet", num_classes=5))
    model = ns.convert(network, to="gn", example_inputs=torch.zeros(2, 3, 32, 32), verdict=False).model
    points = sweep_norms(model, batches(), layers=["layer4.0.bn1"])
    assert {point.setting for point in points} == {"eps", "groups", "scale"}
    assert all(point.kl >= 0 for point in points)
    affine = ns.convert(randomise_(ConvNet()), to="affine").model
    assert {point.setting for point in sweep_norms(affine, batches())} == {"scale"}


def test_a_setting_that_breaks_the_network_has_no_value(norms):
    class Overflowing(Norms):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / (self.bn.eps < 1e-3)

    torch.manual_seed(0)
    points = sweep_norms(randomise_(Overflowing()), batches(), layers=["bn"])
    assert [point.kl is None for point in points] == [False, False, True, False, False]
    assert points[2].loss_change is None


def test_what_cannot_be_swept_is_refused(norms):
    with pytest.raises(PatternError, match=r"Norms has no norm layer 'gm'; did you mean gn\?$"):
        sweep_norms(norms, batches(), layers=["gm"])
    with pytest.raises(UsageError, match="Sequential has no norm layer to sweep"):
        sweep_norms(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), batches())
