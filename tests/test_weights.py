"""Files of weights: however they are wrapped, they load or say in one line why not."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import normsurgeon as ns
from normsurgeon.errors import CheckpointError
from normsurgeon.models.state_dict import load_state_dict_into


def no_say(message: str) -> None:
    raise AssertionError(f"nothing was to be said, and this was: {message}")


def no_print(message: str) -> None:
    """For what is said elsewhere."""


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet").eval()


@pytest.mark.parametrize("ending", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "state_dict_ema", "module.", "model.net."])
def test_a_state_dict_loads_however_it_is_wrapped(resnet, tmp_path, ending: str, wrap: str) -> None:
    state = resnet.state_dict()
    if wrap.endswith("."):
        state = {wrap + key: value for key, value in state.items()}
    path = tmp_path / f"weights{ending}"
    if ending == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state if wrap == "plain" or wrap.endswith(".") else {wrap: state, "epoch": 3}, path)
    assert same_weights(ns.load("test_resnet", weights=path, on_message=no_say), resnet)


def test_averaged_weights_are_preferred_to_the_raw_ones(resnet, tmp_path) -> None:
    raw = {key: torch.zeros_like(value) for key, value in resnet.state_dict().items()}
    path, said = tmp_path / "w.pt", []
    torch.save({"state_dict": raw, "state_dict_ema": resnet.state_dict()}, path)
    assert same_weights(ns.load("test_resnet", weights=path, on_message=said.append), resnet)
    others = "the others: --weights-prefix state_dict"
    assert said == [f"{path}: took the averaged weights, state_dict_ema; {others}"]
    assert not ns.load("test_resnet", weights=path, weights_prefix="state_dict", on_message=no_print).fc.weight.any()


def test_a_file_older_than_the_batch_counters_loads_without_a_word(resnet, tmp_path) -> None:
    state = {k: v for k, v in resnet.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pt")
    assert same_weights(ns.load("test_resnet", weights=tmp_path / "w.pt", on_message=no_say), resnet)


def renamed(key: str) -> str:
    return key.replace("layer", "stage").replace("bn", "norm")


def test_tensors_that_differ_only_in_name_are_matched_in_order_and_it_is_said(resnet, tmp_path) -> None:
    state = {renamed(k): v for k, v in resnet.state_dict().items() if not k.endswith("num_batches_tracked")}
    path, said = tmp_path / "w.pt", []
    torch.save(state, path)
    assert same_weights(ns.load("test_resnet", weights=path, on_message=said.append), resnet)
    assert said == [f"{path}: the names differ, so all {len(state)} tensors were matched in order (every shape agrees)"]


def test_a_file_sorted_by_name_is_not_matched_in_order(resnet, tmp_path) -> None:
    """safetensors sorts by name: layer10 before layer2, bias before weight; shapes can agree all the same."""
    save_file({renamed(key): value for key, value in resnet.state_dict().items()}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit ResNet: tensors \d+ missing \(.*\) and \d+ left over"):
        ns.load("test_resnet", weights=tmp_path / "w.safetensors")


def test_tensors_in_another_role_are_not_matched_in_order() -> None:
    norm = nn.BatchNorm2d(4)
    state = {f"x.{key}": torch.ones(4) for key in ("bias", "weight", "running_mean", "running_var")}
    with pytest.raises(CheckpointError, match="does not fit Sequential: tensors 4 missing"):
        load_state_dict_into(nn.Sequential(norm, nn.ReLU()), state, "w.pt", no_say)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda s: s.pop("bn1.bias"),
            r"ResNet: tensors 1 missing \(bn1.bias\); is it another architecture\?$",
        ),
        (
            lambda s: s.update({f"extra{i}.weight": torch.zeros(1) for i in range(4)}),
            r"ResNet: tensors 4 left over \(extra0.weight, extra1.weight, extra2.weight, …\); is it another",
        ),
        (
            lambda s: s.update({"fc.weight": torch.zeros(9, 128)}),
            r"fc.weight has shape \(9, 128\) in the file and \(1000, \d+\) in the model; another number of",
        ),
    ],
    ids=["missing", "left over", "shape"],
)
def test_weights_that_do_not_fit_say_what_is_wrong(resnet, tmp_path, change, line: str) -> None:
    state = dict(resnet.state_dict())
    change(state)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=line):
        ns.load("test_resnet", weights=tmp_path / "w.pt")
