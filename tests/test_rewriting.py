"""What survives a conversion: everything but the norms."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from conftest import ConvNet, randomise_
from timm.layers import GroupNorm, GroupNorm1, GroupNormAct, LayerNorm2d
from torch import nn

import normsurgeon as ns
from normsurgeon.errors import ConversionError, UsageError
from normsurgeon.norms.batchnorm import is_batch_norm

LAYERS = {
    "gn": GroupNorm,
    "ln": GroupNorm1,
    "ln2d": LayerNorm2d,
    "in": nn.InstanceNorm2d,
}


def test_the_callers_model_is_never_touched(convnet):
    before = copy.deepcopy(convnet.state_dict())
    modules = dict(convnet.named_modules())
    for target in ns.TARGETS:
        ns.convert(convnet, to=target, example_inputs=torch.zeros(2, 3, 8, 8))
    assert dict(convnet.named_modules()) == modules
    assert list(convnet.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in convnet.state_dict().items())
    assert convnet.conv1.bias is None


def test_in_place_conversion_changes_the_model_itself(convnet):
    result = ns.convert_(convnet, to="gn")
    assert result.model is convnet
    assert isinstance(convnet.bn1, GroupNorm)


@pytest.mark.parametrize("target", LAYERS)
def test_layers_come_from_timm_and_torch(target):
    assert isinstance(ns.convert(ConvNet(), to=target).model.bn1, LAYERS[target])


def test_after_a_norm_act_module_comes_timms_norm_act_module():
    model = ns.convert(
        timm.create_model("test_efficientnet"), to="gn", example_inputs=torch.zeros(2, 3, 32, 32), verdict=False
    ).model
    assert isinstance(model.bn1, GroupNormAct)
    assert isinstance(model.bn1.act, nn.SiLU)


def test_class_methods_and_module_names_stay():
    model = timm.create_model("test_resnet").eval()
    x = torch.randn(1, 3, 64, 64)
    result = ns.convert(model, to="gn", example_inputs=x, verdict=False)
    assert type(result.model) is type(model)
    assert [n for n, _ in result.model.named_modules()] == [n for n, _ in model.named_modules()]
    assert result.model.forward_features(x).shape == model.forward_features(x).shape
    result.model.reset_classifier(7)
    assert result.model(x).shape == (1, 7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_stays(dtype):
    result = ns.convert(ConvNet().to(dtype), to="gn")
    assert {p.dtype for p in result.model.parameters()} == {dtype}


def test_device_stays():
    with torch.device("meta"):
        model = ConvNet()
    assert all(p.is_meta for p in ns.convert(model, to="gn").model.parameters())


def test_training_flags_stay_module_by_module():
    model = ConvNet().train()
    model.bn1.eval()
    converted = ns.convert(model, to="gn").model
    assert [converted.bn1.training, converted.bn2.training, converted.training] == [False, True, True]


def test_requires_grad_stays_parameter_by_parameter():
    model = ConvNet()
    model.bn1.weight.requires_grad_(False)
    model.conv1.weight.requires_grad_(False)
    converted = ns.convert(model, to="gn").model
    assert [converted.bn1.weight.requires_grad, converted.bn1.bias.requires_grad] == [False, True]
    assert not converted.conv1.bias.requires_grad
    assert converted.conv2.weight.requires_grad


def test_hooks_move_to_the_new_layer():
    model, seen = ConvNet(), []
    model.bn1.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    model.bn1.register_forward_pre_hook(lambda module, args: seen.append("before"))
    ns.convert(model, to="gn").model(torch.randn(1, 3, 8, 8))
    assert seen == ["before", "GroupNorm"]


def test_a_shared_norm_stays_shared():
    model = ConvNet()
    model.bn2 = model.bn1
    converted = ns.convert(model, to="gn").model
    assert converted.bn1 is converted.bn2
    assert isinstance(converted.bn1, GroupNorm)


def test_shared_norms_keep_the_function_exactly():
    model = randomise_(ConvNet()).double().eval()
    model.bn2 = model.bn1
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(ns.convert(model, to="affine").model(x), model(x))


def test_converted_models_train_and_copy():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    model = ns.convert(timm.create_model("test_resnet"), to="gn", example_inputs=x, verdict=False).model.train()
    model(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    twin = copy.deepcopy(model).eval()
    twin.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(twin(x), model.eval()(x))


@pytest.mark.long
@pytest.mark.parametrize("target", ["gn", "ln", "ln2d", "in", "rms", "rms2d", "affine", "fold"])
def test_converted_models_pass_through_torch_compile(target):
    """The eager backend runs dynamo's whole capture without a C++ compiler; fullgraph forbids graph breaks."""
    torch.compiler.reset()
    model = ns.convert(randomise_(ConvNet()), to=target).model.eval()
    x = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_gets_the_new_parameters_in_the_place_of_the_old(make):
    model = ConvNet().train()
    norms = [p for n, p in model.named_parameters() if "bn" in n]
    rest = [p for n, p in model.named_parameters() if "bn" not in n]
    optimizer = make([{"params": rest, "lr": 0.1}, {"params": norms, "lr": 0.01}], lr=0.1)
    if make is torch.optim.SGD:
        optimizer.param_groups[0]["momentum"] = 0.9
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    head_state = {k: v for k, v in optimizer.state[model.head.weight].items() if isinstance(v, torch.Tensor)}

    result = ns.convert(model, to="gn", optimizer=optimizer)
    new, trained = result.model, result.optimizer
    assert set(trained.param_groups[0]["params"]) == {
        new.conv1.weight,
        new.conv1.bias,
        new.conv2.weight,
        new.conv2.bias,
        new.head.weight,
        new.head.bias,
    }
    assert set(trained.param_groups[1]["params"]) == {p for n, p in new.named_parameters() if "bn" in n}
    assert new.conv1.weight not in trained.state, "folded: its momentum belongs to the old scale"
    for key, value in head_state.items():
        assert torch.equal(trained.state[new.head.weight][key], value)
    new(torch.randn(2, 3, 8, 8)).sum().backward()
    trained.step()
    assert set(optimizer.param_groups[1]["params"]) == set(norms), "the caller's optimizer is not touched"


