"""One new layer: what the producer absorbs, what goes into the norm's weight and bias, and the norm itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from normsurgeon.norms import batchnorm
from normsurgeon.norms.affine import Affine
from normsurgeon.norms.targets import LayerSpec, find_target
from normsurgeon.surgery import whitening
from normsurgeon.surgery.balancing import balance
from normsurgeon.surgery.deciding import Decision
from normsurgeon.surgery.probing import FeatureProbe
from normsurgeon.surgery.verdict import StandIn


@dataclass
class NewLayer:
    """A new layer, and what it stands in for; None if it is exact, or if that is not known."""

    layer: nn.Module
    stand_in: StandIn | None = None


@dataclass
class Solved:
    """What is to be put in place of a batch norm: ``white`` goes into the producer, ``affine`` and ``eps`` into the
    new norm."""

    affine: Affine
    eps: float
    white: Affine | None = None
    stand_in: StandIn | None = None


def new_layer_(
    old: nn.Module,
    decision: Decision,
    producer: nn.Module | None,
    values: bool = True,
    probe: FeatureProbe | None = None,
) -> NewLayer:
    """The new layer for one site; folds into the producer, in place, where the plan says so.

    Without ``values`` (the meta device has none; a checkpoint brings its own) only the structure is made.
    """
    reading = batchnorm.read(old)
    if not values or reading.reference.is_meta:
        if producer is not None:
            whitening.give_bias_(producer)
        eps = _eps(reading, decision) if decision.eps is None else decision.eps
        return NewLayer(_built(reading, decision, eps, None, _rank(old, decision)))
    solved = _solve(reading, decision, producer, probe)
    if producer is not None and solved.white is not None:
        whitening.fold_(producer, solved.white)
    layer = _built(reading, decision, solved.eps, solved.affine, _rank(old, decision))
    return NewLayer(layer, solved.stand_in)


def new_layer_behind(
    old: nn.Module, decision: Decision, producer: nn.Module | None, probe: FeatureProbe | None = None
) -> tuple[nn.Module, Affine | None]:
    """The new layer for one site, and what stands before it instead of being folded: nothing is changed."""
    reading = batchnorm.read(old)
    solved = _solve(reading, decision, producer, probe)
    return _built(reading, decision, solved.eps, solved.affine, _rank(old, decision)), solved.white


def _solve(
    reading: batchnorm.BatchNormReading,
    decision: Decision,
    producer: nn.Module | None,
    probe: FeatureProbe | None,
) -> Solved:
    if decision.whitening == "none":
        return Solved(reading.gamma_beta, reading.eps if decision.eps is None else decision.eps)
    white, whole = reading.whitener, reading.fixed
    target = find_target(decision.target or "")
    if target.exact:
        return Solved(whole, reading.eps, whole if producer is not None else None)
    moments, wanted = reading.moments, whole
    if producer is not None:
        if probe is not None:
            alpha = balance(probe, target, decision.groups or 1).to(white.scale.device)
            white = Affine(alpha * white.scale, alpha * white.shift)
        pools = decision.groups or 1 if decision.eps is None else 1  # softening is of the groups' average
        white = whitening.at_scale(producer, white, target, pools, whitening.GAIN)
        wanted = whole.behind(white)
        moments = white.after(moments)
    eps = _eps(reading, decision)
    affine, eps = whitening.matching_affine(wanted, moments, target, decision.groups or 1, eps, decision.eps)
    return Solved(affine, eps, white if producer is not None else None, StandIn(wanted, moments))


def _rank(old: nn.Module, decision: Decision) -> int | None:
    return decision.site.rank or (4 if isinstance(old, nn.BatchNorm2d) else None)


def _eps(reading: batchnorm.BatchNormReading, decision: Decision) -> float:
    """The batch norm's own, scaled like the features that the new norm sees."""
    larger = decision.whitening == "fold" and not find_target(decision.target or "").exact
    return reading.eps * whitening.GAIN**2 if larger else reading.eps


def _built(
    reading: batchnorm.BatchNormReading,
    decision: Decision,
    eps: float,
    affine: Affine | None,
    rank: int | None,
) -> nn.Module:
    reference = reading.reference
    spec = LayerSpec(
        channels=reading.channels,
        groups=decision.groups or 1,
        eps=eps,
        affine=True,
        rank=rank,
        drop=reading.drop,
        act=reading.act,
        device=reference.device,
        dtype=reference.dtype,
    )
    layer = find_target(decision.target or "").build(spec)
    trainable = any(t is not None and t.requires_grad for t in (reading.weight, reading.bias))
    for name in ("weight", "bias"):
        parameter = layer._parameters.get(name)
        if parameter is not None:
            if affine is not None:
                parameter.copy_(affine.scale if name == "weight" else affine.shift)
            source = getattr(reading, name)
            parameter.requires_grad_(trainable if source is None else source.requires_grad)
    return layer
