"""What becomes of one site: a pure function of its facts and of what was asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from normsurgeon._util.schema import STRICT
from normsurgeon.errors import TargetError
from normsurgeon.graph.sites import NormSite
from normsurgeon.norms.targets import Target, auto_groups, find_target

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

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

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

    @property
    def folds(self) -> bool:
        """Whether the producer is to absorb something."""
        return self.status == "converted" and (self.whitening == "fold" or self.target == "fold")

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
    if site.overflows:
        why = "its input is so large that the statistics of a per-sample norm would overflow; try the target affine"
        return Decision(site, "refused", reason=why)
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


def without_fold(decision: Decision, why: str) -> Decision:
    """The same decision with the analytic affine in place of folding."""
    site = replace(decision.site, foldable=False, reason=why)
    if decision.target == "fold":
        return replace(decision, site=site, target="affine", reason=f"not folded: {why}")
    kept = [part for part in (decision.reason, why) if part]
    return replace(decision, site=site, whitening="affine", balanced=False, reason="; ".join(kept))


def refused(decision: Decision, why: str) -> Decision:
    """The batch norm stays, for the reason given."""
    return Decision(decision.site, "refused", reason=why)


def _joined(*parts: str | None) -> str:
    return "; ".join(part for part in parts if part)


def parse_target(text: str, request: Request) -> Request:
    """What a text like ``ln`` or ``gn:8`` asks for; what it leaves open is as in ``request``.

    :raises TargetError: an unknown target, or groups that are no number.

    >>> parse_target("gn:8", Request("ln")).groups
    8
    """
    target, _, groups = text.partition(":")
    if groups and not groups.isdecimal():
        raise TargetError(f"in {text!r} the part after the colon is a number of groups, as in gn:8")
    return Request(target, int(groups) if groups else None, request.eps, request.as_graph, request.balance)
