"""A file never chooses code, other files, the network or more memory than it holds; what it says is read strictly."""

from __future__ import annotations

import io
import json
import math
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import ConvNet, randomise_
from hostile import STEERING, Trap, header_in, put_header, watched
from normsurgeon_cli import app as application
from normsurgeon_cli import console
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import normsurgeon as ns
from normsurgeon.errors import CheckpointError, ConversionError, NormSurgeonError
from normsurgeon.printable import one_short_line, printable
from normsurgeon.render.document import Column, Document, Facts, Finding, Findings, Section, Table
from normsurgeon.render.terminal import print_document
from normsurgeon.surgery.plan import ConversionPlan


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A converted test_resnet, as a .safetensors file's bytes."""
    model = randomise_(timm.create_model("test_resnet"))
    result = ns.convert(model, to="gn", balance=False, check=False, verdict=False)
    return ns.save(result, tmp_path_factory.mktemp("saved") / "net.safetensors").read_bytes()


@pytest.fixture
def net(saved: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    path.write_bytes(saved)
    return path


def changed(path: Path, change: Any) -> Path:
    header = header_in(path)
    change(header)
    return put_header(path, header)


# Code, files, network


@pytest.mark.parametrize(
    "argument",
    [
        "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "weights",
        "weights_backbone", "cache_dir", "features", "act_layer", "norm_layer", "scriptable", "block",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["timm", "torchvision"])
def test_a_file_gives_no_argument_outside_the_list(net, tmp_path, kind: str, argument: str) -> None:
    marker, evil = tmp_path / "marker", tmp_path / "evil.pth"
    evil.write_bytes(pickle.dumps(Trap(marker)))
    name = "test_resnet" if kind == "timm" else "resnet18"
    changed(net, lambda h: h.update(source={"kind": kind, "name": name, "kwargs": {argument: str(evil)}}))
    assert str(_error_of(net)) == (
        f"{net} was made from {name}, and with {argument} as a file may not decide it; "
        f"try: {name} --weights FILE (in Python: load({name!r}, weights=path))"
    )
    assert not marker.exists()


def _error_of(path: Path, **options: Any) -> NormSurgeonError:
    with watched() as caught:
        ns.load(path, **options)
    assert len(caught) == 1
    return caught[0]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("num_classes", "10"),
        ("num_classes", True),
        ("num_classes", 1.0),
        ("num_classes", -1),
        ("in_chans", 0),
        ("img_size", 1024),
        ("img_size", [64, 64, 64]),
        ("global_pool", "avg; import os"),
        ("drop_rate", 2.0),
        ("out_indices", [10**9]),
    ],
)
def test_an_argument_of_another_type_or_range_is_refused(net, argument: str, value: Any) -> None:
    changed(net, lambda h: h["source"].update(kwargs={argument: value}))
    assert f"with {argument} as a file may not decide it" in str(_error_of(net))


@pytest.mark.parametrize(
    "name",
    ["local-dir:/etc", "hf-hub:timm/resnet18.a1_in1k", "hf_hub:timm/x", "HF-HUB:timm/x", "timm/resnet18", "../x", ""],
)
def test_a_file_names_no_address(net, name: str) -> None:
    changed(net, lambda h: h["source"].update(name=name))
    error = _error_of(net)
    assert isinstance(error, CheckpointError)
    assert "which is an address, and a file does not decide what is fetched" in str(error)


@pytest.mark.parametrize("name", ["resnet18x", "x" * 5000, "resnet18.no_such_weights"])
def test_a_name_in_a_file_that_nothing_has_is_the_files_error(net, name: str) -> None:
    changed(net, lambda h: h["source"].update(name=name))
    error = _error_of(net)
    assert isinstance(error, CheckpointError)
    assert _matches(error, rf"^{net} cannot be rebuilt: (unknown timm model|timm's resnet18 has no weights) '")


def test_who_loads_may_say_what_the_file_may_not(net) -> None:
    changed(net, lambda h: h["source"].update(name="hf-hub:timm/test_resnet.r160_in1k", kwargs={"pretrained": True}))
    with watched() as caught:
        models = [
            ns.load("test_resnet", weights=net),
            ns.load(net, model=timm.create_model("test_resnet")),
        ]
    assert caught == []
    assert all(torch.equal(models[0].fc.weight, model.fc.weight) for model in models)


