"""A converted network and its original: the norms that stand in for each other, and copies that leave both alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Literal, ParamSpec

from torch import nn

from normsurgeon.errors import UsageError
from normsurgeon.inference.run import name_of
from normsurgeon.models.checkpoint import plans_of
from normsurgeon.norms import batchnorm
from normsurgeon.norms.targets import find_target
from normsurgeon.surgery.convert import Conversion

P = ParamSpec("P")


@dataclass(frozen=True)
class NormPair:
    """One site: ``norm`` in the converted network, the ``batch_norm`` that it replaced in the original.

    ``producer``: the layer that absorbed the whitening, or None, and ``old_producer`` what it was; ``softening``: the
    plan's eps, or None.
    """

    name: str
    norm: nn.Module
    batch_norm: nn.Module
    target: str
    groups: int
    producer: nn.Module | None
    old_producer: nn.Module | None
    softening: float | None


def originals_of(result: Conversion, original: nn.Module | None) -> tuple[nn.Module, nn.Module]:
    """The converted network and the one to follow.

    :raises UsageError: when there is none to follow, or the two are one.
    """
    model, original = result.model, result.original if original is None else original
    if original is None:
        raise UsageError(
            f"there is no original of {name_of(model)} to follow (it was converted in place, or loaded from a file); "
            "try original=the BatchNorm model"
        )
    if original is model:
        raise UsageError(f"the original of {name_of(model)} is the model itself; try original=the BatchNorm model")
    return model, original


def norm_pairs(result: Conversion, original: nn.Module) -> tuple[NormPair, ...]:
    """The sites whose norm is not exact, in the order in which data reaches them.

    :raises UsageError: a model that carries no plan, or an original of another architecture.
    """
    model, plans = result.model, plans_of(result)
    if not plans:
        raise UsageError(
            f"{name_of(model)} is no conversion: no plan shows which of its norms stand in for a BatchNorm; "
            "try result = normsurgeon.convert(model, to='gn')"
        )
    new, old = dict(model.named_modules()), dict(original.named_modules())
    pairs: dict[str, NormPair] = {}
    for decision in (d for plan in plans for d in plan.decisions):
        if decision.status != "converted" or decision.site.functional or find_target(decision.target or "").exact:
            continue
        batch_norm = old.get(decision.name)
        if batch_norm is None or not batchnorm.is_batch_norm(batch_norm) or decision.name not in new:
            what = "is not there" if batch_norm is None else f"is a {type(batch_norm).__name__}"
            raise UsageError(
                f"{name_of(original)} is not the original of this conversion: {decision.name} {what} in it; "
                "try the BatchNorm model that was converted"
            )
        channels = batchnorm.read(batch_norm).channels
        if channels != decision.site.channels:
            raise UsageError(
                f"{name_of(original)} is not the original of this conversion: {decision.name} has {channels} channels "
                f"in it and {decision.site.channels} in the conversion; try the BatchNorm model that was converted"
            )
        producer = (decision.site.producer or "") if decision.whitening == "fold" else ""
        pairs[decision.name] = NormPair(
            name=decision.name,
            norm=new[decision.name],
            batch_norm=batch_norm,
            target=decision.target or "",
            groups=decision.groups or 1,
            producer=new.get(producer) if producer else None,
            old_producer=old.get(producer) if producer else None,
            softening=decision.eps,
        )
    return tuple(pairs.values())


def norm_output(norm: nn.Module) -> tuple[nn.Module, Literal["input", "output"]]:
    """Where to read what a norm gives before its own drop and act: their input, or the norm's output."""
    drop = getattr(norm, "drop", None)
    return (drop, "input") if isinstance(drop, nn.Module) else (norm, "output")


def on_a_copy(in_place: Callable[P, Conversion]) -> Callable[P, Conversion]:
    """The twin of a function that works in place on its argument ``result``: one that changes a copy of it."""

    @wraps(in_place)
    def twin(*args: P.args, **kwargs: P.kwargs) -> Conversion:
        given = signature(in_place).bind(*args, **kwargs)
        result = Conversion.of(given.arguments["result"])
        originals_of(result, given.arguments.get("original"))  # raises for its own original, which a copy is not
        given.arguments["result"] = result.copy()
        return in_place(*given.args, **given.kwargs)

    twin.__name__ = twin.__qualname__ = in_place.__name__.removesuffix("_")
    return twin
