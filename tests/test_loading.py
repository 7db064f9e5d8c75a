"""From a name or a file to a model, and one clear line when that fails."""

from __future__ import annotations

import argparse
import logging
import socket
import time
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import normsurgeon as ns
from normsurgeon.errors import CheckpointError, LoadingError, UsageError, WeightsUnavailableError
from normsurgeon.models.checkpoint import origin_of

TWO_WAYS_ON = (
    "try: --weights FILE (a state dict you have; weights=… in Python), "
    "or --random-init (pretrained=False) for the architecture alone"
)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet").eval()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unresolved(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))


# Names


def test_a_timm_name_gives_the_model_in_eval_mode() -> None:
    model = ns.load("test_resnet", pretrained=False, num_classes=7, in_chans=1)
    assert not model.training
    assert model(torch.zeros(1, 1, 64, 64)).shape == (1, 7)


def test_an_unknown_tag_lists_the_real_ones() -> None:
    with pytest.raises(LoadingError) as caught:
        ns.load("test_resnet.imagenet22k", pretrained=False)
    assert str(caught.value) == "timm's test_resnet has no weights 'imagenet22k'; it has: r160_in1k"


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("resnet5o", r"^unknown timm model 'resnet5o'; did you mean resnet\d+"),
        ("qqqqqq", r"^unknown timm model 'qqqqqq'; timm.list_models\(\) lists the names$"),
        ("torchvision:resnt18", r"^unknown torchvision model 'resnt18'; did you mean resnet18"),
        (
            "torchvision:qqqq",
            r"^unknown torchvision model 'qqqq'; torchvision.models.list_models\(\) lists the names$",
        ),
    ],
)
def test_an_unknown_name_offers_the_closest_real_ones(spec: str, line: str) -> None:
    with pytest.raises(LoadingError, match=line):
        ns.load(spec)


def test_an_argument_that_the_constructor_does_not_take_is_named() -> None:
    with pytest.raises(LoadingError, match=r"^timm could not create test_resnet: TypeError: .*'colour'"):
        ns.load("test_resnet", pretrained=False, colour="blue")


def test_a_torchvision_name_brings_its_preprocessing() -> None:
    model = ns.load("torchvision:squeezenet1_0", pretrained=False)
    assert type(model).__module__ == "torchvision.models.squeezenet"
    assert model.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)


@pytest.mark.usefixtures("no_network")
def test_a_torchvision_model_without_weights_downloads_no_backbone() -> None:
    with torch.device("meta"):
        model = ns.load("torchvision:lraspp_mobilenet_v3_large", pretrained=False)
    assert isinstance(model, nn.Module)


@pytest.mark.parametrize(("classes", "said"), [(7, True), (1000, False), (0, False)])
def test_a_new_classifier_beside_published_weights_is_said_to_be_random(monkeypatch, classes: int, said: bool) -> None:
    made = timm.create_model("test_resnet", num_classes=classes)
    monkeypatch.setattr("normsurgeon.models.load.build", lambda source, pretrained: made)
    messages = []
    ns.load("test_resnet", num_classes=classes, on_message=messages.append)
    line = "test_resnet: the classifier has random weights: 7 classes, not 1000"
    assert messages == ([line] if said else [])


# Functions of one's own


@pytest.fixture
def my_nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets.py").write_text(
        "import torch.nn as nn\n"
        "def build(width=4): return nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width))\n"
        "def wrong(): return [1]\n"
        "def broken(): raise ValueError('no such width')\n"
        "ready = nn.Sequential(nn.ReLU())\n"
        "number = 3\n"
    )
    (tmp_path / "my_broken_nets.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("my_nets")
def test_a_callable_of_ones_own_makes_the_model() -> None:
    assert ns.load("my_nets:build", width=8)[1].num_features == 8
    assert isinstance(ns.load("my_nets:ready")[0], nn.ReLU)


@pytest.mark.usefixtures("my_nets")
@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("my_nets:wrong", r"^my_nets:wrong returned list; it must return an nn.Module$"),
        ("my_nets:broken", r"^my_nets:broken failed with ValueError: no such width$"),
        ("my_nets:number", r"^my_nets:number is a int, and a callable was expected$"),
        ("my_nets:missing", r"^'my_nets:missing': AttributeError: .* given as package.module:callable$"),
        ("no_such_nets:build", r"^'no_such_nets:build': ModuleNotFoundError: .* package.module:callable$"),
        (
            "my_broken_nets:build",
            r"^'my_broken_nets:build': importing my_broken_nets failed with ZeroDivisionError",
        ),
    ],
)
def test_a_callable_that_makes_no_model_is_one_line(spec: str, line: str) -> None:
    with pytest.raises(LoadingError, match=line):
        ns.load(spec)


