"""Whatever a network is made of, converting it to ``affine`` or ``fold`` changes nothing, or says why it does not."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from random_networks import (
    DRAWN,
    FAULTS,
    HOOK_CALLS,
    KINDS,
    LAYOUT,
    OPTIONAL,
    PARENTS,
    SPOILERS,
    C,
    Description,
    batch_norms,
    descriptions,
    plain_descriptions,
    step_of,
)
from torch import Tensor, nn

import normsurgeon as ns
from normsurgeon.graph import following

TOLERANCE = 1e-9

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True, scope="module")
def _all_ways_of_calling_are_followed() -> Iterator[None]:
    """However busy the machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(following, "SECONDS_FOR_ALTERNATIVES", 600.0)
        yield


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
    """Of every way of calling, on two inputs: as it is, with each optional argument, with both."""
    found = []
    for batch, seed in ((2, 1), (3, 5)):
        mask = torch.rand(batch, C, 5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for way in ({}, {"raw": True}, {"mask": mask}, {"raw": True, "mask": mask}):
            torch.manual_seed(0)
            found += [t.clone() for t in tensors(description.call(model, batch, seed, **way))]
    return found


def differences(expected: list[Tensor], found: list[Tensor]) -> list[float]:
    """The largest of each output, relative to its largest value."""
    assert [t.shape for t in expected] == [t.shape for t in found]
    pairs = zip(expected, found, strict=True)
    return [float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in pairs]


def state(model: nn.Module) -> dict[str, Any]:
    """All of a model that is not a number: its flags, its hooks, which tensors it holds and what else."""
    return {
        name: {
            key: {k: id(v) for k, v in value.items()} if isinstance(value, dict) else id(value)
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }


def assert_right(description: Description, to: str) -> Any:
    """Convert, and compare everything that can be; the conversion, or None where the network is refused."""
    model = description.build()
    numbers, before, hook_calls = copy.deepcopy(model.state_dict()), state(model), len(HOOK_CALLS)
    example = description.example()
    result, problem = None, ""
    try:
        result = ns.convert(model, to=to, example_inputs=example, verdict=False)
    except ns.NormSurgeonError as error:
        problem = str(error)
    assert "\n" not in problem
    assert result is not None or any(KINDS[step][1] == "error" for step in description.steps), problem

    assert state(model) == before
    assert all(torch.equal(value, numbers[key]) for key, value in model.state_dict().items())
    assert len(HOOK_CALLS) == hook_calls, "a hook of the original was called"
    assert all(torch.equal(a, b) for a, b in zip(tensors(example), tensors(description.example()), strict=True))
    if result is None:
        return None
    flags = {name: module.training for name, module in result.model.named_modules()}
    assert all(flags.get(name, module.training) == module.training for name, module in model.named_modules())

    sites = [(site.name, site.status, site.target, site.reason) for site in result.sites]
    errors = differences(outputs(description, model.eval()), outputs(description, result.model.eval()))
    assert all(error < TOLERANCE for error in errors), (errors, sites)
    assert len(result.sites) == len(batch_norms(model)), sites
    assert sum(result.counts.values()) == len(result.sites)
    for site in result.sites:
        assert site.reason or (site.status == "converted" and site.target in ("affine", "fold")), sites
        assert site.reason or to != "fold" or site.target == "fold", sites
        assert "\n" not in (site.reason or "")
    assert result.check.problem is None or not result.counts["converted"], result.check
    return result


def assert_folded_where_it_can_be(description: Description, result: Any) -> None:
    """Every step is folded into as if it were alone, but before one that asks for the layout that a norm gives."""
    for site in result.sites if result is not None else ():
        number = step_of(site.name)
        wanted = KINDS[description.steps[number]][1]
        if wanted == "fold" and LAYOUT & set(description.steps[number + 1 :]):
            wanted = "any"
        if wanted == "no fold" and number and description.steps[number] == "norm first":
            wanted = "any"  # the step before it may end in a producer
        if wanted != "any" and not (number == 0 and description.parent in SPOILERS):
            assert (site.target == "fold") == (wanted == "fold"), (description.steps[number], site.name, site.reason)


def each_kind_and_target() -> Iterator[Any]:
    for kind in KINDS:
        fault, targets = FAULTS.get(kind, ("", ()))
        for to in ("fold", "affine"):
            marks = [pytest.mark.xfail(strict=True, reason=fault)] if to in targets else []
            yield pytest.param(kind, to, marks=marks, id=f"{kind}-{to}")


@pytest.mark.parametrize(("kind", "to"), list(each_kind_and_target()))
def test_each_kind_of_step_is_right_and_folded_exactly_where_it_can_be(kind, to):
    description = Description("Follow", (kind,))
    result = assert_right(description, to)
    if to == "fold":
        assert_folded_where_it_can_be(description, result)
        if KINDS[kind][1] in ("fold", "no fold"):
            assert result.check.unfolded == (), "found by the record, not by the check"


@pytest.mark.parametrize("parent", PARENTS)
def test_each_parent_costs_no_fold(parent):
    result = assert_right(Description(parent, ("conv", "depthwise", "own frozen")), "fold")
    expected = [parent not in SPOILERS, True, True]
    assert [site.target == "fold" for site in result.sites] == expected, [(s.name, s.reason) for s in result.sites]


@pytest.mark.parametrize("kind", OPTIONAL)
def test_a_wrapper_that_does_not_name_its_arguments_hides_no_reader(kind):
    assert_right(Description("PassesOn", (kind,)), "fold")


@pytest.mark.parametrize("examples", [30, pytest.param(100, marks=pytest.mark.long)])
def test_random_networks_are_converted_exactly(examples):
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(description=descriptions)
    def check(description):
        assert_right(description, "affine")
        assert_folded_where_it_can_be(description, assert_right(description, "fold"))

    check()


@settings(max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(description=plain_descriptions)
def test_random_networks_of_plain_steps_are_folded_throughout(description):
    result = assert_right(description, "fold")
    assert {site.target for site in result.sites} == {"fold"}, [(s.name, s.reason) for s in result.sites]


@pytest.mark.slow
def test_thousands_of_random_networks_are_converted_exactly():
    counts: Counter[str] = Counter()

    @settings(max_examples=5000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(description=descriptions)
    def check(description: Description) -> None:
        assert_right(description, "affine")
        result = assert_right(description, "fold")
        assert_folded_where_it_can_be(description, result)
        if result is None:
            counts["refused as a whole"] += 1
            return
        counts.update("refused" if site.status == "refused" else str(site.target) for site in result.sites)
        counts["networks"] += 1
        if counts["networks"] % 500 == 0:
            print(dict(counts), flush=True)  # pytest -s shows it

    check()


ALONE = [Description("Follow", (kind,)) for kind in KINDS] + [Description(parent, ("conv",)) for parent in PARENTS]


@pytest.mark.parametrize("description", ALONE, ids=lambda d: d.steps[0] if d.parent == "Follow" else d.parent)
def test_the_networks_are_deterministic_and_depend_on_the_numbers_of_their_norms(description):
    """Otherwise the tests above would prove nothing."""
    model = description.build().eval()
    expected = outputs(description, model)
    assert all(t.isfinite().all() for t in expected)
    assert max(differences(expected, outputs(description, description.build().eval()))) == 0
    for norm in batch_norms(model):
        if norm.running_mean is not None and description.steps != ("norm never called",):
            kept = norm.running_mean.clone()
            norm.running_mean.copy_(kept + (norm.running_var + 1e-5).sqrt())
            assert max(differences(expected, outputs(description, model))) > 1e-4
            norm.running_mean.copy_(kept)


@pytest.mark.long
def test_every_kind_and_parent_is_drawn():
    drawn: set[str] = set()

    @settings(max_examples=3000, derandomize=True, database=None, phases=[Phase.generate])
    @given(description=descriptions)
    def draw(description: Description) -> None:
        drawn.update((description.parent, description.training, *description.steps))

    draw()
    assert drawn == {*DRAWN, *PARENTS, "nowhere", "somewhere", "everywhere"}
