"""Plans within a budget: what is asked for is kept on the images that judge, and what is impossible is said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from conftest import randomise_
from test_swap_sensitivity import images, kl
from torch import nn

import normsurgeon as ns
from normsurgeon.errors import ConversionError, DataError, PatternError, UsageError
from normsurgeon.selection.budget import Budget
from normsurgeon.selection.damage import Damage
from normsurgeon.selection.trade_off import trade_off

BATCHES = [(images(4, 48, seed), None) for seed in range(6)]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return randomise_(timm.create_model("test_resnet", num_classes=10)).eval()


def test_a_plan_within_a_budget_is_an_ordinary_plan_that_keeps_it(network: nn.Module) -> None:
    everything = trade_off(network, BATCHES, to="gn", points=2).points[-1].kl
    assert everything is not None
    limit = everything / 3
    curve = trade_off(network, BATCHES, to="gn", budget=f"kl={limit}")
    plan = curve.plan(f"kl={limit}")
    plan = ns.plan(network, "gn").from_json(plan.to_json())
    targets = [d.target for d in plan.decisions]
    assert 0 < targets.count("gn") < len(targets)
    assert set(targets) == {"gn", "affine"}
    converted = ns.convert(network, plan).model
    judging = torch.cat([x for i, (x, _) in enumerate(BATCHES) if i % 3])
    with torch.no_grad():
        assert kl(network(judging), converted(judging)) <= limit
    assert f"budget KL {limit:g} nats: {targets.count('gn')} of 15 sites have gn" in plan.notes[-1]


@pytest.mark.long
def test_one_site_more_would_not_stay_within_the_budget(network: nn.Module) -> None:
    curve = trade_off(network, BATCHES, to="gn", points=100)
    budget = Budget("kl", (curve.points[7].kl or 0) * 1.01)
    found = trade_off(network, BATCHES, to="gn", budget=budget)
    best = max(p.converted for p in found.points if (p.kl or 0) + p.stderr["kl"] <= budget.limit)
    following = next(p for p in curve.points if p.converted == best + 1)
    assert (following.kl or 0) + following.stderr["kl"] > budget.limit


def test_sites_are_taken_in_the_order_of_what_they_cost(network: nn.Module) -> None:
    family = trade_off(network, BATCHES, to="gn", points=2).family
    costs = [family.costs[name] for name in family.order]
    assert costs == sorted(costs)
    assert family.predicted(len(costs)) == pytest.approx(sum(costs) + family.base)


def test_without_a_fixed_norm_the_other_sites_get_the_least_damaging_one(network: nn.Module) -> None:
    curve = trade_off(network, BATCHES, to="gn", among=("ln", "rms"), points=2)
    plan = curve.plan("kl=1000")
    assert {d.target for d in plan.decisions} == {"gn"}
    none = curve.family.made(0)
    assert {d.target for d in none.decisions} <= {"ln", "rms"}
    assert curve.points[0].kl > 0


def test_other_groups_count_as_the_norm_that_was_asked_for(network: nn.Module) -> None:
    """Each site gets the groups that do least damage alone, measured here by conversions of that site."""
    curve = trade_off(network, BATCHES, to="gn", among=("gn:1", "gn:8"), points=2)
    assert curve.among == ("gn:1", "gn:8", "affine")
    plan = curve.family.made(curve.sites)
    assert {d.target for d in plan.decisions} == {"gn"}
    assert {d.target for d in curve.family.made(0).decisions} == {"affine"}
    choosing = torch.cat([x for x, _ in BATCHES[::3]])
    exact = ns.plan(network, "affine", example_inputs=choosing)
    for name in ("layer2.0.bn1", "layer4.0.bn2"):
        damage = {}
        for groups in ("auto", 1, 8):
            wanted = ns.plan(network, "gn", groups=groups, example_inputs=choosing).decisions
            one = next(d for d in wanted if d.name == name)
            alone = tuple(one if d.name == name else d for d in exact.decisions)
            made = ns.convert(network, replace(exact, decisions=alone), verdict=False).model
            with torch.no_grad():
                damage[one.groups] = kl(network(choosing), made(choosing))
        chosen = next(d for d in plan.decisions if d.name == name)
        assert chosen.groups == min(damage, key=damage.__getitem__)


def test_must_and_keep_are_obeyed(network: nn.Module) -> None:
    curve = trade_off(network, BATCHES, to="gn", must={"layer4.*": "ln"}, keep=["conv1.*"], budget="kl=1000", points=3)
    plan = curve.plan("kl=1000")
    by_name = {d.name: d for d in plan.decisions}
    assert {d.target for name, d in by_name.items() if name.startswith("layer4")} == {"ln"}
    assert {d.status for name, d in by_name.items() if name.startswith("conv1")} == {"kept"}
    assert {d.target for name, d in by_name.items() if name.startswith("layer2")} == {"gn"}


def test_what_must_be_affine_or_is_kept_is_never_the_norm_that_was_asked_for(network: nn.Module) -> None:
    must = {"layer4.*": "affine", "layer3.*": "ln"}
    curve = trade_off(network, BATCHES, to="gn", must=must, keep=["layer3.0.*"], points=2)
    for k in (0, curve.sites):
        by_name = {d.name: d for d in curve.family.made(k).decisions}
        assert {d.target for name, d in by_name.items() if name.startswith("layer4")} == {"affine"}
        assert {d.status for name, d in by_name.items() if name.startswith("layer3.0")} == {"kept"}
    assert {d.target for name, d in by_name.items() if name.startswith("layer2")} == {"gn"}


def test_the_plan_computes_what_was_run(network: nn.Module) -> None:
    """The damage of each point is that of its plan, converted and run on the images that judged it."""
    must = {"layer2.*": "rms", "layer4.0.bn2": "affine"}
    curve = trade_off(network, BATCHES, to="gn", among=("ln", "affine"), must=must, keep=["conv1.*"], points=4)
    judging = torch.cat([x for i, (x, _) in enumerate(BATCHES) if i % 3])
    for point in curve.points:
        made = ns.convert(network, curve.family.made(point.converted), verdict=False).model
        with torch.no_grad():
            assert point.kl == pytest.approx(kl(network(judging), made(judging)), abs=1e-5)


def test_an_impossible_budget_says_how_close_one_can_get(network: nn.Module) -> None:
    with pytest.raises(
        ConversionError, match=r"no plan with gn stays within KL 1e-12 nats: the nearest has 1 of 15 sites"
    ):
        trade_off(network, BATCHES, to="gn", budget="kl=1e-12").plan("kl=1e-12")


def test_a_glob_that_matches_nothing_is_refused(network: nn.Module) -> None:
    with pytest.raises(PatternError, match="nothing"):
        trade_off(network, BATCHES, must={"nothing.*": "ln"})
    with pytest.raises(PatternError, match="nothing"):
        trade_off(network, BATCHES, keep=["nothing.*"])


@pytest.mark.parametrize("batches", [[(images(1), None)], [(images(4), None)], [(images(20), None)]])
def test_too_few_images_or_one_batch_are_refused(network: nn.Module, batches: list) -> None:
    with pytest.raises(DataError, match="are too few: some choose the sites, others judge the plan"):
        trade_off(network, batches, to="ln")


@pytest.mark.parametrize("text", ["", "x", "-1%", "0", "kl=", "kl=nan", "top5=1%", "200%", "inf"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="a budget is a share of top-1 as in 1%"):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1%", Budget("top1", 0.01)),
        (0.02, Budget("top1", 0.02)),
        ("top-1=3 %", Budget("top1", 0.03)),
        ("KL=0.05", Budget("kl", 0.05)),
        ("error=5%", Budget("error", 0.05)),
    ],
)
def test_budgets_are_read(text: str | float, expected: Budget) -> None:
    assert Budget.parse(text) == expected


def test_none_lost_of_few_images_is_not_certain() -> None:
    damage = Damage([0.0] * 10, [0.0] * 10)
    used, error = Budget("top1", 0.01).spent(damage)
    assert used == 0
    assert error > 0.01


def test_a_budget_of_another_kind_of_network_is_refused(network: nn.Module) -> None:
    with pytest.raises(UsageError, match="is for networks that are no classifiers"):
        trade_off(network, BATCHES, to="ln", budget="error=5%")