def test_a_folded_away_norm_leaves_the_optimizer():
    model = ConvNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = ns.convert_(model, to="fold", optimizer=optimizer)
    assert isinstance(model.bn1, nn.Identity)
    assert set(optimizer.param_groups[0]["params"]) == set(result.model.parameters())


def test_kept_sites_are_the_same_batch_norms(convnet):
    converted = ns.convert(convnet, to="gn", keep=["bn2"]).model
    assert is_batch_norm(converted.bn2)
    assert torch.equal(converted.bn2.running_mean, convnet.bn2.running_mean)


def test_a_plan_for_another_model_is_an_error():
    plan = ns.plan(ConvNet(), to="gn")
    match = r"made for another model \(ConvNet\): bn1, there a BatchNorm2d, is not there in this Sequential"
    with pytest.raises(ConversionError, match=match):
        ns.convert(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), plan)
    other = ConvNet()
    other.bn1 = nn.BatchNorm2d(16)
    with pytest.raises(ConversionError, match="bn1 has 16 channels in this ConvNet, and 32 in the plan"):
        ns.convert(other, plan)


def test_plan_and_settings_exclude_each_other():
    plan = ns.plan(ConvNet(), to="gn")
    with pytest.raises(UsageError, match="a plan says it all: leave out to, groups"):
        ns.convert(ConvNet(), plan, to="ln", groups=4)
    with pytest.raises(UsageError, match="a plan says it all: leave out balance"):
        ns.convert(ConvNet(), plan, balance=False)
    with pytest.raises(UsageError, match="say what to convert to"):
        ns.convert(ConvNet())


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (torch.jit.script, "convert the Python model before scripting it"),
        (lambda model: torch.compile(model, backend="eager"), r"convert model\._orig_mod, then compile the result"),
    ],
    ids=["scripted", "compiled"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_scripted_and_compiled_models_are_turned_away_with_the_way_out(wrap, message):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    wrapped = wrap(model)
    for attempt in (
        lambda: ns.convert(wrapped, ns.plan(model, to="ln")),
        lambda: ns.convert(wrapped, to="ln"),
        lambda: ns.convert_(wrapped, to="ln"),
        lambda: ns.plan(wrapped, to="ln"),
        lambda: ns.swap_layers(wrapped, nn.Conv2d, lambda layer: layer),
    ):
        with pytest.raises(ConversionError, match=message):
            attempt()


def test_a_bare_batch_norm_has_to_be_wrapped():
    with pytest.raises(ConversionError, match=r"wrap it, as in nn\.Sequential\(model\)"):
        ns.convert(nn.BatchNorm2d(8), to="gn", example_inputs=torch.randn(2, 8, 4, 4))


def test_as_graph_gives_a_graph_module_of_the_same_function():
    model = randomise_(timm.create_model("test_resnet")).double().eval()
    result = ns.convert(model, to="affine", as_graph=True)
    assert isinstance(result.model, torch.fx.GraphModule)
    x = torch.randn(1, 3, 160, 160, dtype=torch.float64)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-9, atol=1e-9)


def test_softening_moves_every_target_towards_the_fixed_affine():
    model = randomise_(ConvNet()).double().eval()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    expected = model.bn1(model.conv1(x))
    for target in ("gn", "ln", "rms", "ln2d", "in"):
        gaps = []
        for eps in (1e-3, 1e6):
            converted = ns.convert(model, to=target, eps=eps, verdict=False).model
            gaps.append((converted.bn1(converted.conv1(x)) - expected).square().mean().item())
        assert gaps[1] <= gaps[0], target
