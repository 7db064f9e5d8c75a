"""A comparison: one row a norm, what keeps most first, and a recommendation in words."""

from __future__ import annotations

import pytest
import timm
import torch
from conftest import randomise_
from test_swap_sensitivity import images, kl
from torch import nn

import normsurgeon as ns
from normsurgeon.errors import TargetError, UsageError
from normsurgeon.selection.compare import compare


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return randomise_(timm.create_model("test_resnet", num_classes=10)).eval()


def test_on_data_the_numbers_are_those_of_the_conversions(network: nn.Module) -> None:
    x = images(8, 48)
    found = compare(network, [(x, None)], to=["ln", "gn"], groups=["auto", 2], example_inputs=x)
    assert {c.target for c in found.conversions} == {"ln", "gn", "gn:2"}
    with torch.no_grad():
        for each in found.conversions:
            target, _, groups = each.target.partition(":")
            changed = ns.convert(network, to=target, groups=int(groups or 0) or "auto", example_inputs=x).model
            assert each.kl == pytest.approx(kl(network(x), changed(x)), abs=1e-5)
    assert [c.kl for c in found.conversions] == sorted(c.kl for c in found.conversions)


def test_the_exact_norm_comes_first_and_is_recommended(network: nn.Module) -> None:
    x = images(8, 48)
    found = compare(network, [(x, None)], to=["ln", "affine"], example_inputs=x)
    assert found.conversions[0].target == "affine"
    assert found.recommendation.startswith("take affine: the function is exactly kept")
    assert "affine" in str(found)
    assert found.to_dict()["images"] == 8


def test_without_data_the_norms_error_decides(network: nn.Module) -> None:
    found = compare(network, to=["ln", "in"], example_inputs=images(4, 48))
    assert found.images == 0
    assert [c.target for c in found.conversions] == ["ln", "in"]
    assert all(c.kl is None for c in found.conversions)
    assert all(c.norm_error is not None for c in found.conversions)


def test_bad_requests_are_refused(network: nn.Module) -> None:
    with pytest.raises(UsageError, match="there is nothing to compare: give at least one target"):
        compare(network, to=[])
    with pytest.raises(TargetError, match="bn"):
        compare(network, to=["bn"])
    with torch.device("meta"):
        empty = timm.create_model("test_resnet")
    with pytest.raises(UsageError, match="its weights are on the meta device"):
        compare(empty)
