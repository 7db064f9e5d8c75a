"""What norm layers a model has, batch norms and others alike: the record behind ``normsurgeon inspect``."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from normsurgeon.graph.sites import find_sites
from normsurgeon.graph.skeleton import require_plain
from normsurgeon.graph.trace import trace
from normsurgeon.norms.families import family_of, width_of
from normsurgeon.render.document import Column, Document, Notes, Section, Table
from normsurgeon.render.presentable import Presentable


@dataclass(frozen=True)
class NormLayer:
    """One norm layer of a model; below ``groups``, what is known of batch norms alone (see ``NormSite``)."""

    name: str
    class_name: str
    family: str
    channels: int | None = None
    groups: int | None = None
    input_shape: tuple[int, ...] | None = None
    producer: str | None = None
    foldable: bool | None = None
    activation: str | None = None
    reason: str | None = None
    calls: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        values = {"class" if k == "class_name" else k: v for k, v in asdict(self).items()}
        return {**values, "input_shape": list(self.input_shape) if self.input_shape else None}


@dataclass(frozen=True)
class Inventory(Presentable):
    """All norm layers of a model, batch norms in the order of the data's flow first."""

    model: str
    traced_by: str
    sites: tuple[NormLayer, ...]
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """How many layers of each Python class."""
        return dict(Counter(site.class_name for site in self.sites))

    @property
    def families(self) -> dict[str, int]:
        """How many layers of each kind of norm; "BatchNorm" is always there."""
        found = Counter(site.family for site in self.sites)
        return {"BatchNorm": found.pop("BatchNorm", 0), **found}

    def summary(self) -> str:
        """The families in words: "0 BatchNorm, 53 GroupNorm"."""
        return ", ".join(f"{n} {family}" for family, n in self.families.items())

    def to_dict(self) -> dict[str, Any]:
        """The contract's JSON."""
        return {
            "model": self.model,
            "traced_by": self.traced_by,
            "sites": [site.to_dict() for site in self.sites],
            "counts": self.counts,
            "families": self.families,
            "notes": list(self.notes),
        }

    @property
    def table(self) -> Table:
        """One row a layer."""
        titles = ("layer", "class", "channels", "groups", "input", "producer", "foldable", "activation", "why not")
        rows = (
            (
                *(site.name, site.class_name, site.channels, site.groups),
                "×".join(map(str, site.input_shape[1:])) if site.input_shape else None,
                site.producer,
                {True: "yes", False: "no", None: None}[site.foldable],
                site.activation,
                site.reason,
            )
            for site in self.sites
        )
        return Table(tuple(map(Column, titles)), tuple(rows))

    def document(self) -> Document:
        """The layers, and what of the model was not followed."""
        section = Section("layers", "Layers", (self.table, Notes(self.notes)))
        return Document("Norm layers", self.model, (section,), subtitle=self.summary())


def inspect(model: nn.Module, *, name: str | None = None, example_inputs: Any = None) -> Inventory:
    """Every norm layer of ``model``, which is left as it is; ``example_inputs`` as in ``normsurgeon.plan``.

    :raises TracingError: when the model cannot be copied.

    >>> import timm
    >>> inspect(timm.create_model("test_resnet")).summary()
    '15 BatchNorm'
    """
    require_plain(model)
    traced = trace(model, example_inputs)
    batch_norms = (
        NormLayer(
            name=site.name,
            class_name=site.class_name,
            family="BatchNorm",
            channels=site.channels,
            input_shape=site.input_shape,
            producer=site.producer,
            foldable=site.foldable,
            activation=site.activation,
            reason=site.unreadable or site.reason,
            calls=site.calls,
        )
        for site in find_sites(traced)
    )
    others = (
        NormLayer(path, type(module).__name__, family, width_of(module), getattr(module, "num_groups", None))
        for path, module in model.named_modules()
        if (family := family_of(module)) not in (None, "BatchNorm")
    )
    return Inventory(name or type(model).__name__, traced.traced_by, (*batch_norms, *others), traced.notes)
