"""Layer attributions: captum's figures, checked against hooks and sums of their own, one score a layer."""

from __future__ import annotations

import pytest
import timm
import torch
from captum.attr import LayerConductance
from conftest import randomise_
from torch import Tensor, nn
from torch.nn import functional as F

from normsurgeon.analysis.records import Sensitivity
from normsurgeon.analysis.sensitivity import attribution
from normsurgeon.analysis.sensitivity.measure import measure_sensitivity

ATTRIBUTIONS = ("conductance", "gradient_x_activation", "feature_ablation")


class Net(nn.Module):
    """In-place activations, a shared ReLU, ``out += identity``, a layer never called, one that gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.pair = Pair()
        self.spare = nn.Linear(2, 2)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(identity))
        out += identity
        out, _ = self.pair(self.relu(out))
        return self.fc(out.mean((2, 3)))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return F.relu(x - 0.1, inplace=True), 3


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return randomise_(Net()).double().eval()


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def measure(model: nn.Module, x: Tensor, method: str, size: int = 100, labels: Tensor | None = None, **options):
    pieces = [
        (part, None if labels is None else labels[i * size : (i + 1) * size]) for i, part in enumerate(x.split(size))
    ]
    (found,) = measure_sensitivity(model, pieces, methods=[method], **options)
    return found


def by_name(found: Sensitivity) -> dict[str, float | None]:
    return {score.name: score.score for score in found.layers}


def target_logits(model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    return model(x).gather(1, targets[:, None])[:, 0]


def test_feature_ablation_is_the_logit_s_change_when_a_hook_zeroes_the_output(net):
    x = images()
    targets = net(x).argmax(1)
    found = measure(net, x, "feature_ablation", layers=["conv1", "bn1", "conv2", "bn2", "fc"])
    before = target_logits(net, x, targets)
    for score in found.layers:
        hook = net.get_submodule(score.name).register_forward_hook(lambda module, args, output: output * 0)
        changes = (before - target_logits(net, x, targets)).abs()
        hook.remove()
        assert score.score == pytest.approx(changes.mean().item(), rel=1e-9)
        assert score.stderr == pytest.approx((changes.std() / 5**0.5).item(), rel=1e-9)
    assert found.loss == "logit of the prediction"


def test_gradient_x_activation_is_autograd_s(net):
    x = images()
    targets = net(x).argmax(1)
    found = measure(net, x, "gradient_x_activation", layers=["conv1", "bn1", "conv2", "bn2"])
    for score in found.layers:
        kept = []
        # A copy goes on, since what follows writes into it.
        hook = net.get_submodule(score.name).register_forward_hook(
            lambda module, args, output, kept=kept: kept.append(output) or output.clone()
        )
        logit = target_logits(net, x, targets).sum()
        hook.remove()
        (slope,) = torch.autograd.grad(logit, kept[0])
        assert score.score == pytest.approx((slope * kept[0]).abs().sum((1, 2, 3)).mean().item(), rel=1e-9)


def test_conductance_is_captum_s_for_every_layer(net):
    x = images()
    targets = net(x).argmax(1)
    net.relu.inplace = False
    found = measure(net, x, "conductance", steps=6, layers=["conv1", "bn1", "conv2", "bn2"])
    for score in found.layers:
        captum = LayerConductance(net, net.get_submodule(score.name))
        expected, delta = captum.attribute(x, target=targets, n_steps=6, return_convergence_delta=True)
        assert score.score == pytest.approx(expected.abs().sum((1, 2, 3)).mean().item(), rel=1e-9)
        assert found.details["convergence_delta"][score.name] == pytest.approx(delta.abs().mean().item(), rel=1e-6)


def test_conductance_adds_up_to_the_change_of_the_logit_where_all_of_it_flows_through_the_layer(net):
    x = images()
    targets = net(x).argmax(1)
    rise = target_logits(net, x, targets) - target_logits(net, torch.zeros_like(x), targets)
    layers = {name: net.get_submodule(name) for name in ("bn1", "bn2")}
    coarse = attribution.conductances(net, layers, x, targets, 10)
    fine = attribution.conductances(net, layers, x, targets, 200)
    errors = [(each["bn1"][1] - rise.detach()).abs().max().item() for each in (coarse, fine)]
    assert errors[1] < 0.01 * rise.abs().max().item()
    assert errors[1] < errors[0] / 3
    assert (fine["bn2"][1] - rise).abs().max() > 10 * errors[1]  # a shortcut runs parallel to it
    found = measure(net, x, "conductance", steps=200, layers=["bn1"])
    assert found.details["convergence_delta"]["bn1"] < 0.01 * rise.abs().mean().item()


@pytest.mark.parametrize("method", ATTRIBUTIONS)
def test_layers_that_cannot_be_explained_are_noted_and_the_others_go_on(net, method):
    layers = ["conv1", "relu", "bn2", "pair", "spare"]
    found = measure(net, images(), method, layers=layers, steps=4)
    scores = by_name(found)
    assert list(scores) == layers
    assert (scores["relu"], scores["pair"], scores["spare"]) == (None, None, None)
    assert found.details["failed"]["relu"] == "called 2 times in one pass; captum explains one call"
    assert found.details["failed"]["spare"] == "called 0 times in one pass; captum explains one call"
    assert "\n" not in found.details["failed"]["pair"]
    alone = measure(net, images(), method, layers=["conv1", "bn2"], steps=4)
    assert {name: scores[name] for name in ("conv1", "bn2")} == pytest.approx(by_name(alone), rel=1e-9)
    assert alone.details["failed"] == {}


def test_a_layer_whose_output_is_not_one_row_an_image_is_noted():
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.rows(x.flatten(0, 1)).view(len(x), -1, 4).mean(1)

    found = measure(Folded(), torch.randn(2, 5, 3), "gradient_x_activation")
    assert by_name(found) == {"rows": None}
    assert found.details["failed"] == {"rows": "its output has 10 rows for 2 images"}


@pytest.mark.parametrize("method", ATTRIBUTIONS)
def test_neither_the_batch_size_nor_the_memory_makes_a_difference(net, method, monkeypatch):
    whole = by_name(measure(net, images(), method, steps=4, layers=["conv1", "bn2", "fc"]))
    assert by_name(measure(net, images(), method, size=2, steps=4, layers=["conv1", "bn2", "fc"])) == pytest.approx(
        whole
    )
    monkeypatch.setattr(attribution, "MEMORY", 1)
    assert by_name(measure(net, images(), method, steps=4, layers=["conv1", "bn2", "fc"])) == pytest.approx(whole)


def test_the_label_is_the_target_where_there_is_one(net):
    labels = torch.tensor([0, 1, 2, 3, 4])
    found = measure(net, images(), "feature_ablation", labels=labels, layers=["fc"])
    assert found.loss == "logit of the label"
    assert by_name(found)["fc"] == pytest.approx(target_logits(net, images(), labels).abs().mean().item())


def test_in_place_activations_inside_norm_layers_are_no_obstacle():
    torch.manual_seed(0)
    model = randomise_(timm.create_model("test_efficientnet", num_classes=5)).eval()
    norms = [name for name, module in model.named_modules() if type(module).__name__ == "BatchNormAct2d"][:3]
    acts = [module.inplace for module in model.modules() if hasattr(module, "inplace")]
    for method in ATTRIBUTIONS:
        found = measure(model, torch.randn(2, 3, 32, 32), method, layers=norms, steps=3)
        assert found.details["failed"] == {}
        assert all(score.score > 0 for score in found.layers)
    assert acts == [module.inplace for module in model.modules() if hasattr(module, "inplace")]
    assert not any(module._forward_hooks for module in model.modules())
