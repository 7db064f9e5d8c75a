"""Whatever stands in a file, reading it gives a network or one line of ours: no other exception, no code, no hang.

300 inputs with the fast tests, 25,000 with ``make test-slow``.
"""

from __future__ import annotations

import copy
import io
import json
import math
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import randomise_
from hostile import STEERING, put_header, watched, with_pickle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from normsurgeon_cli import console
from torch import nn

import normsurgeon as ns
from normsurgeon.models.origin import Origin
from normsurgeon.render.document import Column, Document, Facts, Section, Table
from normsurgeon.render.terminal import print_document
from normsurgeon.surgery.history import curves, summaries
from normsurgeon.surgery.plan import ConversionPlan

FAST, SLOW = 50, 4200
GIBIBYTE = 2**30

INPUT = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Tiny(nn.Module):
    """Small enough to be converted many times a second."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(self.bn2(self.conv2(x)) + x).mean((2, 3)))


# What is written


@cache
def tiny() -> Tiny:
    torch.manual_seed(0)
    return randomise_(Tiny()).eval()


@cache
def tiny_plan() -> dict[str, Any]:
    return ns.plan(tiny(), to="gn", example_inputs=INPUT, balance=False).to_dict()


@cache
def tiny_file(ending: str) -> bytes:
    result = ns.convert(tiny(), ConversionPlan.from_dict(tiny_plan()), check=False, verdict=False)
    with tempfile.TemporaryDirectory() as folder:
        return ns.save(result, Path(folder) / f"net{ending}", on_message=lambda line: None).read_bytes()


@cache
def timm_file() -> bytes:
    """A file that names its architecture."""
    result = ns.convert(timm.create_model("test_resnet"), to="gn", balance=False, check=False, verdict=False)
    with tempfile.TemporaryDirectory() as folder:
        return ns.save(result, Path(folder) / "net.safetensors").read_bytes()


@cache
def timm_header() -> dict[str, Any]:
    length = int.from_bytes(timm_file()[:8], "little")
    header: dict[str, Any] = json.loads(json.loads(timm_file()[8 : 8 + length])["__metadata__"]["normsurgeon"])
    header["history"] = [{"event": "finetune", "steps": 10, "best": {"top1": 0.5}, "curves": {"steps": [{"step": 1}]}}]
    header["data"] = {"input_size": [3, 64, 64], "mean": [0.5], "std": [0.5], "interpolation": "bicubic"}
    return header


EVENTS = [
    {"event": "convert", "to": "gn", "converted": 3, "kept": 1, "refused": 0},
    {"event": "calibrate", "images": 64, "sites": 3, "balanced": 1, "worst_error": 4.5, "worst_site": "bn1",
     "seconds": 3.0},
    {"event": "reconstruct", "images": 64, "steps": 9, "best_step": 5, "held_out": 8, "kl_before": 1.0, "kl": 0.5,
     "seconds": 2.0, "curve": [[0, 1.0], [5, 0.5], [9, 0.7]]},
    {"event": "finetune", "steps": 10, "data": "digits", "seconds": 4.0, "best": {"step": 5, "top1": 0.5, "kl": 0.1},
     "curves": {"steps": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], "epochs": [{"step": 2, "top1": 0.5}]}},
    {"step": 1, "loss": 2.0},
    {"step": 2, "loss": 1.0},
]  # fmt: skip


# What is done to it

HOSTILE = (
    None, True, -1, 0, 1, 7, 2**31, 2**63, -(2**70), 10**400, 1e308, -0.0, math.nan, math.inf, "", "\x1b[2J",
    "\u202e", "\udcff", "x" * 1000, "a.b.c", "..", [], {}, [[]], [{}], {"a": 1}, "layer1", "conv1.0", "fc",
    "bn1", "fold", "affine", "in", "ln2d", "rms", "converted", "kept", "none", "exact", "timm", "torchvision",
    "callable", "os:system", "resnet18", "vit_giant_patch14_224", "mvitv2_huge_cls",
    "hf-hub:timm/resnet18.a1_in1k", "local-dir:/etc", "demo", "normsurgeon.models.demo:network", {"in_chans":
    10**7}, {"num_classes": 4 * 10**6}, {"checkpoint_path": "evil.pth"}, {"img_size": 10**6}, {"global_pool":
    "catavgmax"}, {"features_only": True}, {"pretrained": True}, {"output_stride": 8}, {"out_indices": [1, 2],
    "features_only": True}, [3, 10**6, 10**6], [1, 3, 8, 8], [2**31] * 5,
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything within plain values."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*path, key)
        yield from places(each, (*path, key))


@st.composite
def changed_values(draw: st.DrawFn, original: Callable[[], dict[str, Any]]) -> Any:
    """Plain values with up to three of them taken out, doubled, or exchanged for others."""
    values = copy.deepcopy(original())
    replacement = st.sampled_from(HOSTILE) | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=5,
    )
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(values))
        if not found:
            break
        *parents, key = draw(st.sampled_from(found))
        parent = values
        for each in parents:
            parent = parent[each]
        what = draw(st.sampled_from(("exchange", "exchange", "exchange", "remove", "double", "add")))
        if what == "remove":
            del parent[key]
        elif what == "exchange":
            parent[key] = copy.deepcopy(draw(replacement))
        elif what == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=5) | st.sampled_from(("eps", "groups", "weights")))] = copy.deepcopy(
                draw(replacement)
            )
    return values


def damaged_bytes(content: bytes, draw: st.DrawFn, within: int) -> bytes:
    """Bytes with some of the first ``within`` exchanged, a stretch taken out or put in, or the end cut off."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, min(within, len(found)) - 1)))
        what = draw(st.sampled_from(("exchange", "exchange", "insert", "remove", "cut")))
        if what == "exchange":
            text = draw(st.binary(min_size=1, max_size=8))
            found[at : at + len(text)] = text
        elif what == "insert":
            found[at:at] = draw(st.binary(max_size=16))
        elif what == "remove":
            del found[at : at + draw(st.integers(1, 64))]
        elif draw(st.booleans()):
            del found[at:]
    return bytes(found)


