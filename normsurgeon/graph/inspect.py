"""What norm layers a model has, batch norms and others alike: the record behind ``normsurgeon inspect``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from normsurgeon.graph.sites import find_sites
from normsurgeon.graph.skeleton import require_plain
from normsurgeon.graph.trace import trace
from normsurgeon.norms.families import family_of


@dataclass(frozen=True)
class Inventory:
    """All norm layers of a model: one plain dict a layer, batch norms in the order of the data's flow first."""

    model: str
    traced_by: str
    sites: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """How many layers of each Python class."""
        return dict(Counter(site["class"] for site in self.sites))

    @property
    def families(self) -> dict[str, int]:
        """How many layers of each kind of norm; "BatchNorm" is always there."""
        found = Counter(site["family"] for site in self.sites)
        return {"BatchNorm": found.pop("BatchNorm", 0), **found}

    def summary(self) -> str:
        """The families in words: "0 BatchNorm, 53 GroupNorm"."""
        return ", ".join(f"{n} {family}" for family, n in self.families.items())

    def to_dict(self) -> dict[str, Any]:
        """The contract's JSON."""
        return {
            "model": self.model,
            "traced_by": self.traced_by,
            "sites": list(self.sites),
            "counts": self.counts,
            "families": self.families,
            "notes": list(self.notes),
        }


def inspect(model: nn.Module, *, name: str | None = None, example_inputs: Any = None) -> Inventory:
    """Every norm layer of ``model``, which is left as it is; ``example_inputs`` as in ``normsurgeon.plan``.

    :raises TracingError: when the model cannot be copied.

    >>> import timm
    >>> inspect(timm.create_model("test_resnet")).summary()
    '15 BatchNorm'
    """
    require_plain(model)
    traced = trace(model, example_inputs)
    batch_norms = [
        {
            "name": site.name,
            "class": site.class_name,
            "family": "BatchNorm",
            "channels": site.channels,
            "groups": None,
            "input_shape": list(site.input_shape) if site.input_shape else None,
            "producer": site.producer,
            "foldable": site.foldable,
            "activation": site.activation,
            "reason": site.unreadable or site.reason,
            "calls": site.calls,
        }
        for site in find_sites(traced)
    ]
    others = [
        {
            "name": path,
            "class": type(module).__name__,
            "family": family,
            "channels": _channels(module),
            "groups": getattr(module, "num_groups", None),
            "input_shape": None,
            "producer": None,
            "foldable": None,
            "activation": None,
            "reason": None,
            "calls": None,
        }
        for path, module in model.named_modules()
        if (family := family_of(module)) not in (None, "BatchNorm")
    ]
    return Inventory(
        model=name or type(model).__name__,
        traced_by=traced.traced_by,
        sites=(*batch_norms, *others),
        notes=traced.notes,
    )


def _channels(module: nn.Module) -> int | None:
    for attribute in ("num_channels", "num_features"):
        if isinstance(getattr(module, attribute, None), int):
            return getattr(module, attribute)
    shape = getattr(module, "normalized_shape", None)
    return int(shape[-1]) if shape else None