def test_what_a_file_may_not_decide_is_not_built_when_its_model_is_saved_again(net, tmp_path) -> None:
    marker, evil = tmp_path / "marker", tmp_path / "evil.pth"
    evil.write_bytes(pickle.dumps(Trap(marker)))
    changed(net, lambda h: h["source"].update(kwargs={"checkpoint_path": str(evil)}))
    model = ns.load(net, model=timm.create_model("test_resnet"))
    with watched() as caught:
        again = ns.save(model, tmp_path / "again.safetensors", on_message=lambda message: None)
    assert caught == []
    assert not marker.exists()
    assert header_in(again)["source"] == {"kind": "timm", "name": "test_resnet", "kwargs": {"num_classes": 1000}}


def test_a_model_made_with_other_arguments_says_so_when_it_is_saved(tmp_path) -> None:
    model = ns.load("test_resnet", pretrained=False, act_layer=nn.SiLU)
    said: list[str] = []
    path = ns.save(model, tmp_path / "net.pt", on_message=said.append)
    assert said == [
        f"{path}: the model was made from test_resnet, and with act_layer as a file may not decide it: "
        "loading it takes load(path, model=one built alike)"
    ]


# Size


@pytest.mark.parametrize(
    ("name", "kwargs", "line"),
    [
        ("test_resnet", {"in_chans": 10**7}, r"conv1.0.weight has shape .* in the file and \(16, 10000000, 3, 3\)"),
        ("test_resnet", {"num_classes": 4 * 10**6}, r"fc.weight has shape .* in the file and \(4000000, 96\)"),
        ("test_resnet.r160_in1k", {"in_chans": 10**8}, r"\(16, 100000000, 3, 3\) in the model"),
    ],
)  # fmt: skip
def test_a_size_that_the_file_does_not_hold_is_refused_before_it_is_built(net, name: str, kwargs, line: str) -> None:
    changed(net, lambda h: h["source"].update(name=name, kwargs=kwargs))
    assert _matches(_error_of(net), line)


def _matches(error: NormSurgeonError, line: str) -> bool:
    with pytest.raises(NormSurgeonError, match=line):
        raise error
    return True


def torch_file(tmp_path: Path, content: Any) -> Path:
    torch.save(content, tmp_path / "test_resnet.pt")
    return tmp_path / "test_resnet.pt"


def test_a_tensor_that_repeats_few_numbers_many_times_is_refused(tmp_path) -> None:
    state = timm.create_model("test_resnet").state_dict()
    state["fc.weight"] = torch.zeros(1, 1).expand(10**9, 128)
    state["fc.bias"] = torch.zeros(1).expand(10**9)
    error = _error_of(torch_file(tmp_path, state))
    assert _matches(error, "fc.weight has 128000000000 numbers, and the file does not hold as many$")


def test_tensors_that_share_one_memory_make_no_large_model(tmp_path) -> None:
    shared = torch.zeros(2**22)
    with torch.device("meta"):
        state = timm.create_model("vit_large_patch16_224").state_dict()
    content = {key: shared[: tensor.numel()].view(tensor.shape) for key, tensor in state.items()}
    torch.save(content, tmp_path / "vit_large_patch16_224.pt")
    assert _matches(_error_of(tmp_path / "vit_large_patch16_224.pt"), "its tensors share 16777216 bytes, and 12")


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(3).to_sparse(), torch.zeros(3, device="meta")],
    ids=["sparse", "meta"],
)
def test_a_tensor_without_plain_values_is_refused(tmp_path, tensor: torch.Tensor) -> None:
    error = _error_of(torch_file(tmp_path, {"fc.weight": tensor}))
    assert isinstance(error, CheckpointError)


def test_an_archive_that_unpacks_to_more_than_itself_is_refused(tmp_path) -> None:
    path = torch_file(tmp_path, {"fc.weight": torch.zeros(10**6)})
    content = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    assert _matches(_error_of(path), r"is an archive of \d+ bytes that would unpack to 40\d+$")


GROWING = {
    "bytearray": b"\x80\x02}X\x01\x00\x00\x00acbuiltins\nbytearray\nJ\x00\x00\x00\x7f\x85Rs.",
    "bytearray of Python 2": b"\x80\x02}X\x01\x00\x00\x00ac__builtin__\nbytearray\nJ\x00\x00\x00\x7f\x85Rs.",
    "codec": b"\x80\x02}X\x01\x00\x00\x00ac_codecs\nencode\nU\x03abcX\x03\x00\x00\x00hex\x86Rs.",
    "codec with a dash": b"\x80\x02}X\x01\x00\x00\x00ac_codecs\nencode\nU\x03abcX\x09\x00\x00\x00HEX-codec\x86Rs.",
}


