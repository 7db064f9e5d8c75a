"""Whatever a network is made of, converting it to ``affine`` or ``fold`` changes nothing, or says why it does not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from random_networks import KINDS, PARENTS, C, Description, batch_norms, descriptions
from torch import Tensor, nn

import normsurgeon as ns

TOLERANCE = 1e-9

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        return [t for value in output.values() for t in tensors(value)]
    if isinstance(output, (tuple, list)):
        return [t for value in output for t in tensors(value)]
    return tensors(list(vars(output).values())) if hasattr(output, "__dict__") else []


@torch.no_grad()
def outputs(description: Description, model: nn.Module) -> list[Tensor]:
    """Of every way of calling: as it is, with each optional argument, with another batch."""
    mask = torch.ones(2, C, 5, 7, dtype=torch.float64)
    ways: list[dict[str, Any]] = [
        {},
        {"raw": True},
        {"mask": mask},
        {"raw": True, "mask": mask},
        {"batch": 3, "seed": 5},
    ]
    found = []
    for way in ways:
        torch.manual_seed(0)
        found += [t.clone() for t in tensors(description.call(model, **way))]
    return found


def assert_right(description: Description, to: str) -> ns.NormSurgeonError | Any:
    """Convert, and compare everything that can be; the conversion."""
    model = description.build()
    before = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    result = ns.convert(model, to=to, example_inputs=description.example(), verdict=False)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    expected, found = outputs(description, model.eval()), outputs(description, result.model.eval())
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        error = float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
        assert error < TOLERANCE, (error, [(s.name, s.status, s.target, s.reason) for s in result.sites])
    assert len(result.sites) == len(batch_norms(model))
    assert sum(result.counts.values()) == len(result.sites)
    for site in result.sites:
        assert site.target in ("affine", "fold") or site.reason
        assert to != "fold" or site.target == "fold" or site.reason
    assert result.check.problem is None or not result.counts["converted"], result.check
    return result


@pytest.mark.parametrize("to", ["fold", "affine"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_step_is_right_and_folded_exactly_where_it_can_be(kind, to):
    result = assert_right(Description("Follow", (kind,)), to)
    wanted = KINDS[kind][1]
    if to == "fold" and wanted != "any":
        folded = [site.target == "fold" for site in result.sites]
        assert all(folded) if wanted == "fold" else not any(folded), [(s.name, s.reason) for s in result.sites]
        assert result.check.unfolded == (), "found by the record, not by the check"


@pytest.mark.parametrize("parent", PARENTS)
def test_each_parent_costs_no_fold(parent):
    result = assert_right(Description(parent, ("conv", "depthwise", "own frozen")), "fold")
    expected = [parent != "Meddles", True, True]
    assert [site.target == "fold" for site in result.sites] == expected, [(s.name, s.reason) for s in result.sites]


@settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(description=descriptions)
def test_random_networks_are_converted_exactly(description):
    for to in ("affine", "fold"):
        assert_right(description, to)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(description=descriptions)
def test_thousands_of_random_networks_are_converted_exactly(description):
    for to in ("affine", "fold"):
        assert_right(description, to)
