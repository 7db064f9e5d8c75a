"""A family of plans, each with one site more in the norm that was asked for, in the order of what each site adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from normsurgeon._util.progress import OnProgress, counter
from normsurgeon.calls import Call
from normsurgeon.errors import ConversionError
from normsurgeon.patterns import select
from normsurgeon.selection.budget import Budget
from normsurgeon.selection.damage import Damage
from normsurgeon.selection.sweep import Change, Sweep, damages_of, original_answers
from normsurgeon.selection.switching import Option, Switchable
from normsurgeon.surgery.deciding import decide, parse_target
from normsurgeon.surgery.plan import ConversionPlan

Batch = tuple[Tensor | Call, Tensor | None]
"""What goes into the network, and labels or None."""


@dataclass(frozen=True)
class Family:
    """The plans: the first ``k`` sites of ``order`` have their ``main`` option, all behind them that of ``others``.

    plan    the whole family's first wish: every site in ``main``, and what is given for sites that are not in ``order``
    others  None stands for the batch norm with fixed statistics
    given   the options of sites that are not in ``order``
    costs   what each site's ``main`` adds to the damage; ``base`` is the damage of all ``others``
    """

    plan: ConversionPlan
    order: tuple[str, ...]
    main: Mapping[str, Option]
    others: Mapping[str, Option | None]
    given: Mapping[str, Option]
    costs: Mapping[str, float]
    base: float

    def chosen(self, k: int) -> dict[str, Option | None]:
        """What each site gets."""
        first = {name: self.main[name] for name in self.order[:k]}
        return {**self.given, **first, **{name: self.others[name] for name in self.order[k:]}}

    def predicted(self, k: int) -> float:
        """The sum of the single damages."""
        return self.base + sum(self.costs[name] for name in self.order[:k])

    def made(self, k: int, notes: Sequence[str] = ()) -> ConversionPlan:
        """The plan for it."""
        instead = self.chosen(k)
        affine = parse_target("affine", replace(self.plan.request, groups=None))

        def decided(decision: Any) -> Any:
            if decision.name not in instead:
                return decision
            option = instead[decision.name]
            return decide(decision.site, affine) if option is None else option.decision

        decisions = tuple(map(decided, self.plan.decisions))
        return replace(self.plan, decisions=decisions, notes=(*self.plan.notes, *notes))


def alternatives(first: ConversionPlan, among: Sequence[str], fixed: frozenset[str]) -> list[ConversionPlan]:
    """The plan with each of the norms in ``among`` for the sites that are not fixed.

    :raises TargetError: an unknown target, or groups that do not divide a site's channels.
    """
    found = []
    for text in among:
        request = parse_target(text, replace(first.request, groups=None))
        decisions = tuple(d if d.name in fixed else decide(d.site, request) for d in first.decisions)
        found.append(replace(first, request=request, decisions=decisions))
    return found


def fixed_sites(plan: ConversionPlan, patterns: Sequence[str]) -> frozenset[str]:
    """The sites that globs match.

    :raises PatternError: a glob that matches none.
    """
    names = [decision.name for decision in plan.decisions]
    return frozenset(name for pattern in patterns for name in select(pattern, names))


def ordered(
    board: Switchable, fixed: frozenset[str], batches: Sequence[Batch], on_progress: OnProgress | None
) -> Family:
    """The family of ``board``'s plans (the first wish, then the alternatives), ordered by single swaps on ``batches``.

    An alternative of the target that was asked for, with other groups, counts as it: a site's ``main`` is whichever of
    them does least damage. A site with no other norm to choose always has what the first plan says.

    :raises ConversionError: no site that has a choice.
    """
    first, *others = board.plans
    wishes, *choices = ({o.site: o for o in board.options_in(made)} for made in board.plans)
    exact = {d.name for made in others for d in made.decisions if d.status == "converted" and d.target == "affine"}
    same: dict[str, list[Option]] = {}
    candidates: dict[str, list[Option]] = {}
    for name, wish in wishes.items():
        options = [made[name] for made in choices if name in made]
        same[name] = [o for o in options if o.decision.target == wish.decision.target]
        candidates[name] = [o for o in options if o not in same[name]]
    free = [name for name in wishes if name not in fixed and (name in exact or candidates[name])]
    if not free:
        raise ConversionError(f"{first.model} has no site that could be {first.target} or something else; see its plan")
    changes = dict.fromkeys(Change(name, o) for name in free for o in (wishes[name], *same[name], *candidates[name]))
    sweep = Sweep(board, {}, {change: Damage() for change in changes})
    count = counter("trying single sites", len(changes) * len(batches), on_progress)
    for inputs, labels in batches:
        sweep.update(inputs, original_answers(board, inputs, labels), count)

    def damage(option: Option) -> float:
        seen = sweep.found[Change(option.site, option)]
        return seen.compute()[0] if seen.images else 0.0  # no call reaches it

    least = {name: min(candidates[name], key=damage, default=None) for name in free if name not in exact}
    instead = {name: least.get(name) for name in free}
    spared = {name: 0.0 if option is None else damage(option) for name, option in instead.items()}
    main = {name: min((wishes[name], *same[name]), key=damage) for name in free}
    costs = {name: damage(main[name]) - spared[name] for name in free}
    return Family(
        plan=first,
        order=tuple(sorted(free, key=costs.__getitem__)),
        main=main,
        others=instead,
        given={name: option for name, option in wishes.items() if name not in costs},
        costs=costs,
        base=sum(spared.values()),
    )


class Runs:
    """Plans of a family, each run as a whole on the same images at most once; ``known`` by number of sites."""

    def __init__(
        self, board: Switchable, family: Family, batches: Sequence[Batch], on_progress: OnProgress | None
    ) -> None:
        self.board, self.family = board, family
        self.batches = [(inputs, original_answers(board, inputs, labels)) for inputs, labels in batches]
        self.known: dict[int, Damage] = {}
        self._count = counter("running whole plans", None, on_progress)

    def damage(self, k: int) -> Damage:
        """Of the plan with ``k`` sites."""
        if k not in self.known:
            found = Damage()
            for inputs, before in self.batches:
                found.update(*damages_of(self.board, self.family.chosen(k), inputs, before))
            self.known[k] = found
            self._count(1)
        return self.known[k]

    def search(self, budget: Budget) -> None:
        """Run plans towards the largest within the budget: by halves, since damage grows with the number of sites."""
        low, high = 0, len(self.family.order)
        if budget.holds(self.damage(high)):
            return
        if not budget.holds(self.damage(low)):
            high = 1  # how close one can get
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if budget.holds(self.damage(middle)) else (low, middle)
        self.damage(max(1, low))
