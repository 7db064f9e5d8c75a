"""measure_sensitivity(): every measure against an oracle of its own."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from conftest import randomise_
from sensitivity_networks import PARAMETER_METHODS, Small, blocks, by_name, data, flat_loss, measure, small
from torch import Tensor, nn
from torch.nn import functional as F

from normsurgeon.analysis.sensitivity import borrowing, changes, derivatives
from normsurgeon.errors import UsageError

# Taylor


def test_taylor_is_the_sum_of_gradient_times_weight():
    model, ((images, labels),) = small(), data()
    found = measure(model, [(images, labels)], "taylor")
    loss, theta = flat_loss(model, images, labels)
    step, numeric = 1e-6, torch.zeros_like(theta)
    for index in range(len(theta)):  # central differences: no autograd in the oracle
        offset = torch.zeros_like(theta)
        offset[index] = step
        numeric[index] = (loss(theta + offset) - loss(theta - offset)) / (2 * step)
    terms = (numeric * theta).abs()
    expected = {name: terms[where].sum().item() for name, where in blocks(model).items()}
    assert by_name(found.parameters) == pytest.approx(expected, rel=1e-6)
    assert by_name(found.layers) == pytest.approx(
        {layer: expected[f"{layer}.weight"] + expected[f"{layer}.bias"] for layer in ("conv", "bn", "head")}, rel=1e-6
    )
    assert {score.stderr for score in found.layers} == {None}
    assert (found.samples, found.probes, found.loss) == (6, None, "labels")


@pytest.mark.parametrize("method", PARAMETER_METHODS)
@pytest.mark.parametrize("size", [1, 4])
def test_the_batch_size_makes_no_difference(method, size):
    whole = measure(small(), data(), method, probes=3)
    parts = measure(small(), data(size=size), method, probes=3)
    assert by_name(parts.layers) == pytest.approx(by_name(whole.layers), rel=1e-9, abs=1e-12)
    assert by_name(parts.parameters) == pytest.approx(by_name(whole.parameters), rel=1e-9, abs=1e-12)
    errors = [[score.stderr or 0.0 for score in found.layers] for found in (parts, whole)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-6, abs=1e-12)


# Fisher


def per_sample_squares(model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, list[float]]:
    twin = copy.deepcopy(model).double().eval()
    squares: dict[str, list[float]] = {name: [] for name, _ in twin.named_parameters()}
    for image, target in zip(images, targets, strict=True):
        twin.zero_grad()
        F.cross_entropy(twin(image[None].double()), target[None]).backward()
        for name, tensor in twin.named_parameters():
            squares[name].append(tensor.grad.square().sum().item())
    return squares


def test_fisher_is_the_mean_of_squared_per_sample_gradients():
    model, ((images, labels),) = small(), data()
    found = measure(model, [(images, labels)], "fisher")
    squares = {
        name: torch.tensor(values, dtype=torch.float64)
        for name, values in per_sample_squares(model, images, labels).items()
    }
    assert found.details["per_sample"] == "vmap"
    assert by_name(found.parameters) == pytest.approx({n: v.mean().item() for n, v in squares.items()}, rel=1e-10)
    head = squares["head.weight"] + squares["head.bias"]
    score = found.layers[-1]
    assert (score.name, score.score) == ("head", pytest.approx(head.mean().item(), rel=1e-10))
    assert score.stderr == pytest.approx((head.std() / math.sqrt(6)).item(), rel=1e-10)


@pytest.mark.parametrize("memory", [1, 10**9])
def test_fisher_is_the_same_in_chunks_of_any_size(memory, monkeypatch):
    monkeypatch.setattr(derivatives, "MEMORY", memory)
    found = measure(small(), data(), "fisher")
    assert found.details["chunk"] == (1 if memory == 1 else 2)  # a CPU gains nothing from more
    assert by_name(found.layers) == pytest.approx(by_name(measure(small(), data(), "fisher").layers), rel=1e-12)


def test_fisher_falls_back_to_one_image_at_a_time_and_says_so():
    class Stubborn(Small):
        def forward(self, x: Tensor) -> Tensor:
            assert x.sum().item() is not None  # no vmap gets past a Python number
            return super().forward(x)

    torch.manual_seed(0)
    model = randomise_(Stubborn(nn.Tanh())).double()
    found = measure(model, data(), "fisher")
    assert found.details["per_sample"] == "loop"
    assert "vmap" in found.details["reason"]
    assert by_name(found.layers) == pytest.approx(by_name(measure(small(), data(), "fisher").layers), rel=1e-10)


# The Hessian's trace


@pytest.mark.parametrize("act", [nn.Tanh(), nn.ReLU(), nn.ReLU(inplace=True)], ids=["tanh", "relu", "relu-in-place"])
def test_the_trace_of_each_layer_is_that_of_the_explicit_hessian(act):
    model, ((images, labels),) = small(act), data()
    loss, theta = flat_loss(small(copy.deepcopy(act)), images, labels)
    diagonal = torch.autograd.functional.hessian(loss, theta).diagonal()
    found = measure(model, [(images, labels)], "hessian_trace", probes=400, seed=3)
    where = blocks(model)
    for score in found.parameters:
        assert score.score == pytest.approx(diagonal[where[score.name]].sum().item(), abs=2 * score.stderr + 1e-12)
    for score in found.layers:
        exact = sum(diagonal[part].sum().item() for name, part in where.items() if name.startswith(score.name))
        assert score.score == pytest.approx(exact, abs=2 * score.stderr)
        assert score.stderr < 0.2 * abs(exact) + 0.05
    assert found.details["total"] == pytest.approx(diagonal.sum().item(), abs=2 * found.details["total_stderr"])
    assert found.probes == 400


def test_the_trace_of_a_diagonal_hessian_is_exact_with_one_probe():
    class Scale(nn.Module):
        """Two classes, one image: the loss is softplus(-w), so that H is 1 × 1."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.w * x, torch.zeros_like(x)], 1)

    x = torch.tensor([[1.5]], dtype=torch.float64)
    found = measure(Scale(), [(x, torch.tensor([0]))], "hessian_trace", probes=1)
    p = 1 / (1 + math.exp(0.7 * 1.5))
    assert found.layers[0].score == pytest.approx(p * (1 - p) * 1.5**2, rel=1e-12)
    assert (found.layers[0].stderr, found.details["total_stderr"]) == (None, None)


