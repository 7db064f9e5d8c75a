"""Checkpoints: what goes in comes out, and reading runs no code."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import ConvNet, randomise_
from safetensors import safe_open
from torch import Tensor, nn

import normsurgeon as ns
from normsurgeon.errors import CheckpointError
from normsurgeon.models.checkpoint import origin_of
from normsurgeon.norms.target_names import TARGET_NAMES

ENDINGS = (".safetensors", ".pt")


def no_say(message: str) -> None:
    raise AssertionError(f"nothing was to be said, and this was: {message}")


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return randomise_(ns.load("test_resnet", pretrained=False))


@pytest.fixture(scope="module")
def images_NCHW() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def converted(model: nn.Module, **settings) -> ns.Conversion:
    """A conversion without a verdict, which no file holds."""
    return ns.convert(model, verdict=False, **{"example_inputs": torch.zeros(2, 3, 32, 32), **settings})


@torch.no_grad()
def same_function(one: nn.Module, other: nn.Module, images_NCHW: Tensor) -> bool:
    return torch.equal(one(images_NCHW), other(images_NCHW))


# Round trips


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("to", TARGET_NAMES)
def test_a_conversion_comes_back_bit_for_bit(resnet, images_NCHW, tmp_path, to: str, ending: str) -> None:
    result = converted(resnet, to=to, keep=["bn1"])
    loaded = ns.load(ns.save(result, tmp_path / f"net{ending}", on_message=no_say), on_message=no_say)
    assert type(loaded) is type(resnet)
    assert not loaded.training
    assert str(loaded) == str(result.model)
    assert same_function(loaded, result.model, images_NCHW)


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_plan_and_the_history_come_back(resnet, tmp_path, ending: str) -> None:
    result = converted(resnet, to="gn", groups=4, set={"layer4.*": "ln"}, eps=0.5)
    result.history.append({"event": "calibrated", "images": 128})
    origin = origin_of(ns.load(ns.save(result, tmp_path / f"net{ending}")))
    assert origin.plans == (result.plan,)
    assert origin.history == ({"event": "calibrated", "images": 128},)
    assert (origin.source.kind, origin.source.name) == ("timm", "test_resnet")


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_softened_conversion_comes_back_with_its_eps(resnet, images_NCHW, tmp_path, ending: str) -> None:
    result = converted(resnet, to="gn", eps=0.5)
    loaded = ns.load(ns.save(result, tmp_path / f"net{ending}", on_message=no_say))
    assert same_function(loaded, result.model, images_NCHW)


def test_a_file_from_before_eps_went_with_the_scale_has_the_originals_eps(resnet, images_NCHW, tmp_path) -> None:
    result = converted(resnet, to="gn")
    folded = [site for site in result.sites if site.folds]
    for site in folded:
        result.model.get_submodule(site.name).eps = site.site.eps  # as conversions were then
    path = ns.save(result, tmp_path / "net.pt")
    content = torch.load(path, weights_only=True)
    header = json.loads(content["normsurgeon"]) if isinstance(content["normsurgeon"], str) else content["normsurgeon"]
    header["eps"] = {}
    content["normsurgeon"] = json.dumps(header) if isinstance(content["normsurgeon"], str) else header
    torch.save(content, path)
    loaded = ns.load(path)
    assert folded
    assert {loaded.get_submodule(site.name).eps for site in folded} == {1e-5}
    assert torch.equal(loaded.eval()(images_NCHW), result.model.eval()(images_NCHW))


def test_converting_a_loaded_conversion_again_replays_both_plans(resnet, images_NCHW, tmp_path) -> None:
    first = converted(resnet, to="gn", keep=["layer3.*", "layer4.*"])
    halfway = ns.load(ns.save(first, tmp_path / "first.safetensors"))
    second = converted(halfway, to="ln")
    assert second.counts == {"converted": 7, "kept": 0, "refused": 0}
    loaded = ns.load(ns.save(second, tmp_path / "second.safetensors", on_message=no_say))
    assert origin_of(loaded).plans == (first.plan, second.plan)
    assert same_function(loaded, second.model, images_NCHW)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_graph_module_comes_back_into_the_original(resnet, images_NCHW, tmp_path, ending: str) -> None:
    result = converted(resnet, to="gn", as_graph=True)
    loaded = ns.load(ns.save(result, tmp_path / f"net{ending}"), model=resnet)
    assert isinstance(loaded, torch.fx.GraphModule)
    assert same_function(loaded, result.model, images_NCHW)


def test_a_timm_model_made_elsewhere_comes_back_with_its_classes_and_channels(tmp_path) -> None:
    result = converted(
        timm.create_model("test_efficientnet", num_classes=3, in_chans=1).eval(),
        to="rms",
        example_inputs=torch.zeros(2, 1, 32, 32),
    )
    loaded = ns.load(ns.save(result, tmp_path / "net.pt", on_message=no_say))
    assert same_function(loaded, result.model, torch.randn(2, 1, 64, 64))


def test_a_head_that_was_exchanged_comes_back(images_NCHW, tmp_path) -> None:
    model = ns.load("test_resnet", pretrained=False)
    model.reset_classifier(3)
    result = converted(model, to="ln")
    assert same_function(ns.load(ns.save(result, tmp_path / "net.pt", on_message=no_say)), result.model, images_NCHW)


def test_a_model_made_with_arguments_that_cannot_be_known_is_not_rebuilt_without_them(images_NCHW, tmp_path) -> None:
    """The same tensors would fit, and the function would be another."""
    dilated = timm.create_model("test_resnet", output_stride=8).eval()
    result = converted(dilated, to="gn")
    path = ns.save(result, tmp_path / "net.pt", on_message=lambda message: None)
    with pytest.raises(CheckpointError, match="its architecture is not in the file"):
        ns.load(path)
    assert same_function(ns.load(path, model=dilated), result.model, images_NCHW)


def test_saving_the_model_instead_of_the_conversion_is_said(resnet, images_NCHW, tmp_path) -> None:
    said, path = [], tmp_path / "net.pt"
    model = converted(resnet, to="gn").model
    ns.save(model, path, on_message=said.append)
    assert said == [
        f"{path}: the model's layers are not those of test_resnet (changed by hand, or the .model of a "
        "conversion saved instead of the conversion): loading it takes load(path, model=one built alike)"
    ]
    assert same_function(ns.load(path, model=model), model, images_NCHW)


def test_constructor_arguments_that_are_code_do_not_go_into_the_file(images_NCHW, tmp_path) -> None:
    model = ns.load("test_resnet", pretrained=False, act_layer=nn.SiLU)
    said = []
    path = ns.save(converted(model, to="ln"), tmp_path / "net.pt", on_message=said.append)
    assert len(said) == 1
    assert same_function(ns.load(path, model=model), converted(model, to="ln").model, images_NCHW)


def test_a_model_made_by_hand_is_loaded_into_the_original(convnet, images_NCHW, tmp_path) -> None:
    result, messages = converted(convnet, to="gn"), []
    path = ns.save(result, tmp_path / "net.safetensors", on_message=messages.append)
    assert messages == [
        f"{path}: ConvNet is none of timm's or torchvision's networks, and its architecture is not in the file: "
        "loading it takes load(path, model=the BatchNorm model)"
    ]
    blank = ConvNet()
    assert same_function(ns.load(path, model=blank), result.model, images_NCHW)
    assert isinstance(blank.bn1, nn.BatchNorm2d)
    with pytest.raises(CheckpointError) as caught:
        ns.load(path)
    assert str(caught.value) == (
        f"{path} was saved from a model made by hand, and its architecture is not in the file; "
        "try: normsurgeon.load(path, model=the BatchNorm model)"
    )


@pytest.mark.parametrize("ending", ENDINGS)
def test_tied_weights_stay_tied(images_NCHW, tmp_path, ending: str) -> None:
    class Tied(ConvNet):
        def __init__(self) -> None:
            super().__init__()
            self.conv3 = self.conv2

    model = randomise_(Tied()).eval()
    result = converted(model, to="ln")
    path = ns.save(result, tmp_path / f"net{ending}", on_message=lambda message: None)
    loaded = ns.load(path, model=model)
    assert loaded.conv3 is loaded.conv2
    assert same_function(loaded, result.model, images_NCHW)


def test_a_pt_file_is_of_plain_types(resnet, tmp_path) -> None:
    path = ns.save(converted(resnet, to="gn"), tmp_path / "net.pt")
    content = torch.load(path, weights_only=True)
    assert sorted(content) == ["normsurgeon", "state_dict"]
    assert content["normsurgeon"]["plan"]["target"] == "gn"


def test_the_header_holds_what_the_contract_says(resnet, tmp_path) -> None:
    path = ns.save(converted(resnet, to="gn"), tmp_path / "net.safetensors")
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["normsurgeon"])
    assert header["format"] == 1
    assert header["source"] == {"kind": "timm", "name": "test_resnet", "kwargs": {}}
    assert len(header["plan"]["sites"]) == 15
    assert header["history"] == []


# Code in, and named by, a file


class Trap:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("ending", [".pt", ".pth", ".bin"])
def test_a_pickle_with_code_in_it_is_not_run(resnet, tmp_path, ending: str) -> None:
    path, marker = tmp_path / f"net{ending}", tmp_path / "marker"
    torch.save({"state_dict": resnet.state_dict(), "hook": Trap(marker)}, path)
    with pytest.raises(CheckpointError) as caught:
        ns.load(path)
    assert str(caught.value) == (
        f"{path} holds pickled code (posix.system), which would run on reading, and is not opened; "
        "try: save model.state_dict() alone, or use safetensors"
    )
    assert not marker.exists()


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_callable_that_a_file_names_is_not_run(tmp_path, monkeypatch, ending: str) -> None:
    marker = tmp_path / "marker"
    sys.modules.pop("trap_nets", None)
    (tmp_path / "trap_nets.py").write_text(
        f"from pathlib import Path\nfrom conftest import ConvNet as build\nPath({str(marker)!r}).touch()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    result = converted(ns.load("trap_nets:build"), to="gn")
    path = ns.save(result, tmp_path / f"net{ending}")
    marker.unlink()
    sys.modules.pop("trap_nets")
    with pytest.raises(CheckpointError) as caught:
        ns.load(path)
    assert not marker.exists()
    assert str(caught.value) == (
        f"{path} was made from trap_nets:build, which is code, and a file does not decide what code runs; "
        f"try: trap_nets:build --weights FILE (in Python: load('trap_nets:build', weights=path))"
    )
    loaded = ns.load("trap_nets:build", weights=path, on_message=no_say)
    assert same_function(loaded, result.model, torch.randn(2, 3, 16, 16))
    assert origin_of(loaded).plans == (result.plan,)


# Networks made in Python, and the bytes of a file


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_is_the_same_bytes_each_time(tmp_path, ending: str) -> None:
    torch.manual_seed(0)
    model = ns.load("test_resnet", pretrained=False)
    one, other = (ns.save(model, tmp_path / f"{name}{ending}") for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("classes", [1000, 7])
def test_a_network_of_torchvision_made_in_python_comes_back_by_name(tmp_path, classes: int) -> None:
    from torchvision import models

    torch.manual_seed(0)
    model = models.shufflenet_v2_x0_5(num_classes=classes).eval()
    result = ns.convert(model, to="gn", verdict=False, balance=False, example_inputs=torch.zeros(2, 3, 64, 64))
    loaded = ns.load(ns.save(result, tmp_path / "net.pt", on_message=no_say), on_message=no_say)
    assert origin_of(loaded).source.name == "shufflenet_v2_x0_5"
    assert same_function(loaded, result.model, torch.randn(1, 3, 64, 64))


def test_a_network_of_torchvision_with_another_layer_is_said_to_be_unknown_when_it_is_saved(tmp_path) -> None:
    from torchvision import models

    model, said = models.shufflenet_v2_x0_5(num_classes=7), []
    model.fc = nn.Sequential(model.fc, nn.ReLU())
    ns.save(model, tmp_path / "net.pt", on_message=said.append)
    assert said == [
        f"{tmp_path / 'net.pt'}: ShuffleNetV2 is none of timm's or torchvision's networks, and its architecture is "
        "not in the file: loading it takes load(path, model=one built alike)"
    ]
