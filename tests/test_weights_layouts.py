"""Checkpoints as people have them: each loads, with one line on what was left out, or is refused in one right line."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import json
import pathlib
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import normsurgeon as ns
from normsurgeon.errors import CheckpointError, UsageError
from normsurgeon.models import stand_ins
from normsurgeon.models.state_dict import load_state_dict_into, read_file, restore_

NAME = "test_resnet"
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(NAME).eval()


@pytest.fixture(scope="module")
def state(resnet) -> State:
    return resnet.state_dict()


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def other(state: State) -> State:
    """Another network of the same architecture."""
    return {key: torch.zeros_like(value) for key, value in state.items()}


def counted(state: State) -> State:
    """As thop leaves it: two counters in every module."""
    modules = dict.fromkeys(key.rpartition(".")[0] for key in state)
    names = [f"{module}.{name}" for module in modules for name in ("total_ops", "total_params")]
    return {**state, "total_ops": torch.zeros(1), **dict.fromkeys(names, torch.zeros(1))}


def optimizer(state: State) -> dict[str, Any]:
    parameter = nn.Parameter(torch.zeros(3))
    adam = torch.optim.Adam([parameter])
    parameter.sum().backward()
    adam.step()
    return adam.state_dict()


def lightning(state: State, **more: Tensor) -> dict[str, Any]:
    return {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": {**state, **more},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.7), "dirpath": "runs"}},
        "optimizer_states": [optimizer(state)],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": 0.1},
    }


def averaged(state: State) -> State:
    """torch's own AveragedModel, made from the network."""
    model = timm.create_model(NAME)
    model.load_state_dict(state)
    return AveragedModel(model).state_dict()


def compiled_within(state: State) -> State:
    """torch.compile of one stage only."""
    return {key.replace("layer1.", "layer1._orig_mod."): value for key, value in state.items()}


METRIC = {"metric.total": torch.zeros(1)}
CRITERION = {"criterion.weight": torch.ones(1000)}
PLAIN = ("", None)

LOADS: dict[str, tuple[Callable[[State], Any], str | None]] = {
    # layout: (what is saved, what is said)
    "a state dict": (lambda s: s, None),
    "state_dict": (lambda s: {"state_dict": s, "epoch": 3}, None),
    "model": (lambda s: {"model": s, "optimizer": optimizer(s), "scaler": {"scale": 2.0}}, None),
    "net": (lambda s: {"net": s, "acc": 93.1, "epoch": 199}, None),
    "model_state": (lambda s: {"model_state": s}, None),
    "model_state_dict": (lambda s: {"model_state_dict": s, "loss": torch.tensor(0.1)}, "left out loss"),
    "one's own name": (lambda s: {"backbone_weights": s, "optim": optimizer(s)}, None),
    "two dictionaries deep": (lambda s: {"checkpoint": {"model": s}, "step": 3}, None),
    "state_dict_ema": (lambda s: {"state_dict_ema": s}, None),
    "DDP": (lambda s: under("module.", s), None),
    "torch.compile": (lambda s: under("_orig_mod.", s), None),
    "torch.compile of DDP": (lambda s: {"model": under("_orig_mod.module.", s)}, None),
    "torch.compile of a stage": (compiled_within, None),
    "activation checkpointing": (
        lambda s: {k.replace("layer1.", "layer1._checkpoint_wrapped_module."): v for k, v in s.items()},
        None,
    ),
    "AveragedModel": (averaged, "took the tensors of module; left out n_averaged"),
    "Lightning": (lambda s: lightning(under("model.", s)), "took the tensors of state_dict.model; left out callbacks"),
    "Lightning beside a criterion": (
        lambda s: lightning(under("model.", s), **CRITERION),
        "left out state_dict.criterion, callbacks",
    ),
    "Lightning beside a metric": (
        lambda s: lightning(under("net.", s), **METRIC),
        "took the tensors of state_dict.net; left out state_dict.metric, callbacks",
    ),
    "Lightning of DDP": (lambda s: lightning(under("model.module.", s)), "took the tensors of state_dict.model.module"),
    "thop's counters": (counted, "left out total_ops, total_params"),
    "timm's training script": (
        lambda s: {
            "arch": NAME,
            "epoch": 3,
            "state_dict": s,
            "optimizer": optimizer(s),
            "metric": 0.7,
            "version": 2,
            "args": argparse.Namespace(model=NAME),
        },
        None,
    ),
    "torchvision's training script": (
        lambda s: {
            "model": s,
            "optimizer": optimizer(s),
            "lr_scheduler": {"last_epoch": 3},
            "epoch": 3,
            "args": argparse.Namespace(model=NAME),
        },
        None,
    ),
    "NumPy scalars and arrays": (
        lambda s: {"state_dict": s, "best": np.float64(0.7), "curve": np.arange(3.0), "step": np.int64(3)},
        None,
    ),
    "paths and dates": (
        lambda s: {"model": s, "path": pathlib.Path("runs/1"), "when": datetime.datetime(2026, 1, 1)},
        None,
    ),
    "a defaultdict": (lambda s: {"model": s, "history": collections.defaultdict(list, loss=[1.0])}, None),
    "without batch counters": (lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")}, None),
    "parameters": (
        lambda s: OrderedDict((k, nn.Parameter(v) if v.is_floating_point() else v) for k, v in s.items()),
        None,
    ),
    "other names in a dictionary": (lambda s: {"state_dict": renamed(s), "epoch": 3}, "were matched in order"),
    "other names under a prefix": (lambda s: {"state_dict": under("model.", renamed(s))}, "were matched in order"),
    "one network under two names": (lambda s: {"model": s, "best_model": dict(s)}, "took the tensors of model"),
}


@pytest.mark.parametrize("layout", LOADS)
def test_it_loads_and_what_was_left_out_is_said(state, tmp_path, layout: str) -> None:
    make, line = LOADS[layout]
    path, said = tmp_path / "w.pt", []
    torch.save(make(state), path)
    loaded = ns.load(NAME, weights=path, on_message=said.append)
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items() if "num_batches" not in key)
    if line is None:
        assert said == []
    else:
        assert len(said) == 1
        assert said[0].startswith(f"{path}: ")
        assert line in said[0]
        assert "\n" not in said[0]