@st.composite
def damaged_safetensors(draw: st.DrawFn) -> bytes:
    return damaged_bytes(tiny_file(".safetensors"), draw, draw(st.sampled_from((16, 2000, 10**6))))


@st.composite
def damaged_pickles(draw: st.DrawFn) -> bytes:
    whole = tiny_file(".pt")
    if draw(st.booleans()):
        return damaged_bytes(whole, draw, 10**6)
    return with_pickle(whole, lambda text: damaged_bytes(text, draw, 10**6))


# What reads it


def read(content: bytes, name: str, **options: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        with watched():
            ns.load(path, on_message=lambda message: None, **options)


def read_header(values: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        path.write_bytes(timm_file())
        put_header(path, json.dumps(values))
        with watched():
            model = ns.load(path, on_message=lambda message: None)
            str(ns.inspect(model, example_inputs=torch.zeros(1, 3, 32, 32)))


def tell_history(values: Any) -> None:
    with watched():
        header = {**Origin(None).to_dict(), "history": values.get("events")}
        history = Origin.from_dict(header, "net.pt").history
        summaries(history)
        curves(history)


def convert_by(values: Any) -> None:
    with watched():
        plan = ConversionPlan.from_json(json.dumps(values))
        str(plan)
        ns.convert(tiny(), plan, example_inputs=INPUT)


def show(text: str) -> None:
    document = Document(
        text, text, (Section("a", text, (Table((Column(text),), ((text,),)),)),), facts=(Facts(((text, text),)),)
    )
    for terminal in (True, False):
        streams = io.StringIO(), io.StringIO()
        before = sys.stdout, sys.stderr
        try:
            sys.stdout, sys.stderr = streams
            for stream in streams:
                stream.isatty = lambda terminal=terminal: terminal  # type: ignore[method-assign]
            console.print_table(Table((Column(text), Column("b")), ((text, text),), text))
            console.print_message(text)
            console.error_line(text)
            print_document(document, console.out())
        finally:
            sys.stdout, sys.stderr = before
        for stream in streams:
            shown = stream.getvalue()
            shown.encode("utf-8")
            for style in ("0", "1", "2", "1;31"):
                shown = shown.replace(f"\x1b[{style}m", "")
            assert not (STEERING - {"\n"}) & set(shown)


KINDS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None]]] = {
    "headers": (changed_values(timm_header), read_header),
    "safetensors": (damaged_safetensors(), lambda content: read(content, "net.safetensors", model=tiny())),
    "pickles": (damaged_pickles(), lambda content: read(content, "net.pt", model=tiny())),
    "histories": (changed_values(lambda: {"events": EVENTS}), tell_history),
    "plans": (changed_values(tiny_plan), convert_by),
    "terminal": (st.text(st.characters(codec=None) | st.sampled_from("\x1b\x9b\u202e\r\n[]\\"), max_size=40), show),
}


def fuzz(kind: str, inputs: int) -> None:
    strategy, use = KINDS[kind]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def each(value: Any) -> None:
        use(value)

    each()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < GIBIBYTE


@pytest.mark.parametrize("kind", KINDS)
def test_fifty_inputs_of_a_kind_are_read_or_refused_in_one_line(kind: str) -> None:
    fuzz(kind, FAST)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_four_thousand_inputs_of_a_kind_are_read_or_refused_in_one_line(kind: str) -> None:
    fuzz(kind, SLOW)


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_what_is_fuzzed_can_be_read_where_nothing_is_changed(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"net{ending}"
    path.write_bytes(tiny_file(ending))
    assert torch.equal(ns.load(path, model=tiny()).fc.weight, tiny().fc.weight)
    assert ConversionPlan.from_json(json.dumps(tiny_plan())).counts["converted"] == 2
    assert with_pickle(tiny_file(".pt"), lambda text: text)[:2] == b"PK"