# Without a network


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("spec", ["test_resnet", "test_resnet.r160_in1k", "torchvision:squeezenet1_1"])
def test_without_a_network_the_line_comes_at_once_and_names_both_ways_on(spec: str) -> None:
    started = time.monotonic()
    with pytest.raises(WeightsUnavailableError) as caught:
        ns.load(spec)
    assert time.monotonic() - started < 5
    line = str(caught.value)
    assert line.startswith(f"the published weights of {spec} are out of reach (no connection")
    assert line.endswith(TWO_WAYS_ON)
    assert "\n" not in line


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("pretrained", [True, False])
def test_offline_a_hub_id_is_an_error_that_names_other_sources(pretrained: bool) -> None:
    with pytest.raises(WeightsUnavailableError) as caught:
        ns.load("hf-hub:timm/test_resnet.r160_in1k", pretrained=pretrained)
    assert str(caught.value) == (
        "hf-hub:timm/test_resnet.r160_in1k is out of reach (no connection to the Hugging Face hub, "
        "and not in its cache), and its configuration with it; "
        "try: the timm name of its architecture, with --weights FILE or --random-init"
    )


@pytest.mark.usefixtures("no_network")
def test_looking_for_weights_leaves_the_hub_client_as_it_was() -> None:
    from huggingface_hub import constants

    logger = logging.getLogger("huggingface_hub")
    before = (constants.HF_HUB_OFFLINE, logger.level)
    with pytest.raises(WeightsUnavailableError, match="out of reach"):
        ns.load("test_resnet")
    assert (constants.HF_HUB_OFFLINE, logger.level) == before


@pytest.mark.usefixtures("no_network")
def test_a_download_announces_itself_on_standard_error_only(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WeightsUnavailableError, match="out of reach"):
        ns.load("torchvision:squeezenet1_1")
    assert capsys.readouterr().out == ""


def test_an_architecture_that_never_had_weights_says_so() -> None:
    name = next(name for name in timm.list_models("resnet*") if not timm.is_model_pretrained(name))
    with pytest.raises(WeightsUnavailableError) as caught:
        ns.load(name)
    assert str(caught.value) == f"timm has no published weights for {name}; {TWO_WAYS_ON}"


# Files as MODEL


def test_a_timm_training_checkpoint_loads_by_its_arch(resnet, tmp_path) -> None:
    content = {"arch": "test_resnet", "epoch": 3, "state_dict": resnet.state_dict(), "metric": 0.7}
    torch.save({**content, "args": argparse.Namespace(model="test_resnet", lr=0.1)}, tmp_path / "last.pth.tar")
    assert same_weights(ns.load(tmp_path / "last.pth.tar"), resnet)


def test_a_state_dict_named_like_an_architecture_loads_with_its_classes_and_channels(tmp_path) -> None:
    small = timm.create_model("test_resnet", num_classes=5, in_chans=1)
    torch.save(small.state_dict(), tmp_path / "test_resnet-0123abc.pth")
    model = ns.load(str(tmp_path / "test_resnet-0123abc.pth"))
    assert same_weights(model, small)
    assert dict(origin_of(model).source.kwargs) == {"num_classes": 5, "in_chans": 1}


def test_a_state_dict_of_an_unknown_architecture_says_how_to_name_it(resnet, tmp_path) -> None:
    path = tmp_path / "best.pth"
    torch.save(resnet.state_dict(), path)
    with pytest.raises(CheckpointError) as caught:
        ns.load(path)
    assert str(caught.value) == (
        f"{path} holds weights but does not say of which architecture; "
        f"try: the architecture's name with --weights {path} (in Python: load(name, weights=…))"
    )


def test_a_state_dict_loads_into_a_copy_of_ones_own_model(convnet, tmp_path) -> None:
    blank = type(convnet)()
    before = blank.conv1.weight.clone()
    torch.save(convnet.state_dict(), tmp_path / "w.pt")
    assert same_weights(ns.load(tmp_path / "w.pt", model=blank), convnet)
    assert torch.equal(blank.conv1.weight, before)


def test_a_file_of_weights_and_other_weights_exclude_each_other(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"^a.pt is a file of weights already: leave out weights=b.pt$"):
        ns.load("a.pt", weights="b.pt")


@pytest.mark.parametrize("spec", ["nowhere/model.safetensors", "nowhere/model", "missing.pt"])
def test_a_missing_file_is_not_taken_for_a_timm_name(spec: str) -> None:
    with pytest.raises(CheckpointError, match=f"^there is no file {spec}$"):
        ns.load(spec)