@pytest.mark.parametrize("kind", GROWING)
@pytest.mark.parametrize("container", ["zip", "old"])
def test_a_pickle_that_grows_is_not_opened(tmp_path, kind: str, container: str) -> None:
    path = tmp_path / "a.pt"
    if container == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", GROWING[kind])
            archive.writestr("a/version", "3\n")
    else:
        path.write_bytes(GROWING[kind])
    assert _matches(_error_of(path), "holds a pickle that makes buffers larger than itself, and is not opened")


def test_bytes_among_the_tensors_are_no_growing_pickle(tmp_path) -> None:
    state = timm.create_model("test_resnet").state_dict()
    path = torch_file(tmp_path, {"state_dict": state, "note": b"\xff hex", "arch": "test_resnet"})
    assert torch.equal(ns.load(path).fc.weight, state["fc.weight"])


def test_a_pickled_header_that_holds_itself_twice_is_refused(tmp_path) -> None:
    value: Any = []
    for _ in range(40):
        value = [value, value]
    path = torch_file(tmp_path, {"state_dict": {"a": torch.zeros(1)}, "normsurgeon": {"format": 1, "history": value}})
    assert _matches(_error_of(path), "is damaged: it holds too much$")


BOMBS = r"""
import json, sys, time
from pathlib import Path
import normsurgeon as ns, timm, torch
from normsurgeon.errors import NormSurgeonError
ns.load("test_resnet", pretrained=False)
peak = lambda: 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
found = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    before, began = peak(), time.process_time()
    try:
        ns.load(path)
        line = "loaded"
    except NormSurgeonError as error:
        line = str(error)
    found[path.name] = [time.process_time() - began, peak() - before, peak(), line]
print(json.dumps(found))
"""


@pytest.mark.system
def test_no_small_file_takes_seconds_or_a_gibibyte(saved: bytes, tmp_path) -> None:
    folder = tmp_path / "bombs"
    folder.mkdir()
    sources = {
        "channels": ("test_resnet", {"in_chans": 10**7}),
        "classes": ("test_resnet", {"num_classes": 4 * 10**6}),
        "giant": ("vit_giant_patch14_224", {}),
        "gigantic": ("vit_gigantic_patch14_224", {}),
        "regnet": ("regnety_2560", {}),
        "image": ("levit_128s", {"img_size": 512}),
    }
    for label, (name, kwargs) in sources.items():
        path = folder / f"{label}.safetensors"
        path.write_bytes(saved)
        changed(path, lambda h, n=name, k=kwargs: h["source"].update(kind="timm", name=n, kwargs=k))
        changed(path, lambda h: h.update(plan=None, eps={}))
    path = folder / "torchvision.safetensors"
    path.write_bytes(saved)
    source = {"kind": "torchvision", "name": "regnet_y_128gf", "kwargs": {"num_classes": 10**7}}
    changed(path, lambda h: h.update(source=source, plan=None, eps={}))
    wide = {"fc.weight": torch.zeros(1, 1).expand(10**9, 128), "fc.bias": torch.zeros(1).expand(10**9)}
    torch.save({**timm.create_model("test_resnet").state_dict(), **wide}, folder / "test_resnet.pt")
    with zipfile.ZipFile(folder / "bytearray.pt", "w") as archive:
        archive.writestr("a/data.pkl", GROWING["bytearray"])
    old = b"\x80\x02}X\x01\x00\x00\x00ac__builtin__\nbytearray\nJ\x00\x00\x00\x7f\x85Rs."
    (folder / "old.pt").write_bytes(old)
    done = subprocess.run([sys.executable, "-c", BOMBS, str(folder)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert set(found) == {path.name for path in folder.iterdir()}
    for name, (seconds, grown, peak, line) in found.items():
        assert line != "loaded", name
        assert len(line) <= 300, name
        assert seconds < 5, name
        assert grown < 2**28, (name, grown)
        assert peak < 2**30, (name, peak)


# What is rebuilt without drawing random weights is the same network


@pytest.mark.long
@pytest.mark.parametrize(
    "spec",
    ["test_resnet", "test_efficientnet", "efficientvit_m0", "levit_128s", "torchvision:regnet_y_400mf", "mixnet_s"],
)
def test_a_network_built_from_the_file_alone_computes_the_same(tmp_path, spec: str) -> None:
    """Some keep indices or tables outside their state dict; torchvision's RegNet cannot be made on the meta device."""
    torch.manual_seed(0)
    model = randomise_(ns.load(spec, pretrained=False))
    result = ns.convert(model, to="affine", check=False, verdict=False)
    path = ns.save(result, tmp_path / "net.safetensors")
    loaded = ns.load(path)
    size = 224 if "vit" in spec else 64
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(images), result.model(images))
    assert all(not tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])