def test_the_sum_over_layers_is_pyhessian_s_trace_with_the_same_probes():
    pyhessian = pytest.importorskip("pyhessian")
    utils = pytest.importorskip("pyhessian.utils")
    torch.manual_seed(0)
    model = randomise_(timm.create_model("test_resnet", num_classes=5)).eval()
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    found = measure(model, [(images, labels)], "hessian_trace", probes=3, seed=5)
    with pytest.warns(UserWarning, match="create_graph=True"):
        judge = pyhessian.hessian(model, nn.CrossEntropyLoss(), data=(images, labels), cuda=False)
    traces = []
    for probe in range(3):
        v = [derivatives.rademacher(tensor, 5, probe, name) for name, tensor in model.named_parameters()]
        product = utils.hessian_vector_product(judge.gradsH, judge.params, v)
        traces.append(utils.group_product(product, v).item())
    model.zero_grad()
    assert found.details["total"] == pytest.approx(sum(traces) / 3, rel=1e-3)
    assert sum(score.score for score in found.layers) == pytest.approx(found.details["total"], rel=1e-9)


def test_probes_are_signs_that_sum_to_nothing():
    signs = derivatives.rademacher(torch.zeros(100, 1003), 0, 0, "a")
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(signs.mean().item()) < 4 / math.sqrt(signs.numel())
    neighbours = (signs[:, 1:] * signs[:, :-1]).mean().item()
    assert abs(neighbours) < 4 / math.sqrt(signs.numel())
    assert not torch.equal(signs, derivatives.rademacher(torch.zeros(100, 1003), 0, 1, "a"))
    assert not torch.equal(signs, derivatives.rademacher(torch.zeros(100, 1003), 0, 0, "b"))


def test_a_network_that_cannot_be_differentiated_twice_is_one_clear_line():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient * 2

    class Net(Small):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y + Once.apply(y)  # autograd takes the second derivative of the second term for zero

    with pytest.raises(UsageError, match=r"hessian_trace: Net cannot be differentiated twice \(.*once_differentiable"):
        measure(randomise_(Net(nn.Tanh())).double(), data(), "hessian_trace")


def test_fused_attention_has_a_trace_too():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=4, img_size=32)
    found = measure(model, [(torch.randn(2, 3, 32, 32), None)], "hessian_trace", probes=1, layers=["blocks.0.attn.qkv"])
    assert math.isfinite(found.layers[0].score)


# Noise


def test_noise_is_the_loss_change_under_relative_noise():
    model, ((images, labels),) = small(), data()
    found = measure(model, [(images, labels)], "noise", draws=3, sigma=0.1, seed=7)
    base = F.cross_entropy(model(images), labels).item()
    for score in found.layers:
        changes = []
        for draw in range(3):
            twin = copy.deepcopy(model)
            for name, tensor in twin.named_parameters():
                if name.startswith(score.name):
                    generator = borrowing.generator_for(torch.device("cpu"), 7, "noise", draw, name)
                    n = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                    tensor.data += 0.1 * tensor.data.square().mean().sqrt() * n
            changes.append(F.cross_entropy(twin(images), labels).item() - base)
        changes_3 = torch.tensor(changes, dtype=torch.float64)
        assert score.score == pytest.approx(changes_3.mean().item(), rel=1e-9)
        assert score.stderr == pytest.approx((changes_3.std() / math.sqrt(3)).item(), rel=1e-9)
    assert found.details["loss"] == pytest.approx(base)
    assert (found.probes, found.details["sigma"]) == (3, 0.1)


def test_a_layer_s_noise_does_not_depend_on_what_else_is_measured():
    alone = measure(small(), data(), "noise", layers=["bn"])
    assert alone.layers[0] == measure(small(), data(), "noise").layers[1]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_noisy_weights_come_back_bit_for_bit_after_an_error(error):
    model = small()
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = -0.0
        model.conv.weight[0, 0, 0, 1] = 1e-310
    before = [tensor.detach().clone() for tensor in model.parameters()]
    with pytest.raises(type(error)), changes.noisy(dict(model.named_parameters()), 0.1, 0, 0):  # noqa: PT012
        assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        raise error
    bits = [tensor.detach().view(torch.int64) for tensor in model.parameters()]
    assert all(torch.equal(a.view(torch.int64), b) for a, b in zip(before, bits, strict=True))
