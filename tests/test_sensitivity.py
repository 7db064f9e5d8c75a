"""measure_sensitivity(): every measure against an oracle of its own, and the model comes back as it was."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from conftest import ConvNet, randomise_
from torch import Tensor, nn
from torch.nn import functional as F

import normsurgeon as ns
from normsurgeon.analysis.sensitivity import borrowing, fisher, hessian, noise
from normsurgeon.analysis.sensitivity.measure import METHODS, measure_sensitivity
from normsurgeon.analysis.sensitivity.objective import Objective
from normsurgeon.analysis.sensitivity.selection import select_layers
from normsurgeon.errors import DataError, PatternError, UsageError
from normsurgeon.reporting.records import Sensitivity

PARAMETER_METHODS = METHODS[:4]


class Small(nn.Module):
    """A convolution, a batch norm, a chosen activation and a head: 3×6×6 images, 4 classes, 118 parameters."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, stride=2)
        self.bn = nn.BatchNorm2d(3)
        self.act = act
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.bn(self.conv(x))).mean((2, 3)))


class InPlace(nn.Module):
    """As torchvision writes it: one in-place ReLU for all, and ``out += identity``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(identity))
        out += identity
        return self.fc(F.relu(out, inplace=True).mean((2, 3)))


def small(act: nn.Module | None = None, seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return randomise_(Small(act or nn.Tanh())).double().eval()


def data(count: int = 6, classes: int = 4, side: int = 6, size: int | None = None, labels: bool = True):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, side, side, generator=generator, dtype=torch.float64)
    answers = torch.randint(classes, (count,), generator=generator)
    pieces = zip(images.split(size or count), answers.split(size or count), strict=True)
    return [(x, y if labels else None) for x, y in pieces]


def measure(model: nn.Module, batches, method: str, **options) -> Sensitivity:
    (found,) = measure_sensitivity(model, batches, methods=[method], **options)
    assert found.method == method
    return found


def by_name(scores) -> dict[str, float]:
    return {score.name: score.score for score in scores}


def flat_loss(model: nn.Module, images: Tensor, targets: Tensor):
    """The mean loss as a function of all parameters in one vector, and that vector."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [tensor.shape for tensor in model.parameters()]

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes])
        values = {n: part.view(shape) for n, part, shape in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, values, (images,)), targets)

    return loss, torch.cat([tensor.detach().flatten() for tensor in model.parameters()])


def blocks(model: nn.Module) -> dict[str, slice]:
    found, start = {}, 0
    for name, tensor in model.named_parameters():
        found[name] = slice(start, start + tensor.numel())
        start += tensor.numel()
    return found


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
def test_fisher_is_the_same_in_chunks_of_any_size(memory):
    objective = Objective(small(), data())
    found = fisher.fisher(objective, select_layers(objective.model), memory=memory)
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
        v = [hessian.rademacher(tensor, 5, probe, name) for name, tensor in model.named_parameters()]
        product = utils.hessian_vector_product(judge.gradsH, judge.params, v)
        traces.append(utils.group_product(product, v).item())
    model.zero_grad()
    assert found.details["total"] == pytest.approx(sum(traces) / 3, rel=1e-3)
    assert sum(score.score for score in found.layers) == pytest.approx(found.details["total"], rel=1e-9)


def test_probes_are_signs_that_sum_to_nothing():
    signs = hessian.rademacher(torch.zeros(100, 1003), 0, 0, "a")
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(signs.mean().item()) < 4 / math.sqrt(signs.numel())
    neighbours = (signs[:, 1:] * signs[:, :-1]).mean().item()
    assert abs(neighbours) < 4 / math.sqrt(signs.numel())
    assert not torch.equal(signs, hessian.rademacher(torch.zeros(100, 1003), 0, 1, "a"))
    assert not torch.equal(signs, hessian.rademacher(torch.zeros(100, 1003), 0, 0, "b"))


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
    with pytest.raises(type(error)), noise.noisy(dict(model.named_parameters()), 0.1, 0, 0):  # noqa: PT012
        assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        raise error
    bits = [tensor.detach().view(torch.int64) for tensor in model.parameters()]
    assert all(torch.equal(a.view(torch.int64), b) for a, b in zip(before, bits, strict=True))


# Which layers, which parameters, which loss


