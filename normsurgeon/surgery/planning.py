"""What will become of every batch norm, decided before anything is touched.

The plan knows no tensors and the executor takes no decisions. A plan is frozen, prints as a table, goes to JSON and
back, and is edited by making a new one: ``plan.keep("stem.*")``, ``plan.set("layer4.*", "ln")``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from normsurgeon.errors import CheckpointError, ConversionError, TargetError
from normsurgeon.graph.sites import NormSite, find_sites
from normsurgeon.graph.tracing import TracedModel, trace
from normsurgeon.norms.catalogue import Target, auto_groups, find_target
from normsurgeon.patterns import select
from normsurgeon.reporting.text import html_table, plain_table

FORMAT = 1

LEAST_ELEMENTS = 8
"""A per-sample norm over fewer elements than this sees too little to estimate a variance from."""

Status = Literal["converted", "kept", "refused"]
Whitening = Literal["fold", "affine", "exact", "none"]


@dataclass(frozen=True)
class Request:
    """What was asked for one site: a target and its settings, or None to keep the batch norm.

    ``groups``: a number, or None for auto. ``eps``: the stated softening E, or None for the batch norm's own eps.
    ``balance``: whether folding may also choose a sign and weight for each channel (see ``surgery.balancing``).
    """

    target: str | None
    groups: int | None = None
    eps: float | None = None
    as_graph: bool = False
    balance: bool = True

    def __post_init__(self) -> None:
        if self.target is not None:
            target = find_target(self.target)
            if self.groups is not None and target.name != "gn":
                raise TargetError(f"groups={self.groups} belongs to the target gn, and the target is {target.name}")
        if self.groups is not None and self.groups < 1:
            raise TargetError(f"groups must be at least 1, not {self.groups}; or leave it at auto")
        if self.eps is not None and not 0 < self.eps < float("inf"):
            raise TargetError(
                f"eps must be positive and finite, not {self.eps}; or leave it out for the batch norm's own"
            )


@dataclass(frozen=True)
class Decision:
    """What becomes of one site.

    ``whitening``: "fold" (the producer absorbs it), "affine" (weight and bias are solved for, from the running
    statistics), "exact" (nothing to approximate), "none" (no statistics: gamma and beta are copied). ``eps`` None
    stands for the batch norm's own. ``reason`` says why it is kept, refused, or not what was asked for.
    """

    site: NormSite
    status: Status
    target: str | None = None
    groups: int | None = None
    eps: float | None = None
    whitening: Whitening | None = None
    balanced: bool = False
    reason: str | None = None

    @property
    def name(self) -> str:
        """The site's module path."""
        return self.site.name

    def to_dict(self) -> dict[str, Any]:
        """The contract's keys for one site, and the facts that the decision rests on."""
        return {
            "name": self.name,
            "status": self.status,
            "from": self.site.class_name,
            "to": self.target,
            "groups": self.groups,
            "eps": self.eps,
            "whitening": self.whitening,
            "balanced": self.balanced,
            "reason": self.reason,
            "site": self.site.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Decision:
        """The inverse of ``to_dict``."""
        return cls(
            site=NormSite.from_dict(values["site"]),
            status=values["status"],
            target=values["to"],
            groups=values["groups"],
            eps=values["eps"],
            whitening=values["whitening"],
            balanced=values["balanced"],
            reason=values["reason"],
        )


@dataclass(frozen=True)
class ConversionPlan:
    """One decision a site, in the order in which data reaches the sites.

    Made by ``plan``; carried out by ``convert``. ``str(plan)`` is a table.
    """

    model: str
    request: Request
    decisions: tuple[Decision, ...]
    traced_by: str = "fx"
    input_shape: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()

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
        request = _parse_target(target, self.request)
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
    def from_dict(cls, values: Mapping[str, Any]) -> ConversionPlan:
        """The inverse of ``to_dict``.

        :raises CheckpointError: for a plan of another format, or one that is damaged.
        """
        if values.get("format") != FORMAT:
            raise CheckpointError(
                f"this plan has format {values.get('format')!r}, and this version reads format {FORMAT}; "
                "try: pip install --upgrade normsurgeon"
            )
        try:
            return cls(
                model=values["model"],
                request=Request(**values["request"]),
                decisions=tuple(Decision.from_dict(site) for site in values["sites"]),
                traced_by=values["traced_by"],
                input_shape=tuple(values["input_shape"]) if values["input_shape"] else None,
                notes=tuple(values["notes"]),
            )
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"this plan is damaged: {type(error).__name__} {error}") from error

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> ConversionPlan:
        """The inverse of ``to_json``.

        :raises CheckpointError: when the text is no plan.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise CheckpointError(f"this is not a plan: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError("this is not a plan: a JSON object was expected")
        return cls.from_dict(values)

    @property
    def summary(self) -> str:
        """One line: the model, the target, and how many sites are converted, kept and refused."""
        return f"{self.model} → {self.target}: " + ", ".join(f"{n} {status}" for status, n in self.counts.items())

    def __str__(self) -> str:
        return f"{self.summary}\n{plain_table(_COLUMNS, map(_row, self.decisions))}"

    def _repr_html_(self) -> str:
        return html_table(self.summary, _COLUMNS, map(_row, self.decisions))


_COLUMNS = ("site", "from", "channels", "status", "to", "groups", "whitening", "reason")


def _row(d: Decision) -> tuple[Any, ...]:
    return d.name, d.site.class_name, d.site.channels, d.status, d.target, d.groups, d.whitening, d.reason


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
    example_input: Tensor | None = None,
    traced: TracedModel | None = None,
    name: str | None = None,
) -> ConversionPlan:
    """Decide what becomes of every batch norm of ``model``, without changing or running it.

    to              one of ``TARGETS``
    groups          groups of ``gn``: a number that divides every site's channels, or "auto"
    eps             softening E: the norm divides by sqrt(var + E) of whitened input and gamma grows by sqrt(1 + E)
    keep            globs of sites to leave alone; stronger than ``set``
    set             {glob: target}, the last match wins; "gn:8" sets the groups, too
    balance         whether folding may also choose each channel's sign and weight, from synthetic images: keeps more
                    of the function for one forward pass of 64 small images (see ``surgery.balancing``)
    as_graph        plan for an fx.GraphModule, in which functional batch norms can be converted
    example_input   a tensor whose shape the model accepts, where timm's configuration does not tell

    :raises TargetError: unknown target, or groups that do not divide a site's channels.
    :raises PatternError: a glob that matches no site.
    :raises ConversionError: a model without a batch norm.

    >>> import timm
    >>> p = plan(timm.create_model("test_resnet"), to="gn", keep=["conv1.1"])
    >>> p.counts
    {'converted': 14, 'kept': 1, 'refused': 0}
    """
    if groups != "auto" and not isinstance(groups, int):
        raise TargetError(f"groups must be a number or 'auto', not {groups!r}")
    request = Request(to, None if groups == "auto" else groups, eps, as_graph, balance)
    pairs = list(set.items()) if isinstance(set, Mapping) else list(set)
    overrides = [(pattern, _parse_target(text, request)) for pattern, text in pairs]
    traced = traced if traced is not None else trace(model, example_input)
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
        input_shape=None if traced.shape_problem else traced.input_shape,
        notes=_notes(traced),
    )


def decide(site: NormSite, request: Request) -> Decision:
    """What becomes of one site: a pure function of its facts and of what was asked.

    :raises TargetError: for groups that do not divide the site's channels.
    """
    if request.target is None:
        return Decision(site, "kept", reason="kept as asked")
    if site.unreadable is not None:
        return Decision(site, "refused", reason=site.unreadable)
    if site.functional and not request.as_graph:
        return Decision(site, "refused", reason="a functional call, not a module: as_graph=True converts it")
    target = find_target(request.target)
    reason: str | None
    if not site.has_statistics:
        if target.exact:
            return Decision(site, "refused", reason="no running statistics: it has no fixed function to keep")
        reason = "no running statistics: gamma and beta are copied, the function is not kept"
        return _per_sample(site, target, request, "none", reason)
    if target.name == "fold" and site.foldable:
        return Decision(site, "converted", "fold", whitening="exact")
    if target.exact:
        reason = f"not folded: {site.reason}" if target.name == "fold" else None
        return Decision(site, "converted", "affine", whitening="exact", reason=reason)
    if site.foldable:
        return _per_sample(site, target, request, "fold", None)
    return _per_sample(site, target, request, "affine", site.reason)


def _per_sample(site: NormSite, target: Target, request: Request, whitening: Whitening, reason: str | None) -> Decision:
    """Choose the groups, and guard against pools too small to have statistics."""
    groups = None
    if target.name == "gn":
        groups = request.groups or auto_groups(site.channels)
        if site.channels % groups:
            raise TargetError(
                f"{groups} groups do not divide the {site.channels} channels of {site.name}; "
                f"try groups auto, or --set '{site.name}=ln'"
            )
    elif target.name == "in":
        groups = site.channels
    decision = Decision(site, "converted", target.name, groups, request.eps, whitening, reason=reason)
    decision = replace(decision, balanced=request.balance and whitening == "fold")
    if site.positions is None:
        return decision
    elements = site.channels // (groups or 1) * (site.positions if target.pools == "groups" else 1)
    if elements >= LEAST_ELEMENTS:
        return decision
    few = f"{elements} element{'s' if elements != 1 else ''} a group would be too few (under {LEAST_ELEMENTS})"
    if target.name == "gn":
        for fewer in range(groups or 1, 0, -1):
            if site.channels % fewer == 0 and site.channels // fewer * site.positions >= LEAST_ELEMENTS:
                return replace(decision, groups=fewer, reason=_joined(f"{few}: {fewer} groups instead", reason))
    if not site.has_statistics:
        return Decision(site, "refused", reason=f"{few}, and there are no running statistics to fall back on")
    return Decision(site, "converted", "affine", whitening="exact", reason=f"{few}: affine instead")


def _joined(*parts: str | None) -> str:
    return "; ".join(part for part in parts if part)


def _parse_target(text: str, request: Request) -> Request:
    target, _, groups = text.partition(":")
    if groups and not groups.isdecimal():
        raise TargetError(f"in {text!r} the part after the colon is a number of groups, as in gn:8")
    return Request(target, int(groups) if groups else None, request.eps, request.as_graph, request.balance)


def _notes(traced: TracedModel) -> tuple[str, ...]:
    notes = []
    if traced.traced_by == "hooks":
        notes.append(f"not traceable by torch.fx ({traced.untraced.get('', '')}): sites come from the module tree")
    if traced.shape_problem:
        notes.append(f"shapes are unknown: {traced.shape_problem}")
    return tuple(notes)
