"""Plans: one reasoned decision a site, frozen, printable, editable, JSON and back."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import timm
import torch
from conftest import ConvNet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import normsurgeon as ns
from normsurgeon.errors import CheckpointError, ConversionError, PatternError, TargetError
from normsurgeon.graph.sites import NormSite
from normsurgeon.norms.target_names import TARGET_NAMES
from normsurgeon.surgery.deciding import LEAST_ELEMENTS, Request, decide
from normsurgeon.surgery.plan import ConversionPlan


def test_every_batch_norm_has_one_decision_with_a_whitening():
    plan = ns.plan(ConvNet(), to="gn")
    assert [(d.name, d.status, d.target, d.groups, d.whitening) for d in plan.decisions] == [
        ("bn1", "converted", "gn", 2, "fold"),
        ("bn2", "converted", "gn", 2, "affine"),
        ("bn3", "converted", "gn", 2, "affine"),
    ]
    assert plan.decisions[1].reason == "conv2's output is also read by add"


def test_the_catalogue_and_its_names_agree():
    assert tuple(ns.TARGETS) == TARGET_NAMES


def test_planning_and_printing_leave_the_model_alone(convnet):
    before = {k: v.clone() for k, v in convnet.state_dict().items()}
    text = str(ns.plan(convnet, to="gn"))
    assert text.splitlines()[0] == "ConvNet → gn: 3 converted, 0 kept, 0 refused"
    assert text.splitlines()[4].split()[:8] == ["bn1", "BatchNorm2d", "32", "converted", "gn", "2", "fold"]
    assert all(torch.equal(v, before[k]) for k, v in convnet.state_dict().items())


@pytest.mark.parametrize("target", TARGET_NAMES)
def test_a_plan_survives_json(target):
    plan = ns.plan(timm.create_model("test_efficientnet"), to=target, keep=["conv_stem*", "bn1"][1:])
    assert ConversionPlan.from_json(plan.to_json()) == plan


def test_a_plan_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign"):
        ns.plan(ConvNet(), to="gn").model = "other"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("no json", "^this plan is damaged: Expecting value"),
        ("[]", "^this plan is damaged: a list, and a JSON object was expected$"),
        ('{"format": 99}', "format 99, and this version reads format 1"),
        ('{"format": 1, "model": "x"}', "^this plan is damaged: target: Field required$"),
    ],
)
def test_a_damaged_plan_is_an_error(text, match):
    with pytest.raises(CheckpointError, match=match):
        ConversionPlan.from_json(text)


def test_keep_is_stronger_than_set_and_the_last_set_wins():
    plan = ns.plan(ConvNet(), to="gn", keep=["bn3"], set=[("bn*", "ln"), ("bn2", "gn:8")])
    assert [(d.target, d.groups, d.status) for d in plan.decisions] == [
        ("ln", None, "converted"),
        ("gn", 8, "converted"),
        (None, None, "kept"),
    ]


def test_a_plan_is_edited_by_making_a_new_one():
    plan = ns.plan(ConvNet(), to="gn")
    edited = plan.keep("bn1").set("bn2", "rms").set("bn3", "gn", groups=4)
    assert plan.set("bn3", "gn:4") == plan.set("bn3", "gn", groups=4)
    assert [d.target for d in edited.decisions] == [None, "rms", "gn"]
    assert edited.decisions[2].groups == 4
    assert [d.target for d in plan.decisions] == ["gn", "gn", "gn"]


@pytest.mark.parametrize(
    "call",
    [
        lambda: ns.plan(ConvNet(), to="gn", keep=["layer9.*"]),
        lambda: ns.plan(ConvNet(), to="gn", set={"layer9.*": "ln"}),
        lambda: ns.plan(ConvNet(), to="gn").keep("layer9.*"),
    ],
)
def test_a_glob_that_matches_nothing_lists_what_was_there(call):
    with pytest.raises(PatternError, match=r"'layer9\.\*' matches no norm layer; there are: bn1, bn2, bn3$"):
        call()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"to": "groupnorm"}, "unknown target norm 'groupnorm'; choose one of: gn, ln, ln2d, in, rms"),
        (
            {"to": "gn", "groups": 5},
            "5 groups do not divide the 32 channels of bn1; try groups auto, or --set",
        ),
        ({"to": "gn", "groups": 0}, "groups must be at least 1, not 0"),
        ({"to": "gn", "groups": "many"}, "groups must be a number or 'auto', not 'many'"),
        ({"to": "ln", "groups": 4}, "groups=4 belongs to the target gn, and the target is ln"),
        ({"to": "gn", "eps": -1.0}, r"eps must be positive and finite, not -1\.0"),
        ({"to": "gn", "set": {"bn1": "gn:x"}}, "'gn:x' the part after the colon is a number of groups"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_clear_line(settings, match):
    with pytest.raises(TargetError, match=match):
        ns.plan(ConvNet(), **settings)


def test_a_model_without_batch_norm_is_an_error():
    with pytest.raises(ConversionError, match="Sequential has no BatchNorm layer: there is nothing to convert"):
        ns.plan(nn.Sequential(nn.Linear(3, 4)), to="gn")


class Pooled(nn.Module):
    """A batch norm after global pooling, as EfficientNet-like heads and self-supervised projectors have it."""

    def __init__(self, channels: int, keepdim: bool) -> None:
        super().__init__()
        self.conv, self.keepdim = nn.Conv2d(3, channels, 1), keepdim
        self.bn = nn.BatchNorm2d(channels) if keepdim else nn.BatchNorm1d(channels)

    def forward(self, x):
        return self.bn(self.conv(x).mean((2, 3), keepdim=self.keepdim))


@pytest.mark.parametrize("keepdim", [True, False])
@pytest.mark.parametrize(
    ("target", "groups", "expected"),
    [
        ("in", None, ("affine", None, "1 element a group would be too few (under 8): affine instead")),
        (
            "gn",
            16,
            ("gn", 8, "4 elements a group would be too few (under 8): 8 groups instead; follows mean"),
        ),
        ("gn", None, ("gn", 4, "follows mean")),
        ("ln", None, ("ln", None, "follows mean")),
    ],
)
def test_the_guard_keeps_norms_off_too_few_elements(keepdim, target, groups, expected):
    plan = ns.plan(Pooled(64, keepdim), to=target, groups=groups or "auto")
    decision = plan.decisions[0]
    assert (decision.target, decision.groups, decision.reason) == expected


@settings(max_examples=200, deadline=None)
@given(
    channels=st.integers(1, 512),
    side=st.integers(1, 9),
    target=st.sampled_from(TARGET_NAMES),
    foldable=st.booleans(),
    statistics=st.booleans(),
)
def test_no_decision_leaves_a_norm_with_too_few_elements(channels, side, target, foldable, statistics):
    site = NormSite(
        name="bn",
        class_name="BatchNorm2d",
        channels=channels,
        eps=1e-5,
        input_shape=(2, channels, side, side),
        has_statistics=statistics,
        foldable=foldable,
        producer="conv" if foldable else None,
    )
    decision = decide(site, Request(target))
    assert decision.status == "converted" or (decision.status == "refused" and not statistics)
    if decision.target in ("gn", "in"):
        assert channels % decision.groups == 0
        assert channels // decision.groups * side * side >= LEAST_ELEMENTS
    if decision.target in ("ln2d", "rms2d"):
        assert channels >= LEAST_ELEMENTS
    if decision.whitening == "fold":
        assert foldable


def test_notes_say_when_shapes_are_unknown():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(8)

        def forward(self, x):
            return self.bn(x)

    plan = ns.plan(Odd(), to="gn")
    assert plan.notes == ("shapes are unknown (no input is known): pass example_inputs (--input-shape)",)
    assert json.loads(plan.to_json())["notes"]


def test_a_notebook_shows_a_plan_and_a_conversion_as_the_same_table():
    model = ConvNet()
    made = ns.plan(model, to="gn", keep=["bn1"], name="<b>net</b>")
    shown = made._repr_html_()
    assert "<b>&lt;b&gt;net&lt;/b&gt; → gn: 2 converted, 1 kept, 0 refused</b>" in shown
    assert "<b>net" not in shown
    rows = [re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", row) for row in re.findall("<tr>(.*?)</tr>", shown)[1:]]
    assert [row[0] for row in rows] == [decision.name for decision in made.decisions]
    assert [row[3] for row in rows] == [decision.status for decision in made.decisions]
    converted = ns.convert(model, made)
    table = shown[shown.index("<table") : shown.index("</table>")]
    assert table in converted._repr_html_()
    assert str(converted.check) in converted._repr_html_()


def test_printing_shows_the_summary_and_a_row_for_each_site():
    plan = ns.plan(ConvNet(), to="gn", keep=["bn1"])
    lines = str(plan).splitlines()
    assert lines[0] == plan.summary == "ConvNet → gn: 2 converted, 1 kept, 0 refused"
    rows = [line.split() for line in lines if line.startswith("bn")]
    assert [(row[0], row[3]) for row in rows] == [("bn1", "kept"), ("bn2", "converted"), ("bn3", "converted")]


def test_an_inventory_holds_a_record_for_each_layer_and_shows_them_as_a_table():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8))
    found = ns.inspect(model, name="net", example_inputs=torch.zeros(1, 3, 8, 8))
    batch_norm, group_norm = found.sites
    assert (batch_norm.name, batch_norm.producer, batch_norm.foldable, batch_norm.groups) == ("1", "0", True, None)
    assert (group_norm.class_name, group_norm.channels, group_norm.groups, group_norm.foldable) == (
        "GroupNorm",
        8,
        2,
        None,
    )
    assert [site["class"] for site in found.to_dict()["sites"]] == ["BatchNorm2d", "GroupNorm"]
    assert str(found).startswith("Norm layers: net, 1 BatchNorm, 1 GroupNorm\n")
    assert re.search(r"^1 +BatchNorm2d +8 +8×6×6 +0 +yes$", str(found), re.MULTILINE)