def test_a_shared_parameter_is_counted_once_under_its_first_name():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.again = nn.Linear(3, 3)
            self.again.weight = self.first.weight
            self.block = nn.Sequential(self.first, nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.block(x))

    torch.manual_seed(0)
    found = measure(Tied(), [(torch.randn(5, 3), None)], "taylor")
    assert [score.name for score in found.parameters] == ["first.weight", "first.bias", "again.bias"]
    assert [score.name for score in found.layers] == ["first", "again"]
    block = measure(Tied(), [(torch.randn(5, 3), None)], "taylor", layers=["block.0"])
    assert [score.name for score in block.parameters] == ["first.weight", "first.bias"]


def test_a_block_counts_with_all_that_is_inside_in_the_network_s_order():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4)
    found = measure(model, [(torch.randn(2, 3, 32, 32), None)], "taylor", layers=["fc", "layer1"])
    assert [score.name for score in found.layers] == ["layer1", "fc"]
    inside = [score.score for score in found.parameters if score.name.startswith("layer1.")]
    assert found.layers[0].score == pytest.approx(sum(inside))


def test_layers_without_parameters_and_parameters_without_use_are_told_apart():
    model = small()
    model.spare = nn.Linear(2, 2).double()
    for method in ("taylor", "fisher", "hessian_trace"):
        found = measure(model, data(), method, layers=["act", "head", "spare"], probes=2)
        assert by_name(found.layers)["act"] is None
        assert by_name(found.layers)["spare"] == 0
        assert by_name(found.layers)["head"] > 0
        if method != "fisher":
            assert found.details["unused"] == ["spare.weight", "spare.bias"]


def test_frozen_parameters_are_measured():
    model = small()
    expected = by_name(measure(model, data(), "taylor").parameters)
    model.conv.requires_grad_(False)
    model.bn.weight.requires_grad_(False)
    assert by_name(measure(model, data(), "taylor").parameters) == expected
    assert [t.requires_grad for t in model.parameters()] == [False, False, False, True, True, True]


@pytest.mark.parametrize("method", METHODS)
def test_without_labels_the_network_s_own_answer_is_explained(method):
    model = small()
    ((images, _),) = data()
    own = [(images, model(images).argmax(1))]
    found = measure(model, data(labels=False), method, probes=2)
    asked = measure(model, data(), method, probes=2, loss="prediction")
    labelled = measure(model, own, method, probes=2)
    assert found == asked
    assert found.layers == labelled.layers
    explains = (
        ("prediction", "labels") if method in PARAMETER_METHODS else ("logit of the prediction", "logit of the label")
    )
    assert (found.loss, labelled.loss) == explains


def test_a_network_in_half_precision_is_measured():
    found = measure_sensitivity(small().bfloat16(), data(), methods=["taylor", "noise"], draws=1)
    exact = by_name(measure(small(), data(), "taylor").layers)
    assert by_name(found[0].layers) == pytest.approx(exact, rel=0.1)


# The model


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_model_and_the_caller_s_random_state_are_left_as_they_were(method, fails):
    torch.manual_seed(0)
    model = randomise_(InPlace()).train()
    model.bn1.eval()
    model.conv2.requires_grad_(False)
    model.fc(torch.randn(1, 4)).sum().backward()
    passes = []
    model.fc.register_forward_hook(lambda *_: passes.append(1) or (1 / 0 if fails and len(passes) > 2 else None))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = {name: None if t.grad is None else t.grad.clone() for name, t in model.named_parameters()}

    def flags():
        modules = [(m.training, getattr(m, "inplace", None), len(m._forward_hooks)) for m in model.modules()]
        return modules, [t.requires_grad for t in model.parameters()]

    before = flags()
    batches = [(torch.randn(2, 3, 8, 8), None)] * 3
    random = torch.get_rng_state()
    if fails:
        with pytest.raises(ZeroDivisionError, match="division by zero"):
            measure(model, batches, method, probes=2, steps=3)
    else:
        measure(model, batches, method, probes=2, steps=3)
    assert torch.equal(torch.get_rng_state(), random)
    assert flags() == before
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    for name, tensor in model.named_parameters():
        assert (tensor.grad is None) == (grads[name] is None)
        assert tensor.grad is None or torch.equal(tensor.grad, grads[name])


def test_a_graph_that_the_caller_holds_stays_usable():
    model, ((images, labels),) = small(), data()
    loss = F.cross_entropy(model(images), labels)
    measure(model, data(), "noise", draws=1)
    loss.backward()
    assert model.conv.weight.grad is not None


