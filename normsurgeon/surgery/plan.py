"""What will become of every batch norm, decided before anything is touched.

The plan knows no tensors and the executor takes no decisions. A plan is frozen, prints as a table, goes to JSON and
back, and is edited by making a new one: ``plan.keep("stem.*")``, ``plan.set("layer4.*", "ln")``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from torch import nn

from normsurgeon._util.schema import parsed, read_as
from normsurgeon.errors import CheckpointError, ConversionError, TargetError
from normsurgeon.graph.following import Followed
from normsurgeon.graph.sites import find_sites
from normsurgeon.graph.skeleton import require_plain
from normsurgeon.graph.trace import TracedModel, trace
from normsurgeon.norms.batchnorm import is_batch_norm
from normsurgeon.patterns import select
from normsurgeon.render.document import Column, Document, Notes, Section, Table
from normsurgeon.render.presentable import Presentable
from normsurgeon.surgery.deciding import Decision, Request, decide, parse_target
from normsurgeon.surgery.plan_schema import PlanSchema

FORMAT = 1


@dataclass(frozen=True)
class ConversionPlan(Presentable):
    """One decision a site, in the order in which data reaches the sites.

    Made by ``plan``; carried out by ``convert``. ``str(plan)`` is a table. ``followed`` says how the model can be
    called, for the check; it is not a part of the JSON, and found again where it is missing.
    """

    model: str
    request: Request
    decisions: tuple[Decision, ...]
    traced_by: str = "fx"
    input_shape: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()
    followed: Followed | None = field(default=None, compare=False, repr=False)

    @property
    def target(self) -> str | None:
        """The target asked for."""
        return self.request.target

    @property
    def counts(self) -> dict[str, int]:
        """How many sites are converted, kept and refused."""
        found = Counter(decision.status for decision in self.decisions)
        return {status: found.get(status, 0) for status in ("converted", "kept", "refused")}

    def keep(self, *patterns: str) -> ConversionPlan:
        """A plan that leaves the matching batch norms as they are.

        :raises PatternError: when a pattern matches no site.
        """
        return self._change(patterns, Request(None))

    def set(self, pattern: str, target: str, groups: int | None = None, eps: float | None = None) -> ConversionPlan:
        """A plan that converts the matching sites to ``target`` instead.

        :raises PatternError: when the pattern matches no site.
        :raises TargetError: for an unknown target, or groups that do not divide.
        """
        request = parse_target(target, self.request)
        request = replace(request, groups=groups or request.groups, eps=request.eps if eps is None else eps)
        return self._change((pattern,), request)

    def _change(self, patterns: Sequence[str], request: Request) -> ConversionPlan:
        names = [decision.name for decision in self.decisions]
        chosen = {name for pattern in patterns for name in select(pattern, names)}
        return replace(
            self,
            decisions=tuple(decide(d.site, request) if d.name in chosen else d for d in self.decisions),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain types; ``from_dict`` is the way back."""
        return {
            "format": FORMAT,
            "model": self.model,
            "target": self.target,
            "request": asdict(self.request),
            "traced_by": self.traced_by,
            "input_shape": list(self.input_shape) if self.input_shape else None,
            "notes": list(self.notes),
            "counts": self.counts,
            "sites": [decision.to_dict() for decision in self.decisions],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "this plan") -> ConversionPlan:
        """The inverse of ``to_dict``. ``where`` names the plan in errors.

        :raises CheckpointError: for a plan of another format, or one that is damaged.
        """
        if values.get("format") != FORMAT:
            raise CheckpointError(
                f"{where} has format {values.get('format')!r}, and this version reads format {FORMAT}; "
                "try: pip install --upgrade normsurgeon"
            )
        return cls.of(read_as(PlanSchema, dict(values), where))

    @classmethod
    def of(cls, read: PlanSchema) -> ConversionPlan:
        """The plan that a file holds."""
        return cls(
            model=read.model,
            request=read.request,
            decisions=tuple(site.decision for site in read.sites),
            traced_by=read.traced_by,
            input_shape=read.input_shape,
            notes=read.notes,
        )

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str, where: str = "this plan") -> ConversionPlan:
        """The inverse of ``to_json``. ``where`` names the plan in errors.

        :raises CheckpointError: when the text is no plan.
        """
        return cls.from_dict(parsed(text, where), where)

    @property
    def summary(self) -> str:
        """One line: the model, the target, and how many sites are converted, kept and refused."""
        return f"{self.model} → {self.target}: " + ", ".join(f"{n} {status}" for status, n in self.counts.items())

    @property
    def table(self) -> Table:
        """One row a site."""
        titles = ("site", "from", "channels", "status", "to", "groups", "whitening", "reason")
        rows = (
            (d.name, d.site.class_name, d.site.channels, d.status, d.target, d.groups, d.whitening, d.reason)
            for d in self.decisions
        )
        return Table(tuple(map(Column, titles)), tuple(rows))

    def document(self) -> Document:
        """The sites, and what of the model was not followed."""
        return Document("", self.summary, (Section("sites", "Sites", (self.table, Notes(self.notes))),))


def plan(
    model: nn.Module,
    to: str,
    *,
    groups: int | Literal["auto"] = "auto",
    eps: float | None = None,
    keep: Sequence[str] = (),
    set: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    as_graph: bool = False,
    balance: bool = True,
    example_inputs: Any = None,
    traced: TracedModel | None = None,
    name: str | None = None,
) -> ConversionPlan:
    """Decide what becomes of every batch norm: ``normsurgeon.plan`` without a budget, and with its arguments.

    traced  the model's trace, where it has been made already

    :raises TargetError: unknown target, or groups that do not divide a site's channels.
    :raises PatternError: a glob that matches no site.
    :raises ConversionError: a model without a batch norm, or something else than a plain module.
    :raises UsageError: inputs that are none.
    """
    if groups != "auto" and (not isinstance(groups, int) or isinstance(groups, bool)):
        raise TargetError(f"groups must be a number or 'auto', not {groups!r}")
    request = Request(to, None if groups == "auto" else groups, eps, as_graph, balance)
    pairs = list(set.items()) if isinstance(set, Mapping) else list(set)
    overrides = [(pattern, parse_target(text, request)) for pattern, text in pairs]
    require_plain(model)
    if is_batch_norm(model):
        raise ConversionError(f"the model is itself a {type(model).__name__}; wrap it, as in nn.Sequential(model)")
    traced = traced if traced is not None else trace(model, example_inputs)
    sites = find_sites(traced)
    if not sites:
        raise ConversionError(f"{name or type(model).__name__} has no BatchNorm layer: there is nothing to convert")
    names = [site.name for site in sites]
    wanted = dict.fromkeys(names, request)
    for pattern, override in overrides:
        wanted.update(dict.fromkeys(select(pattern, names), override))
    for pattern in keep:
        wanted.update(dict.fromkeys(select(pattern, names), Request(None)))
    return ConversionPlan(
        model=name or type(model).__name__,
        request=request,
        decisions=tuple(decide(site, wanted[site.name]) for site in sites),
        traced_by=traced.traced_by,
        input_shape=traced.input_shape,
        notes=traced.notes,
        followed=replace(traced.followed, records=[]),
    )
