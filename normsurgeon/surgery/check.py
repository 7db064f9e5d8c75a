"""The proof that a conversion is one: all but the new norms' own statistics must leave the network as it was.

In place of each new norm stands the fixed affine that it approximates; in each producer that is to absorb a whitening
stands a random one, of signs and powers of two, which no weight is rounded by. This network must equal the original in
eval mode, in float64, at every norm and in every output, for every way of calling that was followed. What breaks it is
found by bisection and taken back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from normsurgeon._util.one_line import one_line
from normsurgeon.calls import Call
from normsurgeon.graph.following import Followed, filled
from normsurgeon.graph.recording import is_layer
from normsurgeon.graph.skeleton import seeded, shadow_of, tensors_in, why_valueless
from normsurgeon.norms.affine import Affine
from normsurgeon.surgery.comparing import Run, noted, outputs_differ, reached, sums_differ
from normsurgeon.surgery.deciding import Decision, refused, without_fold
from normsurgeon.surgery.fixing import Shadow, random_whitening, with_fixed_norms
from normsurgeon.surgery.float64 import Float64

IMAGES, SIDE = 4, 64
"""Size of the input that is made up for the check; one image for a network of ``HEAVY`` multiply-adds an image."""

HEAVY = 1e10

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Largest relative difference that counts as rounding, by the precision of the run."""

MAX_TRIALS = 60
"""Forward passes that finding what breaks the network may take."""


@dataclass(frozen=True)
class Check:
    """What was proven of a conversion.

    error      largest difference between the original and the network with fixed affines in place of the new norms,
               relative to the largest value of the tensor that it is in; None where it was not checked
    images     samples of the input
    ways       of calling that were compared, the base first
    sites      converted norms that these calls reached, of how many
    precision  in which both were run
    jumps      whether outputs jump where the input moves by rounding (what is sorted or cut off does): those ways were
               compared at the layers alone
    unfolded   sites whose folding was taken back, and refused: sites that were refused, each since it broke the network
    problem    why it was not checked, or None
    """

    error: float | None = None
    images: int = 0
    ways: tuple[str, ...] = ()
    sites: tuple[int, int] = (0, 0)
    precision: str = "float64"
    jumps: bool = False
    unfolded: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    def __str__(self) -> str:
        if self.problem is not None:
            return f"not checked: {self.problem}"
        ways = f", {len(self.ways)} ways of calling" if len(self.ways) > 1 else ""
        text = f"exact to {self.error:.0e}" if self.error else "exact"
        text += f" on {self.images} image{'s' if self.images != 1 else ''}{ways}"
        if self.precision != "float64":
            text += f" (in {self.precision})"
        if self.jumps:
            text += ", at every layer (outputs jump with rounding)"
        reached, of = self.sites
        if reached < of:
            text += f"; {of - reached} of {of} converted norms were not reached"
        for what, names in (("not folded after all", self.unfolded), ("refused after all", self.refused)):
            if names:
                text += f"; {what}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
        return text


@dataclass(frozen=True)
class _Way:
    how: str
    call: Call


Made = tuple[Sequence[Decision], Check]


def check(model: nn.Module, decisions: Sequence[Decision], followed: Followed) -> Made:
    """Prove ``decisions`` on ``model``, which is left as it is: the decisions that hold, and the proof's record."""
    converted = [d for d in decisions if d.status == "converted" and not d.site.functional and d.whitening != "none"]
    if not converted:
        return decisions, Check(problem="no norm is converted that has a fixed function")
    if (why := why_valueless(model)) is not None:
        return decisions, Check(problem=why)
    if followed.call is None:
        return decisions, Check(problem="no input is known, pass example_inputs (--input-shape)")
    prover = _Prover(model, converted, [d.name for d in decisions if not d.site.functional])
    problem = prover.prepare(followed)
    if problem is not None:
        return decisions, Check(problem=problem)
    made = {d.name: d for d in prover.prove()}
    return [made.get(d.name, d) for d in decisions], prover.record(list(made.values()))


