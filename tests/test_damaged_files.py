"""Files that are not, or not wholly, checkpoints: one line each, and never a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import normsurgeon as ns
from normsurgeon.errors import CheckpointError, ConversionError
from normsurgeon.models.checkpoint import Origin


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return ns.load("test_resnet", pretrained=False)


def rewrite_header(path: Path, change) -> None:
    """Change the header of a .safetensors checkpoint, as a bad disk or a later version would."""
    with safe_open(path, framework="pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["normsurgeon"])
    text = change(header)
    save_file(state, path, metadata={"normsurgeon": text if isinstance(text, str) else json.dumps(header)})


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.pt", b"", "a.pt is empty: writing or copying it was cut short"),
        ("a.safetensors", b"", "a.safetensors is empty: writing or copying it was cut short"),
        ("a.pt", b"hello\n" * 50, "a.pt is not a checkpoint: it begins neither like safetensors nor"),
        ("a.pth", b"\x89PNG\r\n\x1a\n" + bytes(99), "a.pth is not a checkpoint: it begins neither like"),
        ("a.safetensors", b"hello\n" * 50, "a.safetensors is truncated or not a safetensors file"),
        ("a.pt", b"\x80\x04]\x94(K\x01K\x02e.", "a.pt is truncated, or was not written by torch.save"),
    ],
)  # fmt: skip
def test_a_foreign_file_is_one_line(tmp_path, name: str, content: bytes, line: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        ns.load(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path}/{line}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("ending", "line"),
    [
        (".safetensors", "is truncated or not a safetensors file"),
        (".pt", "is truncated, or was not written by"),
    ],
)
@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_truncated_file_says_so(resnet, tmp_path, ending: str, line: str, share: float) -> None:
    path = ns.save(resnet, tmp_path / f"net{ending}")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=line):
        ns.load(path)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ([torch.zeros(1)], "holds a list, and a state dict was expected"),
        ({"epoch": 3}, "holds no tensors, and a state dict was expected"),
    ],
)
def test_a_file_without_a_state_dict_says_what_it_holds(tmp_path, content, line: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=line):
        ns.load(tmp_path / "a.pt")


def test_a_folder_is_no_file_and_no_unknown_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    for spec in (Path("run"), "run", "run/"):
        with pytest.raises(CheckpointError, match=r"^run is a folder, and a file of weights was expected$"):
            ns.load(spec)
    Path("run/best.safetensors").touch()
    Path("run/last.safetensors").touch()
    hint = r"^run is a folder, and a file of weights was expected; try: run/best\.safetensors$"
    with pytest.raises(CheckpointError, match=hint):
        ns.load("run")
    with pytest.raises(CheckpointError, match=hint):
        ns.load("test_resnet", weights="run")


def test_a_network_s_name_goes_before_a_folder_s(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("test_resnet").mkdir()
    assert type(ns.load("test_resnet", pretrained=False)).__name__ == "ResNet"


def damage_request(header: dict) -> None:
    header["plan"]["request"]["target"] = "groupnorm"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda h: h.update(format=2), "has checkpoint format 2, and this version reads format 1; try: pip"),
        (lambda h: h["plan"].update(format=9), "net.safetensors: its plan has format 9, and this version"),
        (lambda h: h.pop("history") and None, r"the header of \S+net.safetensors is damaged: history: Field required$"),
        (lambda h: h["source"].update(kind="magic"), "is damaged: source.kind: Input should be 'timm', 'torchvision'"),
        (lambda h: h["plan"]["sites"][0].pop("site") and None, "is damaged: plan.sites.0.site: Field required$"),
        (damage_request, r"is damaged: plan.request: unknown target norm 'groupnorm'"),
        (lambda h: "{not json", "is damaged: Expecting property name"),
        (lambda h: "[1, 2]", "is damaged: a list, and a JSON object was expected$"),
    ],
)  # fmt: skip
def test_a_damaged_or_newer_header_is_one_line(resnet, tmp_path, change, line: str) -> None:
    path = ns.save(ns.convert(resnet, to="gn"), tmp_path / "net.safetensors")
    rewrite_header(path, lambda header: change(header) or None)
    with pytest.raises(CheckpointError, match=line):
        ns.load(path)


def test_a_checkpoint_given_another_model_says_what_does_not_match(resnet, convnet, tmp_path) -> None:
    path = ns.save(ns.convert(resnet, to="gn"), tmp_path / "net.safetensors")
    with pytest.raises(ConversionError, match=r"the plan was made for another model \(ResNet\): conv1.1"):
        ns.load(path, model=convnet)


def test_an_origin_is_the_same_after_json() -> None:
    assert Origin.from_dict(json.loads(json.dumps(Origin(None).to_dict())), "x") == Origin(None)