@dataclass
class Settings:
    """A class of the user's own, pickled beside the weights."""

    lr: float = 0.1


def zipped(names: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def saved(content: Any, **kwargs: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **kwargs)
    return buffer.getvalue()


def scripted(state: State) -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Sequential(nn.Linear(2, 2))), buffer)
    return buffer.getvalue()


def numpy_archive(state: State) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{"conv1.0.weight": state["conv1.0.weight"].numpy()})
    return buffer.getvalue()


def detectron2(state: State) -> bytes:
    model = {"stem.conv1.weight": np.zeros((4, 3, 3, 3), np.float32)}
    return pickle.dumps({"model": model, "__author__": "Caffe2", "matching_heuristics": True})


def renamed(state: State) -> State:
    return {
        key.replace("layer", "stage").replace("bn", "norm"): value
        for key, value in state.items()
        if "num_batches" not in key
    }


def quantized(state: State) -> State:
    return {**state, "conv1.0.weight": state["conv1.0.weight"].mul(100).to(torch.int8)}


def wider(state: State) -> State:
    return {**state, "conv1.0.weight": torch.cat([state["conv1.0.weight"]] * 2)}


REFUSED: dict[str, tuple[Callable[[State], bytes], str]] = {
    "beside a moving average": (
        lambda s: saved({"state_dict": {**under("net.", s), **under("ema_net.", other(s))}}),
        r"w.pt holds 2 networks that fit: state_dict.net, state_dict.ema_net; say which: "
        r"--weights-prefix state_dict.net \(in Python: weights_prefix='state_dict.net'\)$",
    ),
    "student and teacher": (
        lambda s: saved({"student": s, "teacher": other(s)}),
        r"w.pt holds 2 networks that fit: student, teacher; say which: --weights-prefix student",
    ),
    "two networks with other names": (
        lambda s: saved({"student": renamed(s), "teacher": renamed(other(s))}),
        r"w.pt holds 2 networks that fit: student, teacher; say which",
    ),
    "a whole module": (
        lambda s: saved(timm.create_model(NAME)),
        r"w.pt holds pickled code \(timm.models.resnet.ResNet\), which would run on reading, and is not opened; try",
    ),
    "a whole module among others": (
        lambda s: saved({"model": nn.Conv2d(1, 1, 1), "epoch": 3}),
        r"w.pt holds pickled code \(torch.nn.modules.conv.Conv2d\)",
    ),
    "settings of one's own class": (
        lambda s: saved({"model": s, "config": Settings()}),
        r"w.pt holds pickled code \(test_weights_layouts.Settings\)",
    ),
    "TorchScript": (scripted, r"w.pt is a TorchScript program, which is code; try: torch.save\(model"),
    "an optimizer alone": (lambda s: saved(optimizer(s)), r"w.pt holds the state of an optimizer, and no weights; try"),
    "an optimizer and a step": (
        lambda s: saved({"optimizer": optimizer(s), "step": 3}),
        r"w.pt holds no tensors, and a state dict was expected; it has optimizer, step$",
    ),
    "NumPy arrays": (
        lambda s: saved({key: value.numpy() for key, value in s.items()}),
        r"w.pt holds \d+ NumPy arrays, and no tensors; try: torch.from_numpy on each, then torch.save$",
    ),
    "an archive of NumPy": (numpy_archive, r"w.pt is an archive of NumPy arrays; try: torch.from_numpy on each"),
    "Detectron2": (
        detectron2,
        r"w.pt is a pickle of Detectron2, with NumPy arrays under names of its own; try: load it with",
    ),
    "another ZIP archive": (
        lambda s: zipped({"weights/w.pth": b"1"}),
        r"w.pt is a ZIP archive and no checkpoint; try: unpack it",
    ),
    "torch.export": (
        lambda s: zipped({"w/models/model.json": b"{}"}),
        r"w.pt is a program of torch.export; try: torch.save",
    ),
    "a pointer of Git LFS": (
        lambda s: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
        r"w.pt is a pointer of Git LFS, and the weights were not fetched; try: git lfs pull$",
    ),
    "a web page": (
        lambda s: b"<!DOCTYPE html><html>" * 9,
        r"w.pt is a page of the web, not weights: the download needs",
    ),
    "Keras": (lambda s: b"\x89HDF\r\n\x1a\n" + bytes(99), r"w.pt is an HDF5 file, as Keras writes it"),
    "gzip": (lambda s: b"\x1f\x8b" + bytes(99), r"w.pt is compressed with gzip; try: gunzip"),
    "a list of tensors": (lambda s: saved(list(s.values())), r"w.pt holds a list, and a state dict was expected$"),
    "quantized": (
        lambda s: saved(quantized(s)),
        r"does not fit ResNet: conv1.0.weight is int8 in the file: quantized weights",
    ),
    "the meta device": (
        lambda s: saved({key: value.to("meta") for key, value in s.items()}),
        r"w.pt: conv1.0.weight is not a plain tensor with values$",
    ),
    "pruned": (
        lambda s: saved({("fc.weight_orig" if k == "fc.weight" else k): v for k, v in s.items()}),
        r"does not fit ResNet: tensors 1 missing \(fc.weight\) and 1 left over \(fc.weight_orig\)",
    ),
    "a criterion among the network's own": (
        lambda s: saved({**s, **CRITERION}),
        r"does not fit ResNet: tensors 1 left over \(criterion.weight\); is it another architecture\?$",
    ),
    "another width": (
        lambda s: saved(wider(s)),
        r"conv1.0.weight has shape \(\d+, 3, 3, 3\) in the file and \(\d+, 3, 3, 3\) in the model; another",
    ),
}