def test_it_works_where_the_caller_has_no_gradients():
    model = small()
    expected = measure_sensitivity(model, data(), methods=METHODS, probes=1)
    with torch.inference_mode():
        assert measure_sensitivity(model, data(), methods=METHODS, probes=1) == expected
        with pytest.raises(UsageError, match="Small was made in inference mode, so that nothing can be differentiated"):
            measure(small(), data(), "taylor")
    with torch.no_grad():
        assert measure_sensitivity(model, data(), methods=METHODS, probes=1) == expected


@pytest.mark.parametrize("make", ["converted", "in-place", "convnet"])
def test_all_methods_run_on(make):
    torch.manual_seed(0)
    if make == "converted":
        model = ns.convert(randomise_(timm.create_model("test_resnet", num_classes=5)), to="gn").model
        layers = ["conv1.0", "bn1", "layer2.0.bn2", "fc"]
    else:
        model = randomise_(InPlace() if make == "in-place" else ConvNet())
        layers = None
    told = []
    found = measure_sensitivity(
        model,
        lambda: iter([(torch.randn(2, 3, 32, 32), None)]),
        methods=METHODS,
        layers=layers,
        probes=2,
        draws=2,
        steps=4,
        on_progress=lambda *args: told.append(args),
    )
    assert tuple(each.method for each in found) == METHODS
    assert told == [(method, 2) for method in METHODS]
    for each in found:
        assert all(math.isfinite(score.score) for score in each.layers)
        assert (each.samples, each.loss.endswith("prediction")) == (2, True)
        assert each.unit


# What cannot be measured


def test_unknown_methods_and_layers_name_the_nearest():
    with pytest.raises(UsageError, match=r"unknown method 'hessian'; did you mean hessian_trace\? There are: taylor, "):
        measure(small(), data(), "hessian")
    with pytest.raises(PatternError, match=r"Small has no layer 'haed'; try head"):
        measure(small(), data(), "taylor", layers=["haed"])
    with pytest.raises(
        UsageError, match=r"taylor has nothing to measure in Small: none of the 1 layers owns a parameter"
    ):
        measure(small(), data(), "taylor", layers=["act"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": 0}, "probes=0 must be at least 1"),
        ({"draws": 0}, "draws=0 must be at least 1"),
        ({"steps": 1}, "steps=1 must be at least 2"),
        ({"sigma": 0.0}, r"sigma=0\.0 must be positive"),
        ({"sigma": math.nan}, "sigma=nan must be positive"),
        ({"loss": "label"}, "loss='label' is unknown; choose one of: auto, labels, prediction"),
        ({"max_batches": 0}, "max_batches=0 must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        measure(small(), data(), "taylor", **options)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_finite_is_refused(method):
    model = small()
    with torch.no_grad():
        model.head.bias[0] = math.nan
    with pytest.raises(DataError, match="the loss of Small is nan on images 0 to 5; try the statistics"):
        measure(model, data(), method, layers=["conv"])


def test_data_that_is_no_data_is_refused():
    with pytest.raises(UsageError, match="the batches can be iterated only once; give a list, a loader, or a function"):
        measure(small(), iter(data()), "taylor")
    with pytest.raises(DataError, match="there are no images to measure taylor on; the batches are empty"):
        measure(small(), [], "taylor")
    with pytest.raises(UsageError, match=r"give batches of tensors \(images \(N, C, H, W\), labels"):
        measure(small(), [("a", "b")], "taylor")
    with pytest.raises(DataError, match=r"there is a label 4, and the network's 4 classes are 0 to 3"):
        measure(small(), [(data()[0][0], torch.full((6,), 4))], "taylor")
    with pytest.raises(DataError, match=r"labels of shape \(5,\) for 6 images; give one class number an image"):
        measure(small(), [(data()[0][0], torch.zeros(5))], "taylor")
    with pytest.raises(DataError, match="there are images without labels; try loss='prediction'"):
        measure(small(), data() + data(labels=False), "taylor")
    with pytest.raises(UsageError, match=r"Conv2d gives \(2, 4, 8, 8\) for 2 images; try a classifier"):
        measure(nn.Conv2d(3, 4, 1), [(torch.rand(2, 3, 8, 8), None)], "taylor")
    with pytest.raises(UsageError, match=r"Conv2d has no weights \(it is on the meta device\)"):
        measure(nn.Conv2d(3, 4, 1, device="meta"), [(torch.rand(2, 3, 8, 8), None)], "taylor")


def test_max_batches_takes_the_first_ones():
    found = measure(small(), data(size=2), "taylor", max_batches=2)
    assert found.samples == 4
    assert by_name(found.layers) == by_name(measure(small(), data(size=2)[:2], "taylor").layers)