def test_a_kept_batch_norm_without_its_counter_has_counted_nothing(tmp_path) -> None:
    state = timm.create_model("test_resnet").state_dict()
    path = torch_file(tmp_path, {k: v for k, v in state.items() if "num_batches" not in k})
    assert int(ns.load(path).get_buffer("bn1.num_batches_tracked")) == 0


def test_loading_leaves_the_random_state_alone(net) -> None:
    before = torch.random.get_rng_state()
    ns.load(net)
    assert torch.equal(torch.random.get_rng_state(), before)


# The schema


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda h: h.update(more=1), "is damaged: more: Extra inputs are not permitted"),
        (lambda h: h.update(history=[1]), "is damaged: history.0: Input should be an object"),
        (lambda h: h.update(history=[{"event": 1}]), "is damaged: history.0: event must be a text"),
        (lambda h: h.update(history=[{"steps": 10**30}]), "is damaged: a number has more than 64 bits"),
        (lambda h: h["eps"].update(bn1=math.nan), "is damaged: eps.bn1: Input should be a finite number"),
        (lambda h: h["eps"].update(bn1=-1.0), "is damaged: eps.bn1: Input should be greater than or equal to 0"),
        (lambda h: h["eps"].update({"a..b": 1.0}), r"is damaged: eps.a..b.\[key\]: must be a module path"),
        (lambda h: h.update(data={"input_size": [3, 10**6, 10**6]}), "data.input_size.1: Input should be less than"),
        (lambda h: h.update(data={"std": [0.0]}), "data.std.0: Input should be greater than 0"),
        (lambda h: h.update(data={"interpolation": "best"}), "data.interpolation: must be an interpolation"),
        (lambda h: site(h).update(groups=7), "plan.sites.0: groups must divide the 16 channels"),
        (lambda h: site(h).update(groups=0), "plan.sites.0: groups must be those of gn"),
        (lambda h: site(h).update(eps=0.0), "plan.sites.0.eps: Input should be greater than 0"),
        (lambda h: site(h).update(to="norm"), "plan.sites.0: to must be one of gn, ln,"),
        (lambda h: site(h).update(name="bn1"), "plan.sites.0: must have the name of its site"),
        (lambda h: site(h)["site"].update(channels="16"), "plan.sites.0.site.channels: Input should be a valid int"),
        (lambda h: site(h)["site"].update(channels=True), "plan.sites.0.site.channels: Input should be a valid int"),
        (lambda h: site(h)["site"].update(producer=None), "plan.sites.0: a site that is folded must have a producer"),
        (lambda h: site(h)["site"].update(more=1), "plan.sites.0.site.more: Unexpected keyword argument"),
        (lambda h: site(h).update({"from": "\x1b[2J"}), "plan.sites.0.from: must have no control characters"),
        (lambda h: h["plan"]["sites"].append(site(h)), "plan.sites: must name each site once"),
        (lambda h: h["plan"].update(notes=nested(60)), "is damaged: values are nested more than 50 deep"),
        (lambda h: h["plan"].update(notes=["x" * 20_000]), "plan.notes.0: String should have at most 10000"),
    ],
)  # fmt: skip
def test_a_damaged_field_is_named(net, change: Any, line: str) -> None:
    error = _error_of(changed(net, change))
    assert isinstance(error, CheckpointError)
    assert _matches(error, rf"^the header of \S+net.safetensors .*{line}")


def site(header: dict[str, Any]) -> dict[str, Any]:
    first: dict[str, Any] = header["plan"]["sites"][0]
    return first


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, "1" * 10**4, '{"format": 1, "a": ' + "1" * 10**4 + "}"])
def test_json_that_python_itself_refuses_is_one_line(net, text: str) -> None:
    assert isinstance(_error_of(put_header(net, text)), CheckpointError)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda s: s["site"].update(producer="layer1"), "it folds into layer1, which is no such layer here"),
        (lambda s: s["site"].update(producer="fc"), "it folds into fc, which is no such layer here"),
        (lambda s: s["site"].update(producer="x" * 500), "it folds into x+…x+, which is no such layer here"),
        (lambda s: (s.update(name="bn99"), s["site"].update(name="bn99")), "bn99, there a BatchNorm2d, is not there"),
    ],
)
def test_a_plan_for_layers_that_are_not_there_is_one_line(net, change: Any, line: str) -> None:
    error = _error_of(changed(net, lambda h: change(site(h))))
    assert isinstance(error, ConversionError)
    assert _matches(error, rf"^{net}: the plan was made for another model \(ResNet\): {line}")