@pytest.mark.parametrize("layout", REFUSED)
def test_it_is_refused_in_one_line_that_says_what_it_is(state, tmp_path, layout: str) -> None:
    make, line = REFUSED[layout]
    path = tmp_path / "w.pt"
    path.write_bytes(make(state))
    with pytest.raises(CheckpointError, match=line) as caught:
        ns.load(NAME, weights=path)
    assert "\n" not in str(caught.value)


# Several networks in one file


@pytest.mark.parametrize(
    ("prefix", "first"),
    [("state_dict.net", True), ("net", True), ("ema_net.", False), ("state_dict.ema_net", False)],
)
def test_the_prefix_chooses_the_network(state, tmp_path, prefix: str, first: bool) -> None:
    torch.save({"state_dict": {**under("net.", state), **under("ema_net.", other(state))}}, tmp_path / "w.pt")
    said = []
    loaded = ns.load(NAME, weights=tmp_path / "w.pt", weights_prefix=prefix, on_message=said.append)
    assert bool(loaded.fc.weight.any()) == first
    assert len(said) == 1
    assert f"left out state_dict.{'ema_net' if first else 'net'}" in said[0]


def test_a_network_at_the_root_beside_its_average_is_chosen_by_an_empty_prefix(state, tmp_path) -> None:
    torch.save({**state, **under("ema.", other(state))}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r'holds 2 networks that fit: "", ema; say which: --weights-prefix ""'):
        ns.load(NAME, weights=tmp_path / "w.pt")
    loaded = ns.load(NAME, weights=tmp_path / "w.pt", weights_prefix="", on_message=lambda line: None)
    assert loaded.fc.weight.any()


