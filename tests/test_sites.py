"""Sites: what feeds a norm, whether that can absorb the whitening, and if not, why."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ConvNet, randomise_
from timm.layers import CondConv2d, Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import nn

import normsurgeon as ns
from normsurgeon.graph.trace import trace


def site_of(model: nn.Module, name: str = "bn", example: torch.Tensor | None = None):
    return next(site for site in ns.find_sites(model, example) if site.name == name)


class Net(nn.Module):
    """conv → (forward's doing) → bn, the doing given as a function of the module and the convolution's output."""

    def __init__(self, between, conv: nn.Module | None = None, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = conv or nn.Conv2d(3, 8, 3, padding=1)
        self.bn = norm or nn.BatchNorm2d(8)
        self.identity = nn.Identity()
        self.pool = nn.AvgPool2d(2)
        self.between = between

    def forward(self, x):
        return self.between(self, x)


UNFOLDABLE = {
    "read twice": (lambda m, x: m.bn(y := m.conv(x)) + y, "conv's output is also read by add"),
    "after an addition": (lambda m, x: m.bn(m.conv(x) + 1), "follows add"),
    "after a concatenation": (
        lambda m, x: m.bn(torch.cat([m.conv(x)[:, :4], m.conv(x)[:, :4]], 1)),
        "follows cat",
    ),
    "after an activation": (lambda m, x: m.bn(F.relu(m.conv(x))), "follows relu"),
    "after a pool": (lambda m, x: m.bn(m.pool(m.conv(x))), "follows AvgPool2d (pool)"),
    "producer called twice": (
        lambda m, x: m.bn(m.conv(x)) + m.conv(2 * x),
        "conv is called 2 times, not always for this norm",
    ),
    "norm called twice": (
        lambda m, x: m.bn(m.conv(x)) + m.bn(2 * x.mean(1, True) + m.conv.bias.view(1, -1, 1, 1)),
        "one of its 2 calls: follows add",
    ),
    "after the input": (lambda m, x: m.conv(x) + m.bn(x.repeat(1, 3, 1, 1)[:, :8]), "follows slice"),
}


@pytest.mark.parametrize("case", UNFOLDABLE)
def test_what_cannot_be_folded_says_why(case):
    between, reason = UNFOLDABLE[case]
    site = site_of(Net(between))
    assert not site.foldable
    assert site.reason == reason


FOLDABLE = {
    "directly": lambda m, x: m.bn(m.conv(x)),
    "behind an identity": lambda m, x: m.bn(m.identity(m.conv(x))),
    "behind contiguous": lambda m, x: m.bn(m.conv(x).contiguous()),
    "its shape read elsewhere": lambda m, x: m.bn(y := m.conv(x)).view(y.shape[0], -1),
}


@pytest.mark.parametrize("case", FOLDABLE)
def test_what_can_be_folded_is_and_exactly(case):
    model = randomise_(Net(FOLDABLE[case])).double().eval()
    assert site_of(model).foldable
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(ns.convert(model, to="fold").model(x), model(x), rtol=1e-11, atol=1e-11)


class Tokens(nn.Module):
    """Linear on (B, N, C), then a BatchNorm1d as levit (tokens in the batch) or others (transposed) do it."""

    def __init__(self, move) -> None:
        super().__init__()
        self.linear, self.bn, self.move = nn.Linear(5, 8), nn.BatchNorm1d(8), move

    def forward(self, x):
        return self.bn(self.move(self.linear(x)))


@pytest.mark.parametrize(
    "move",
    [
        lambda y: y.flatten(0, 1),
        lambda y: y.transpose(1, 2),
        lambda y: y.transpose(-1, -2),
        lambda y: y.permute(0, 2, 1),
    ],
)
def test_a_linear_layer_folds_through_moves_that_bring_its_channels_to_the_norm(move):
    model = randomise_(Tokens(move)).double().eval()
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    site = site_of(model, example=x)
    assert site.foldable, site.reason
    torch.testing.assert_close(ns.convert(model, to="fold", example_inputs=x).model(x), model(x))


def test_a_linear_layer_whose_channels_are_not_the_norms_is_not_folded():
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8))
    site = site_of(model, "1", torch.randn(3, 8, 5))
    assert (site.foldable, site.reason) == (False, "its channels are not the norm's channels")


@pytest.mark.parametrize(
    ("conv", "foldable"),
    [
        (Conv2dSame(3, 8, 3, stride=2), True),
        (StdConv2d(3, 8, 3), False),
        (ScaledStdConv2d(3, 8, 3), False),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), False),
        (nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), True),
    ],
    ids=["Conv2dSame", "StdConv2d", "ScaledStdConv2d", "weight_norm", "circular"],
)
def test_producers_that_rescale_their_own_weight_are_recognised(conv, foldable):
    model = randomise_(Net(lambda m, x: m.bn(m.conv(x)), conv)).double().eval()
    assert site_of(model).foldable is foldable
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(ns.convert(model, to="fold").model(x), model(x), rtol=1e-10, atol=1e-10)


def test_tied_weights_are_not_folded():
    model = Net(lambda m, x: m.bn(m.conv(x)) + m.other(x))
    model.other = nn.Conv2d(3, 8, 3, padding=1)
    model.other.weight = model.conv.weight
    assert site_of(model).reason == "conv shares its parameters with other"


def test_a_mixture_of_experts_is_not_folded():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.route = (
                CondConv2d(3, 8, 3, num_experts=2),
                nn.BatchNorm2d(8),
                nn.Linear(3, 2),
            )

        def forward(self, x):
            return self.bn(self.conv(x, torch.sigmoid(self.route(x.mean((2, 3))))))

    assert site_of(Mixture()).reason == "follows CondConv2d (conv)"


def test_a_shared_norm_is_one_site_with_all_its_names():
    model = ConvNet()
    model.bn2 = model.bn1
    site = site_of(model, "bn1")
    assert site.aliases == ("bn2",)
    assert site.calls == 2
    assert len(ns.find_sites(model)) == 2


class Branching(nn.Module):
    """Cannot be traced: its control flow looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)

    def forward(self, x):
        y = self.bn(self.conv(x))
        return y if x.shape[-1] > 4 and not torch.jit.is_scripting() and len(list(x.shape)) == 4 else -y


