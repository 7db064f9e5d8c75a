"""Progressive conversion: the norms are blended in, from the fixed affine that the batch norm was.

At a site whose converted norm T has weight w and bias b, the ``Blend`` computes

    y = (1 - a) * F(x) + a * T(x)        F(x) = w * r * (x - m) + b

with fixed per-channel r and m, so that w and b are trained by both. At a = 0 the network computes what the batch norm
original computes; at a = 1 the layer is T. r and m follow from the original: its batch norm is ``y = A * x0 + B`` on
its producer's output x0, and the converted producer hands over ``x = c * x0 + d`` (c the ratio of its weights to the
original's; c = 1, d = 0 where nothing was folded). F is that map when ``r = A / (c * w)``, ``m = d + (b - B) * c / A``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normsurgeon.errors import UsageError
from normsurgeon.norms import batchnorm
from normsurgeon.norms.affine import Affine
from normsurgeon.norms.layers import per_channel
from normsurgeon.norms.targets import find_target
from normsurgeon.surgery.deciding import Decision
from normsurgeon.surgery.plan import ConversionPlan
from normsurgeon.surgery.replacing import replace_modules_
from normsurgeon.surgery.whitening import change_of_producer


class Blend(nn.Module):
    """A norm, and the fixed affine that it takes over from; ``share`` is the norm's part, 0 to 1.

    The norm's own drop and act come after the blend.
    """

    def __init__(self, norm: nn.Module, rate_C: Tensor, centre_C: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.drop = getattr(norm, "drop", None) or nn.Identity()
        self.act = getattr(norm, "act", None) or nn.Identity()
        for name in ("drop", "act"):
            if isinstance(getattr(norm, name, None), nn.Module):
                setattr(norm, name, nn.Identity())
        self.rate: Tensor
        self.centre: Tensor
        self.share: Tensor
        self.register_buffer("rate", rate_C)
        self.register_buffer("centre", centre_C)
        self.register_buffer("share", torch.zeros((), dtype=torch.float32), persistent=False)
        self.whole = False

    def set_share(self, share: float) -> None:
        """Set the norm's part; from 1 on the affine is not computed any more."""
        self.share.fill_(share)  # a tensor, so that torch.compile compiles once
        self.whole = share >= 1

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of shape (N, C, *) to the same shape."""
        y = self.norm(x)
        if not self.whole:
            norm: Any = self.norm
            fixed = per_channel(norm.weight * self.rate, x) * (x - per_channel(self.centre, x))
            fixed = fixed + per_channel(norm.bias, x)
            y = fixed + self.share * (y - fixed)
        return self.act(self.drop(y))


def blend_(model: nn.Module, plan: ConversionPlan, original: nn.Module) -> tuple[str, ...]:
    """Put a ``Blend`` at every site that the plan converted to a per-sample norm, in place; their names, in order.

    :raises UsageError: when there is none, or the original is not the one that was converted.
    """
    decisions = [decision for decision in plan.decisions if _blends(decision)]
    if not decisions:
        raise UsageError(f"no site of {plan.model} can be blended in: none was converted to a per-sample norm")
    replacements: dict[nn.Module, nn.Module] = {}
    for decision in decisions:
        try:
            before = original.get_submodule(decision.name)
            norm = model.get_submodule(decision.name)
            if not batchnorm.is_batch_norm(before):
                raise AttributeError
            rate, centre = _fixed_affine(before, norm, decision, model, original)
        except AttributeError:
            raise UsageError(
                f"progressive conversion starts from the batch norm original, and {decision.name} is no batch norm "
                f"of the {type(original).__name__} that was given"
            ) from None
        reference: Tensor = norm.weight  # type: ignore[assignment]
        replacements[norm] = Blend(norm, rate.to(reference), centre.to(reference))
    replace_modules_(model, replacements)
    return tuple(decision.name for decision in decisions)


def _blends(decision: Decision) -> bool:
    if decision.status != "converted" or decision.site.functional or decision.whitening not in ("fold", "affine"):
        return False
    return not find_target(decision.target or "").exact


def _fixed_affine(
    before: nn.Module, norm: nn.Module, decision: Decision, model: nn.Module, original: nn.Module
) -> tuple[Tensor, Tensor]:
    """r and m of the module's docstring, each (C,) in float64."""
    reading = batchnorm.read(before)
    whole = reading.fixed
    handed = Affine(torch.ones_like(whole.scale), torch.zeros_like(whole.shift))
    if decision.whitening == "fold":
        path = decision.site.producer or ""
        handed = change_of_producer(original.get_submodule(path), model.get_submodule(path))
    weight: Tensor = norm.weight.detach().double()  # type: ignore[operator]
    bias: Tensor = norm.bias.detach().double()  # type: ignore[operator]
    slope = whole.scale / handed.scale  # of y in x
    silent = (slope == 0) | (weight == 0)  # gamma is 0: y is the bias whatever x
    rate = torch.where(silent, 1.0, slope / weight.where(~silent, torch.ones_like(weight)))
    slope = slope.where(~silent, torch.ones_like(slope))
    centre = torch.where(silent, 0.0, handed.shift + (bias - whole.shift) / slope)
    return rate, centre


def shares(progress: float, sites: int, order: str) -> list[float]:
    """The norm's part at each site when ``progress`` (0 to 1) of the blending is done.

    >>> shares(0.5, 4, "together"), shares(0.625, 4, "sites")
    ([0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 0.5, 0.0])
    """
    progress = min(max(progress, 0.0), 1.0)
    if order == "together":
        return [progress] * sites
    return [min(max(progress * sites - place, 0.0), 1.0) for place in range(sites)]


def set_shares_(model: nn.Module, names: tuple[str, ...], progress: float, order: str) -> None:
    """Set every blend's share for the progress made."""
    for name, share in zip(names, shares(progress, len(names), order), strict=True):
        blend = model.get_submodule(name)
        assert isinstance(blend, Blend)
        blend.set_share(share)


def plain_state(state: dict[str, Tensor], blends: tuple[str, ...]) -> dict[str, Tensor]:
    """The state dict of the network without its blends, from that of the network with them."""
    plain = {}
    prefixes = {f"{name}." for name in blends}
    for key, value in state.items():
        prefix = next((p for p in prefixes if key.startswith(p)), None)
        if prefix is not None:
            rest = key.removeprefix(prefix)
            if rest in ("rate", "centre"):
                continue
            key = prefix + rest.removeprefix("norm.")
        plain[key] = value
    return plain
