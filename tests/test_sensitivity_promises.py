"""measure_sensitivity(): what it counts, what it leaves alone, and what it says where nothing can be measured."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from conftest import ConvNet, randomise_
from sensitivity_networks import PARAMETER_METHODS, InPlace, by_name, data, measure, small
from torch import Tensor, nn
from torch.nn import functional as F

import normsurgeon as ns
from normsurgeon.analysis.sensitivity.measure import METHODS, measure_sensitivity
from normsurgeon.errors import DataError, PatternError, UsageError

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


def test_layers_without_parameters_and_parameters_without_use_are_distinguished():
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
    labelled = measure(model, own, method, probes=2)
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
        network = randomise_(timm.create_model("test_resnet", num_classes=5))
        model = ns.convert(network, to="gn", example_inputs=torch.zeros(2, 3, 32, 32), verdict=False).model
        layers = ["conv1.0", "bn1", "layer2.0.bn2", "fc"]
    else:
        model = randomise_(InPlace() if make == "in-place" else ConvNet())
        layers = None
    seen = []
    found = measure_sensitivity(
        model,
        [(torch.randn(2, 3, 32, 32), None)],
        methods=METHODS,
        layers=layers,
        probes=2,
        draws=2,
        steps=4,
        on_progress=seen.append,
    )
    assert tuple(each.method for each in found) == METHODS
    assert [(progress.stage, progress.done) for progress in seen] == [(method, 2) for method in METHODS]
    for each in found:
        assert all(math.isfinite(score.score) for score in each.layers)
        assert (each.samples, each.loss.endswith("prediction")) == (2, True)
        assert each.unit


# What cannot be measured


def test_unknown_methods_and_layers_name_the_nearest():
    with pytest.raises(UsageError, match=r"unknown method 'hessian'; did you mean hessian_trace\?$"):
        measure(small(), data(), "hessian")
    with pytest.raises(PatternError, match=r"Small has no layer 'haed'; did you mean head\?$"):
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
    with pytest.raises(DataError, match=r"there is a label 4, and the network's 4 classes are 0 to 3"):
        measure(small(), [(data()[0][0], torch.full((6,), 4))], "taylor")
    with pytest.raises(
        DataError, match=r"labels of shape \(5,\) and type torch\.int64 for 6 images; give one class number an image"
    ):
        measure(small(), [(data()[0][0], torch.zeros(5))], "taylor")
    with pytest.raises(DataError, match="there are images without labels; try data that is labelled throughout"):
        measure(small(), data() + data(labels=False), "taylor")
    with pytest.raises(UsageError, match=r"Conv2d gives \(2, 4, 8, 8\) for 2 images; try a classifier"):
        measure(nn.Conv2d(3, 4, 1), [(torch.rand(2, 3, 8, 8), None)], "taylor")
    with pytest.raises(UsageError, match=r"Conv2d has no weights \(it is on the meta device\)"):
        measure(nn.Conv2d(3, 4, 1, device="meta"), [(torch.rand(2, 3, 8, 8), None)], "taylor")