def test_a_model_that_cannot_be_traced_is_run_and_this_is_said():
    model = randomise_(Branching()).double().eval()
    plan = ns.plan(model, to="gn")
    assert plan.traced_by == "run"
    assert plan.notes[0].startswith("torch.fx cannot trace this model (TraceError: symbolically traced variables")
    assert plan.notes[0].endswith("one real call was followed instead")
    site = plan.decisions[0].site
    assert site.input_shape == (2, 32, 222, 222)
    assert (site.foldable, site.producer) == (True, "conv")
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    for target in ("affine", "fold"):
        torch.testing.assert_close(ns.convert(model, to=target).model(x), model(x))


def test_a_leaf_that_hides_batch_norms_is_traced_on_its_own():
    traced = trace(timm.create_model("mobilevit_xxs"))
    assert any(path for path in traced.graphs), "no leaf was traced"
    sites = ns.find_sites(traced)
    hidden = [site for site in sites if ".conv_kxk." in site.name]
    assert hidden
    assert all(site.foldable for site in hidden)


def test_sites_come_in_the_order_of_the_data():
    names = [site.name for site in ns.find_sites(timm.create_model("test_resnet"))]
    assert names.index("conv1.1") < names.index("bn1") < names.index("layer1.0.bn1") < names.index("layer4.0.bn2")


def test_shapes_and_activation_are_facts_of_the_site():
    site = site_of(ConvNet(), "bn1", torch.randn(2, 3, 16, 16))
    assert site.input_shape == site.output_shape == (2, 32, 16, 16)
    assert (site.positions, site.activation, site.readers) == (256, "ReLU", ("ReLU (relu)",))


def test_finding_sites_changes_nothing_and_runs_no_hook(convnet):
    calls = []
    convnet.bn1.register_forward_hook(lambda *a: calls.append(a))
    convnet.train()
    before = {k: v.clone() for k, v in convnet.state_dict().items()}
    ns.find_sites(convnet)
    assert not calls
    assert all(module.training for module in convnet.modules())
    assert all(torch.equal(v, before[k]) for k, v in convnet.state_dict().items())


class Functional(nn.Module):
    """A batch norm as a call of F.batch_norm on buffers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3)
        self.register_buffer("mean", torch.randn(32))
        self.register_buffer("var", torch.rand(32) + 0.5)
        self.gamma = nn.Parameter(torch.rand(32) + 0.5)

    def forward(self, x):
        return F.relu(F.batch_norm(self.conv(x), self.mean, self.var, self.gamma, None, False, 0.1, 1e-4))


def test_a_functional_batch_norm_is_refused_as_a_module_and_converted_in_a_graph():
    model = Functional().double().eval()
    refused = ns.convert(model, to="affine")
    assert refused.counts["refused"] == 1
    assert refused.sites[0].reason == "a functional call, not a module: as_graph=True converts it"
    result = ns.convert(model, to="affine", as_graph=True)
    assert isinstance(result.model, torch.fx.GraphModule)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(result.model(x), model(x))
    assert "batch_norm" not in result.model.code.replace("converted_batch_norm", "")


def test_weight_standardisation_is_not_mistaken_for_a_batch_norm():
    assert ns.find_sites(nn.Sequential(StdConv2d(3, 8, 3), nn.ReLU())) == ()