def test_a_functional_site_makes_no_layer_larger_than_its_statistics() -> None:
    class Plain(ConvNet):
        def __init__(self) -> None:
            super().__init__()
            del self.bn1
            self.register_buffer("mean", torch.zeros(32))
            self.register_buffer("var", torch.ones(32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = nn.functional.batch_norm(self.conv1(x), self.mean, self.var)
            return self.head(self.bn3(self.bn2(self.conv2(y))).mean((2, 3)))

    plan = ns.plan(Plain().eval(), to="gn", as_graph=True, balance=False)
    values = plan.to_dict()
    functional = next(s for s in values["sites"] if s["from"] == "F.batch_norm")
    functional["site"]["channels"] = 2**31 - 1
    functional["groups"] = 1
    hostile = ConversionPlan.from_dict(values)
    with pytest.raises(ConversionError, match=r"has 32 channels here, and 2147483647 in the plan; make a new plan$"):
        ns.convert(Plain().eval(), hostile, check=False, verdict=False)


def test_a_damaged_file_leaves_with_exit_code_1(net) -> None:
    changed(net, lambda h: h["plan"]["request"].update(target="groupnorm"))
    done = CliRunner().invoke(application.app, ["inspect", str(net)])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: the header of")
    assert done.stderr.count("\n") == 1


# The terminal

NASTY = "a\x1b[2J\x9b31m\u202eb\r\x07\udcff\x00"
SHOWN = r"a\x1b[2J\x9b31m\u202eb\r\x07\udcff\x00"


def test_control_characters_become_escapes() -> None:
    assert printable(NASTY) == SHOWN
    assert printable("schön → ²\n") == "schön → ²\n"
    assert one_short_line("x" * 400) == "x" * 199 + "…" + "x" * 100


@pytest.mark.parametrize("terminal", [True, False])
def test_no_control_character_reaches_a_terminal(monkeypatch, terminal: bool) -> None:
    streams = {"stdout": io.StringIO(), "stderr": io.StringIO()}
    for name, stream in streams.items():
        stream.isatty = lambda: terminal  # type: ignore[method-assign]
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    console.print_table(Table((Column("layer"), Column(NASTY)), (("b\n" + NASTY, NASTY),), NASTY))
    console.print_message(NASTY)
    console.error_line(NASTY)
    console.out().print(NASTY, markup=False)
    table = Table((Column("name"), Column(NASTY)), ((NASTY, NASTY),), title=NASTY)
    finding = Finding(NASTY, "warning", advice=NASTY, anchor=NASTY)
    section = Section("a", NASTY, (table, Findings((finding,))))
    print_document(Document("", NASTY, (section,), facts=(Facts(((NASTY, NASTY),)),)), console.out())
    for stream in streams.values():
        text = stream.getvalue()
        assert r"a\x1b[2J\x9b31m\u202eb" in text
        assert r"\x07\udcff\x00" in text
        for style in ("\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[1;31m", "\x1b[33m", "\x1b[1;33m"):
            text = text.replace(style, "")
        assert not (STEERING - {"\n"}) & set(text)


def test_a_plan_of_a_layer_with_a_strange_name_prints_it_escaped() -> None:
    class Odd(nn.BatchNorm2d):
        pass

    Odd.__name__ = "Odd\x1b[2J"
    model = nn.Sequential(nn.Conv2d(3, 16, 3), Odd(16), nn.ReLU()).eval()
    text = str(ns.plan(model, to="gn", example_inputs=torch.zeros(1, 3, 8, 8), balance=False))
    assert r"Odd\x1b[2J" in text
    assert "\x1b" not in text


def test_a_file_with_a_strange_name_is_one_escaped_line(tmp_path) -> None:
    path = tmp_path / "a\x1b[2J.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    done = CliRunner().invoke(application.app, ["inspect", str(path)])
    assert done.exit_code == 1
    assert r"a\x1b[2J.safetensors holds weights but does not say" in done.stderr
    assert "\x1b" not in done.stderr
