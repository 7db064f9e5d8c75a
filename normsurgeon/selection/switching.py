"""A network whose batch norms can each be switched to one of several norms and back, without changing any weight.

A conversion folds a whitening into the producer. For trying, the same whitening stands before the new norm instead: the
function is the same up to rounding, and the producer's output is the original's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normsurgeon.graph.skeleton import shadow_of
from normsurgeon.norms.affine import Affine
from normsurgeon.norms.targets import find_target
from normsurgeon.surgery.building import new_layer_behind
from normsurgeon.surgery.convert import proven
from normsurgeon.surgery.deciding import Decision
from normsurgeon.surgery.plan import ConversionPlan

Watched = tuple[Tensor, Tensor, Tensor]
"""Of one call of a site: zeros that were added to its output, how far the norm is off there, and for each image the
squared norm of that relative to the output's."""


@dataclass(frozen=True)
class Option:
    """One norm that a site could get: a decision of one of the plans that were asked for."""

    decision: Decision

    @property
    def site(self) -> str:
        """The site's module path."""
        return self.decision.name

    @property
    def label(self) -> str:
        """As ``--set`` takes it: ``gn:8``, ``ln``; with eps where that is not the batch norm's own.

        >>> from normsurgeon.graph.sites import NormSite
        >>> Option(Decision(NormSite("bn", "BatchNorm2d", 32, 1e-5), "converted", "gn", groups=2)).label
        'gn:2'
        """
        d = self.decision
        groups = f":{d.groups}" if d.target == "gn" else ""
        return f"{d.target}{groups}" + (f", eps {d.eps:g}" if d.eps is not None else "")


class Switchable:
    """A shadow of ``model`` whose sites can be switched between the batch norm (None) and the options of ``plans``.

    plans    made for ``model``; what they decide is proven first (``surgery.check``), and what the check takes back is
             not an option. Exact targets are none either: they are the batch norm itself.
    options  by site, in the order in which data reaches the sites
    """

    def __init__(self, model: nn.Module, plans: Sequence[ConversionPlan]) -> None:
        self.network = shadow_of(model)
        self.options: dict[str, list[Option]] = {}
        modules = dict(self.network.named_modules())
        self._layers: dict[Option, Callable[[Tensor], Tensor]] = {}
        self._chosen: dict[str, Option | None] = {}
        self._watching: tuple[Mapping[str, Option], dict[str, list[Watched]]] | None = None
        proofs = [proven(model, plan) for plan in plans]
        self.plans = [proof.plan for proof in proofs]
        for proof in proofs:
            for decision in proof.plan.decisions:
                if decision.status != "converted" or decision.site.functional:
                    continue
                if find_target(decision.target or "").exact:
                    continue
                option = Option(decision)
                own = self.options.setdefault(decision.name, [])
                if option in own:
                    continue
                own.append(option)
                producer = modules[decision.site.producer] if decision.site.producer and decision.folds else None
                with torch.no_grad():
                    layer, white = new_layer_behind(
                        modules[decision.name], decision, producer, proof.probes.get(decision.name)
                    )
                self._layers[option] = _behind(white, layer.eval())
        for name in self.options:
            modules[name].forward = self._switched(name, modules[name].forward)
        self.sites = {name: modules[name] for name in self.options}

    def options_in(self, plan: ConversionPlan) -> list[Option]:
        """The options that one of ``plans`` decides for."""
        return [Option(d) for d in plan.decisions if Option(d) in self.options.get(d.name, ())]

    def choose(self, chosen: Mapping[str, Option | None]) -> None:
        """Switch the named sites; all others stay as they are."""
        self._chosen.update(chosen)

    def reset(self) -> None:
        """Every site back to its batch norm."""
        self._chosen.clear()

    @contextmanager
    def watched(self, chosen: Mapping[str, Option]) -> Iterator[dict[str, list[Watched]]]:
        """While inside, every call of a site in ``chosen`` is noted: the network computes what it always does."""
        seen: dict[str, list[Watched]] = {}
        self._watching = (chosen, seen)
        try:
            yield seen
        finally:
            self._watching = None

    def _watch(self, name: str, x: Tensor, y: Any) -> Any:
        """A batch norm's output with a tensor of zeros added, by which the network's outputs can be differentiated."""
        assert self._watching is not None
        chosen, seen = self._watching
        if name not in chosen or not isinstance(y, Tensor):
            return y
        with torch.no_grad():
            error = self._layers[chosen[name]](x) - y
            squares_N = error.double().reshape(len(y), -1).square().sum(1)
            whole = (y.double() - y.double().mean(0)).square().sum() / len(y)  # as the verdict has it
        probe = torch.zeros_like(y, requires_grad=True)
        seen.setdefault(name, []).append((probe, error, (squares_N / whole.clamp_min(1e-30)).cpu()))
        return y.detach() + probe if not y.requires_grad else y + probe

    def _switched(self, name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            option = self._chosen.get(name)
            y = own(x, *args, **kwargs) if option is None else self._layers[option](x)
            return y if self._watching is None else self._watch(name, x, y)

        return forward


def _behind(white: Affine | None, layer: nn.Module) -> Callable[[Tensor], Tensor]:
    if white is None:
        return layer
    return lambda x: layer(white(x))
