"""Where a model came from and what was done to it: what its checkpoint says besides the tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from normsurgeon._util.schema import damaged, parsed, read_as
from normsurgeon.errors import CheckpointError
from normsurgeon.models.header_schema import HeaderSchema
from normsurgeon.models.registry import ModelSource, timm_source_of
from normsurgeon.models.state_dict import KEY
from normsurgeon.surgery.convert import Conversion, Record
from normsurgeon.surgery.plan import FORMAT as PLAN_FORMAT
from normsurgeon.surgery.plan import ConversionPlan

FORMAT = 1


@dataclass(frozen=True)
class Origin:
    """Where a model came from and what was done to it: kept on the model, written into its checkpoint.

    ``source`` is None for a model that was made by hand: its checkpoint then needs ``load(path, model=…)``.
    """

    source: ModelSource | None
    plans: tuple[ConversionPlan, ...] = ()
    history: tuple[Mapping[str, Any], ...] = ()
    data: Mapping[str, Any] | None = None
    eps: Mapping[str, float] = field(default_factory=dict)
    """Each layer's eps; a new norm's goes with the scale of its input, which is not known without the statistics."""

    def to_dict(self) -> dict[str, Any]:
        """Plain types, the header of a checkpoint."""
        from normsurgeon.version import __version__

        return {
            "format": FORMAT,
            "version": __version__,
            "source": self.source.to_dict() if self.source else None,
            "plan": self.plans[-1].to_dict() if self.plans else None,
            "earlier_plans": [plan.to_dict() for plan in self.plans[:-1]],
            "history": [dict(event) for event in self.history],
            "data": dict(self.data) if self.data else None,
            "eps": dict(self.eps),
        }

    @classmethod
    def from_dict(cls, header: Mapping[str, Any], where: str) -> Origin:
        """The inverse of ``to_dict``.

        :raises CheckpointError: another format, or a damaged header.
        """
        if header.get("format") != FORMAT:
            raise CheckpointError(
                f"{where} has checkpoint format {header.get('format')!r}, and this version reads format "
                f"{FORMAT}; try: pip install --upgrade normsurgeon"
            )
        for plan in _plans_in(header):
            if plan.get("format") != PLAN_FORMAT:
                raise CheckpointError(
                    f"{where}: its plan has format {plan.get('format')!r}, and this version reads format "
                    f"{PLAN_FORMAT}; try: pip install --upgrade normsurgeon"
                )
        read = read_as(HeaderSchema, dict(header), f"the header of {where}")
        plans = [*read.earlier_plans, *([read.plan] if read.plan else [])]
        return cls(
            source=ModelSource(read.source.kind, read.source.name, read.source.kwargs) if read.source else None,
            plans=tuple(map(ConversionPlan.of, plans)),
            history=read.history,
            data=read.data.model_dump(exclude_unset=True) if read.data else None,
            eps=read.eps,
        )


def origin_of(model: nn.Module) -> Origin:
    """What is known of a model's origin; of a timm model made elsewhere, what its configuration says."""
    found = getattr(model, "_normsurgeon_origin", None)
    if isinstance(found, Origin):
        return found
    return Origin(timm_source_of(model) if type(model).__module__.startswith("timm.") else None)


def plans_of(result: Conversion | nn.Module) -> tuple[ConversionPlan, ...]:
    """All plans that were carried out on a network, in their order."""
    if not isinstance(result, Conversion):
        return origin_of(result).plans
    return (*origin_of(result.model).plans, *([result.plan] if result.plan is not None else []))


def history_of(result: Conversion | nn.Module) -> tuple[Mapping[str, Any], ...]:
    """All that was done to a network, in its order, as plain types."""
    if not isinstance(result, Conversion):
        return origin_of(result).history
    own = () if result.plan is None else result.events
    return (*origin_of(result.model).history, *own)


def add_record_(result: Conversion, record: Record) -> Conversion:
    """Append to a network's history, in place.

    A network without a plan came as a module, and may be used as one again: its origin keeps the record, too.
    """
    result.history.append(record)
    if result.plan is None:
        origin = origin_of(result.model)
        attach_origin(result.model, replace(origin, history=(*origin.history, record.to_dict())))
    return result


def attach_origin(model: nn.Module, origin: Origin) -> nn.Module:
    """Note a model's origin on it. An attribute, so that it survives copies; no part of the state dict."""
    model._normsurgeon_origin = origin  # type: ignore[assignment]
    return model


def header_of(rest: Mapping[str, Any], where: str) -> Origin | None:
    """The origin in a file's metadata, or None for a file that normsurgeon did not write.

    :raises CheckpointError: as ``Origin.from_dict``.
    """
    header = rest.get(KEY)
    if header is None:
        return None
    if isinstance(header, str):
        header = parsed(header, f"the header of {where}")
    if not isinstance(header, dict):
        raise damaged(f"the header of {where}", "", f"a {type(header).__name__}, and a JSON object was expected")
    return Origin.from_dict(header, where)


def _plans_in(header: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    earlier = header.get("earlier_plans")
    for plan in (header.get("plan"), *(earlier if isinstance(earlier, (list, tuple)) else ())):
        if isinstance(plan, Mapping):
            yield plan