def test_a_prefix_under_which_there_is_nothing_offers_those_that_fit(state, tmp_path) -> None:
    torch.save({"student": state, "teacher": other(state)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"w.pt has no such network under 'studnt'; did you mean student\?$"):
        ns.load(NAME, weights=tmp_path / "w.pt", weights_prefix="studnt")


def test_a_prefix_without_a_file_of_weights_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^weights_prefix='net' is of a file of weights, and none is given$"):
        ns.load(NAME, pretrained=False, weights_prefix="net")


def test_matching_in_order_takes_the_network_that_was_chosen(state, tmp_path) -> None:
    torch.save({"student": renamed(state), "teacher": renamed(other(state))}, tmp_path / "w.pt")
    said = []
    loaded = ns.load(NAME, weights=tmp_path / "w.pt", weights_prefix="teacher", on_message=said.append)
    assert not loaded.fc.weight.any()
    assert ["matched in order" in line for line in said] == [True]


# Classes, channels, precision, versions


def test_classes_and_channels_are_read_from_the_weights(tmp_path) -> None:
    small = timm.create_model(NAME, num_classes=7, in_chans=1)
    torch.save({"net": small.state_dict()}, tmp_path / "w.pt")
    loaded = ns.load(NAME, weights=tmp_path / "w.pt")
    assert loaded(torch.zeros(1, 1, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize("to", [None, "gn", "fold"])
def test_of_a_file_that_says_what_it_is_for_too(tmp_path, to: str | None) -> None:
    original = ns.load(NAME, pretrained=False, num_classes=7, in_chans=1)
    ns.save(original if to is None else ns.convert(original, to=to), tmp_path / "w.pt")
    named = ns.load(NAME, weights=tmp_path / "w.pt")
    x = torch.randn(1, 1, 64, 64)
    assert torch.equal(named(x), ns.load(tmp_path / "w.pt")(x))


def test_what_the_user_says_goes_before_what_the_weights_show(tmp_path) -> None:
    torch.save(timm.create_model(NAME, num_classes=7).state_dict(), tmp_path / "w.pt")
    with pytest.raises(
        CheckpointError, match=r"fc.weight has shape \(7, \d+\) in the file and \(8, \d+\) in the model"
    ):
        ns.load(NAME, weights=tmp_path / "w.pt", num_classes=8)


def test_a_function_of_ones_own_gets_the_classes_where_it_takes_them(tmp_path, monkeypatch) -> None:
    (tmp_path / "counting_nets.py").write_text(
        "from torch import nn\n"
        "def build(num_classes=4): return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(8, num_classes))\n"
        "def fixed(): return build()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    torch.save({"2.weight": torch.ones(6, 8), "2.bias": torch.ones(6)} | small_convolution(), tmp_path / "w.pt")
    assert ns.load("counting_nets:build", weights=tmp_path / "w.pt")[2].out_features == 6
    with pytest.raises(CheckpointError, match=r"2.weight has shape \(6, 8\) in the file and \(4, 8\) in the model"):
        ns.load("counting_nets:fixed", weights=tmp_path / "w.pt")


def test_a_converted_network_of_ones_own_gets_the_classes_of_its_weights(tmp_path, monkeypatch) -> None:
    (tmp_path / "normed_nets.py").write_text(
        "from torch import nn\n"
        "def build(num_classes=4): return nn.Sequential(nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32), nn.ReLU(),\n"
        "    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    original = ns.load("normed_nets:build", pretrained=False, num_classes=6)
    ns.save(ns.convert(original, to="gn", example_inputs=torch.randn(2, 3, 8, 8)), tmp_path / "w.pt")
    assert ns.load("normed_nets:build", weights=tmp_path / "w.pt")[5].out_features == 6


def small_convolution() -> State:
    return {"0.weight": torch.ones(8, 3, 1, 1), "0.bias": torch.ones(8)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_precision_is_read_into_the_models(state, tmp_path, dtype: torch.dtype) -> None:
    half = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    torch.save(half, tmp_path / "w.pt")
    loaded = ns.load(NAME, weights=tmp_path / "w.pt")
    assert loaded.fc.weight.dtype == torch.float32
    assert torch.equal(loaded.fc.weight, half["fc.weight"].float())


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_a_versioned_module_loads_what_it_wrote(tmp_path, ending: str) -> None:
    """torchvision's MNASNet asks for the version of its format, which only the state dict itself carries."""
    torch.manual_seed(0)
    model = ns.load("torchvision:mnasnet0_5", pretrained=False, num_classes=3)
    path = tmp_path / f"w{ending}"
    if ending == ".pt":
        torch.save({"model": model.state_dict()}, path)
    else:
        save_file(model.state_dict(), path)
    loaded = ns.load("torchvision:mnasnet0_5", weights=path)
    assert torch.equal(loaded.classifier[1].weight, model.classifier[1].weight)
    again = ns.load(ns.save(model, tmp_path / f"own{ending}"))
    assert torch.equal(again.classifier[1].weight, model.classifier[1].weight)


def test_a_versioned_module_takes_back_a_plain_dictionary_of_its_weights() -> None:
    """As fine-tuning keeps the best network: what is no state dict of torch's carries no versions."""
    model = ns.load("torchvision:mnasnet0_5", pretrained=False, num_classes=3)
    kept = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    restore_(model, kept)
    assert not model.classifier[1].weight.any()


def test_the_format_of_torch_before_archives_loads(state, tmp_path) -> None:
    torch.save({"net": state}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(ns.load(NAME, weights=tmp_path / "w.pt").fc.weight, state["fc.weight"])


class Halved(nn.Module):
    """Its format before version 2 held twice the weight."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        if local_metadata.get("version", 1) < 2:
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"] / 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


@pytest.mark.parametrize(("version", "value"), [(1, 0.5), (2, 1.0), (None, 1.0), ("2; code", 1.0)])
def test_the_version_in_the_file_is_the_one_that_counts(tmp_path, version: Any, value: float) -> None:
    written = OrderedDict({"module.0.weight": torch.ones(2)})
    written._metadata = {"module.0": {"version": version}}
    torch.save({"state_dict": written}, tmp_path / "w.pt")
    model = nn.Sequential(Halved())
    load_state_dict_into(model, read_file(tmp_path / "w.pt")[0], "w.pt", print)
    assert model[0].weight.tolist() == [value, value]


# Folders and shards


def hub_folder(folder: Path, state: State, **config: Any) -> Path:
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_of_timms_on_the_hub_loads_with_its_preprocessing(tmp_path) -> None:
    small = timm.create_model(NAME, num_classes=7).eval()
    written = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "input_size": [3, 96, 96], "url": "x"}
    config = {"architecture": NAME, "num_classes": 7, "num_features": 64, "pretrained_cfg": written}
    folder = hub_folder(tmp_path / "net", small.state_dict(), **config)
    loaded = ns.load(str(folder))
    assert torch.equal(loaded.fc.weight, small.fc.weight)
    assert (ns.DataConfig.of(loaded).mean, ns.DataConfig.of(loaded).input_size) == ((0.5, 0.5, 0.5), (3, 96, 96))
    again = ns.load(ns.save(loaded, tmp_path / "again.pt"))
    assert ns.DataConfig.of(again) == ns.DataConfig.of(loaded)


def test_transformers_wrapper_of_timm_loads(state, tmp_path) -> None:
    folder = hub_folder(tmp_path / "net", under("timm_model.", state), architecture=NAME, model_type="timm_wrapper")
    assert torch.equal(ns.load(folder).fc.weight, state["fc.weight"])


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            {"architectures": ["ResNetForImageClassification"]},
            r"describes no architecture of timm \(it is of ResNetForImageClassification\); in Python: load\('",
        ),
        (
            {"architecture": NAME, "model_args": {"checkpoint_path": "evil.pth"}},
            r"with arguments of its own, which a file does not choose; try: --model-args checkpoint_path=evil.pth$",
        ),
        ({}, "describes no architecture of timm"),
    ],
)
def test_a_folder_that_cannot_be_made_says_what_it_is(state, tmp_path, config, line: str) -> None:
    with pytest.raises(CheckpointError, match=line):
        ns.load(hub_folder(tmp_path / "net", state, **config))


def test_a_folder_without_a_description_takes_a_name(state, tmp_path) -> None:
    folder = hub_folder(tmp_path / "net", state)
    (folder / "config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"holds weights but no config.json .*: the architecture's name with --weights"
    ):
        ns.load(folder)
    assert torch.equal(ns.load(NAME, weights=folder).fc.weight, state["fc.weight"])


def shards(folder: Path, state: State, ending: str) -> Path:
    """The weights in two files and an index, as Hugging Face splits what is large."""
    folder.mkdir()
    names = list(state)
    places = {}
    for number, part in enumerate((names[:20], names[20:]), 1):
        file = f"model-{number:05}-of-00002.{ending}"
        content = {key: state[key] for key in part}
        save_file(content, folder / file) if ending == "safetensors" else torch.save(content, folder / file)
        places |= dict.fromkeys(part, file)
    stem = "model" if ending == "safetensors" else "pytorch_model"
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_load_by_their_index_and_by_their_folder(state, tmp_path, ending: str) -> None:
    index = shards(tmp_path / "net", state, ending)
    for weights in (index, index.parent):
        assert torch.equal(ns.load(NAME, weights=weights).fc.weight, state["fc.weight"])


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"weight_map": {"a": "../secret.safetensors"}}', "is damaged: its shards must be files beside it$"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "is damaged: its shards must be files beside it$"),
        ('{"weight_map": {"a": "model.safetensors.index.json"}}', "is damaged: its shards must be files beside it$"),
        ('{"weight_map": {"a": "gone.safetensors"}}', r"1 of 1 shards are not there \(gone.safetensors\)$"),
        ('{"weight_map": 3}', "is no index of shards: it has no weight_map$"),
        ("[" * 100_000, r"is no JSON file \(\w+\)$"),
    ],
)
def test_an_index_reads_no_files_elsewhere(tmp_path, content: str, line: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=line):
        ns.load(NAME, weights=tmp_path / "model.safetensors.index.json")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            ".metadata",
            "is a folder of torch.distributed.checkpoint; try: python -m torch.distributed.checkpoint.format_u",
        ),
        ("zero_to_fp32.py", "is a folder of DeepSpeed; try: the zero_to_fp32.py in it, and what that writes$"),
    ],
)
def test_a_folder_of_another_library_says_so(tmp_path, name: str, line: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=line):
        ns.load(NAME, weights=tmp_path)


# What is read beside the tensors


def test_what_a_checkpoint_holds_beside_tensors_is_neither_imported_nor_called(state, tmp_path) -> None:
    content = {"model": {}, "best": np.float64(0.7), "path": pathlib.Path("runs"), "curve": np.arange(3.0)}
    torch.save({**content, "model": {"a": torch.zeros(1)}}, tmp_path / "w.pt")
    _, rest = read_file(tmp_path / "w.pt")
    assert {type(rest[key]).__mro__[1] for key in ("best", "path", "curve")} == {stand_ins._Object}


def test_the_list_of_harmless_types_holds_nothing_that_runs() -> None:
    real = [kind for kind in stand_ins.harmless_types() if not issubclass(kind, stand_ins._Object)]
    assert real == [argparse.Namespace]


@pytest.mark.parametrize("content", [{"a": {}}, {"a": {"b": {}}}])
def test_dictionaries_that_hold_themselves_are_read_once(tmp_path, content) -> None:
    inner = content["a"]
    inner.update({str(i): inner for i in range(100)}, up=content)
    content["w"] = torch.zeros(1)
    torch.save(content, tmp_path / "w.pt")
    assert list(read_file(tmp_path / "w.pt")[0]) == ["w"]


def test_arguments_for_a_model_that_is_made_already_are_refused(resnet, tmp_path) -> None:
    path = ns.save(ns.load(NAME, pretrained=False), tmp_path / "own.pt")
    with pytest.raises(
        UsageError, match=r"own.pt, which holds its own architecture, is made already: leave out num_cl"
    ):
        ns.load(path, num_classes=3)
    with pytest.raises(UsageError, match=r"^the model to load into is made already: leave out in_chans=1$"):
        ns.load(path, model=resnet, in_chans=1)