class _Prover:
    def __init__(self, model: nn.Module, decisions: Sequence[Decision], norms: Sequence[str]) -> None:
        self.model, self.decisions, self.norms = model, {d.name: d for d in decisions}, norms
        self.modules = dict(model.named_modules())
        self.ways: list[_Way] = []
        self.reference: list[Run] = []
        self.whitenings: dict[str, Affine] = {}
        self.wide = True
        self.error, self.jumps, self.trials = 0.0, False, 0
        self.problem: str | None = None
        self.unfolded: list[str] = []
        self.refused: list[str] = []

    # The original.

    def prepare(self, followed: Followed) -> str | None:
        """Run the original; why that cannot be done, or None."""
        problem = "the model could not be run"
        for call in _small(followed, self.model):
            for wide in (True, False):
                self.wide = wide
                try:
                    self.reference = [self._run(Shadow(shadow_of(self.model)), call)]
                except Exception as error:  # a foreign forward may raise anything
                    problem = f"the model could not be run ({one_line(error)})"
                    continue
                if not self.reference[0].layers:
                    return "no layer was reached"
                self.ways = [_Way("eval mode", call)]
                self._add_ways(followed, call)
                for name, decision in self.decisions.items():
                    if decision.folds:
                        self.whitenings[name] = random_whitening(
                            self.modules[str(decision.site.producer)], self.modules[name]
                        )
                return None
        return problem

    def _add_ways(self, followed: Followed, base: Call) -> None:
        for how, kwargs, training in followed.ways:
            if training:
                continue
            call = base.with_kwargs(**_fitting(kwargs, followed.call, base))
            try:
                self.reference.append(self._run(Shadow(shadow_of(self.model)), call))
            except Exception:  # the small input does not suit this way: it stays unchecked, and uncounted
                continue
            self.ways.append(_Way(how, call))

    # The converted network, some of it taken back.

    def prove(self) -> list[Decision]:
        """The decisions that hold."""
        decisions = list(self.decisions.values())
        self.problem = self._difference(decisions)
        if self.problem is None:
            return decisions
        decisions = self._refuse_unreached(decisions)
        without = [without_fold(d, "") if d.folds else d for d in decisions]
        if self._difference(without) is not None:
            guilty = self._culprits(without, lambda left: left)
            decisions = [
                refused(d, f"replacing it changes the network: {guilty[d.name]}") if d.name in guilty else d
                for d in decisions
            ]
            self.refused += guilty
        taken = {d.name for d in decisions if d.folds}
        guilty = self._culprits(
            [d for d in decisions if d.folds],
            lambda left: [
                d if not d.folds or d in left else without_fold(d, "") for d in decisions if d.status == "converted"
            ],
        )
        self.unfolded += [name for name in guilty if name in taken]
        decisions = [
            without_fold(d, f"folding into {d.site.producer} changes the network: {guilty[d.name]}")
            if d.name in guilty
            else d
            for d in decisions
        ]
        self.problem = self._difference(decisions)
        return decisions

    def _refuse_unreached(self, decisions: list[Decision]) -> list[Decision]:
        """Refuse norms that the original calls and that, replaced, are not called."""
        try:
            runs = [self._run_converted(decisions, way.call) for way in self.ways]
        except Exception:  # then bisection finds who is to blame
            return decisions
        before, after = reached(self.reference), reached(runs)
        why = "the forward reaches it past the module tree (a plain list, a closure), so replacing it has no effect"
        self.refused += [d.name for d in decisions if d.name in before - after]
        return [refused(d, why) if d.name in before - after else d for d in decisions]

    def _culprits(self, suspects: list[Decision], rest: Callable[[list[Decision]], list[Decision]]) -> dict[str, str]:
        """The fewest suspects without which the others do no harm, by bisection, each with what it did."""
        left, found = list(suspects), {}
        while left and (why := self._difference(rest(left))) is not None:
            if self.trials > MAX_TRIALS:
                found.update(dict.fromkeys([d.name for d in left], f"{why} (one of these sites does)"))
                break
            low, high = 0, len(left)  # the first `low` do no harm, the first `high` do
            while high - low > 1:
                middle = (low + high) // 2
                again = self._difference(rest(left[:middle]))
                low, high, why = (middle, high, why) if again is None else (low, middle, again)
            found[left.pop(high - 1).name] = why
        return found

    def _difference(self, decisions: list[Decision]) -> str | None:
        """What differs once ``decisions`` are carried out, in words; None where nothing does."""
        self.trials += 1
        worst, jumps = 0.0, False
        for way, reference in zip(self.ways, self.reference, strict=True):
            try:
                run = self._run_converted(decisions, way.call)
            except Exception as error:
                return f"{one_line(error)} in {way.how}"
            found = self._compare(reference, run, [d for d in decisions if d.folds])
            if isinstance(found, str):
                return f"{found} in {way.how}"
            outputs = outputs_differ(reference, run)
            if outputs > self.tolerance:
                if not self._jumps(way, reference):
                    return f"the output differs by {outputs:.0e} in {way.how}"
                jumps, outputs = True, 0.0
            worst = max(worst, found, outputs)
        self.error, self.jumps = worst, jumps
        return None

    @property
    def tolerance(self) -> float:
        """What counts as rounding."""
        return TOLERANCE[torch.float64 if self.wide else torch.float32]

    def _compare(self, before: Run, after: Run, folded: Sequence[Decision]) -> float | str:
        """The largest relative difference at the layers, or where there is more than rounding."""
        if [name for name, *_ in before.layers] != [name for name, *_ in after.layers]:
            return "the layers are not called as before"
        whitened = {d.name: self.whitenings[d.name] for d in folded}
        producers = {d.site.producer for d in folded}
        worst = 0.0
        for (name, given, made), (_, given_now, made_now) in zip(before.layers, after.layers, strict=True):
            if name in whitened and given_now is not None:
                white = whitened[name]
                sums = (given_now.sums - white.shift.to(given_now.sums)) / white.scale.to(given_now.sums)
                given_now = replace(given_now, sums=sums)
            made_now = made if name in producers else made_now
            for what, a, b in (("input", given, given_now), ("output", made, made_now)):
                difference = sums_differ(a, b) if a is not None and b is not None else 0.0
                if not difference <= self.tolerance:
                    return f"the {what} of {name} differs by {difference:.0e}"
                worst = max(worst, difference)
        return worst

    def _jumps(self, way: _Way, reference: Run) -> bool:
        """Whether the original's own output jumps when its input is moved by rounding: what is sorted or cut off does.

        Its layers are then what counts.
        """
        size = 1e-12 if self.wide else 1e-6
        generator = torch.Generator().manual_seed(0)

        def nudged(t: Tensor) -> Tensor:
            noise = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)
            return t.double() * (1 + size * noise) if t.is_floating_point() else t

        try:
            again = self._run(Shadow(shadow_of(self.model)), way.call.map(nudged))
            return outputs_differ(reference, again) > self.tolerance
        except Exception:
            return False

    def _run_converted(self, decisions: Sequence[Decision], call: Call) -> Run:
        return self._run(with_fixed_norms(self.model, decisions, self.whitenings, self.wide), call)

    def _run(self, shadow: Shadow, call: Call) -> Run:
        run = Run([], [])
        inside = tuple(f"{name}." for name in self.norms)
        for name, module in shadow.module.named_modules():
            if name in self.norms or (is_layer(module) and not name.startswith(inside)):
                module.forward = noted(name, module.forward, run)  # the shadow is this function's own
        with torch.no_grad(), seeded(self.model):
            call = call.map(lambda t: t.double() if self.wide and t.is_floating_point() else t.clone())
            with Float64(shadow.factors, self.wide):
                output = call(shadow.module)
            run.outputs = [t.detach() for t in tensors_in(output) if t.numel()]
        return run

    def record(self, decisions: Sequence[Decision]) -> Check:
        """The proof, after ``prove``."""
        if self.problem is not None:
            return Check(problem=f"the model gives other outputs each time it is called ({self.problem})")
        converted = {d.name for d in decisions if d.status == "converted"}
        called = converted & reached(self.reference)
        return Check(
            error=self.error,
            images=len(self.ways[0].call),
            ways=tuple(way.how for way in self.ways),
            sites=(len(called), len(converted)),
            precision="float64" if self.wide else "its own precision",
            jumps=self.jumps,
            unfolded=tuple(self.unfolded),
            refused=tuple(self.refused),
        )


def _small(followed: Followed, model: nn.Module) -> Iterator[Call]:
    """Small inputs, of which the first that the model takes is used: the owner's example, or random numbers."""
    device = next((t.device for t in itertools.chain(model.parameters(), model.buffers())), torch.device("cpu"))
    if followed.example is not None:
        example = followed.example
        tensor = example.tensor
        if tensor is not None and len(tensor) > IMAGES:
            yield example.map(lambda t: t[:IMAGES])
        yield example.map(lambda t: filled(t, device))
        return
    assert followed.call is not None
    shape = followed.call.shape
    if shape is not None and len(shape) > 2:
        side = round(SIDE ** (2 / (len(shape) - 2)))
        images = IMAGES if followed.multiply_adds < HEAVY else 1
        small = (images, shape[1], *[min(side, extent) for extent in shape[2:]])
        yield followed.call.map(lambda t: filled(t.new_empty(small), device))
    yield followed.call.map(lambda t: filled(t, device))


def _fitting(kwargs: dict[str, Any], ghost: Call | None, call: Call) -> dict[str, Any]:
    """Tensors among the arguments of a way, which were made for ``ghost``, in the size of ``call``."""
    old = next((t for t in tensors_in([ghost.args, dict(ghost.kwargs)])), None) if ghost is not None else None
    new = next((t for t in tensors_in([call.args, dict(call.kwargs)])), None)
    if old is None or new is None:
        return kwargs
    sizes = dict(zip(old.shape[2:], new.shape[2:], strict=False))

    def fit(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        rest = [sizes.get(s, s) for s in value.shape[1:]]
        return torch.ones((new.shape[0], *rest), dtype=value.dtype, device=new.device)

    return {key: fit(value) for key, value in kwargs.items()}
