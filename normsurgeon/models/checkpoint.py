"""Saving a converted model and getting it back: architecture, plans, history and weights in one file.

``.safetensors``: the tensors, and in the header one JSON text under ``normsurgeon``. ``.pt``: a dict of plain
types with ``state_dict`` and ``normsurgeon``. Reading runs no code from a file, nor any that it names.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from normsurgeon._util.files import check_writable, write_atomically
from normsurgeon.errors import CheckpointError, NormSurgeonError, UsageError
from normsurgeon.models.described import differing_arguments
from normsurgeon.models.registry import (
    DEMO,
    HUB_PREFIXES,
    ModelSource,
    build,
    timm_source_of,
    torchvision_sources_of,
)
from normsurgeon.models.state_dict import KEY, StateDict, load_state_dict_into, write_pickle, write_safetensors
from normsurgeon.surgery.convert import Conversion, Record, convert_
from normsurgeon.surgery.plan import ConversionPlan
from normsurgeon.surgery.replacing import Swap

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
        try:
            source = header["source"]
            plans = [*header["earlier_plans"], *([header["plan"]] if header["plan"] else [])]
            return cls(
                source=ModelSource(**source) if source else None,
                plans=tuple(ConversionPlan.from_dict(plan) for plan in plans),
                history=tuple(header["history"]),
                data=header["data"],
                eps=dict(header.get("eps", {})),
            )
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from error
        except (KeyError, TypeError, AttributeError, ValueError, UsageError) as error:
            raise CheckpointError(f"{where}: the header is damaged ({type(error).__name__} {error})") from error


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


def save(
    result: Conversion | Swap | nn.Module,
    path: str | os.PathLike[str],
    *,
    on_message: Callable[[str], None] = warnings.warn,
) -> Path:
    """Write a conversion (or a model, or a ``Swap``) to ``path``: ``.safetensors``, or ``.pt`` / ``.pth``.

    Atomic, and the same bytes for the same network. ``on_message`` is called with one line if ``load`` will need more
    than the file; default: ``warnings.warn``.

    :raises UsageError: another file ending, or no network.
    :raises CheckpointError: when the file cannot be written; what stood there is untouched.

    >>> import normsurgeon as ns, tempfile, timm
    >>> result = ns.convert(timm.create_model("test_resnet"), to="gn")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(result, f"{folder}/gn.safetensors")
    ...     type(ns.load(path)).__name__
    'ResNet'
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise UsageError(f"{path}: the ending says the format, and must be .safetensors, .pt or .pth")
    result = result.model if isinstance(result, Swap) else result
    if not isinstance(result, (Conversion, nn.Module)):
        raise UsageError(f"a {type(result).__name__} is no network: save takes a conversion or a torch.nn.Module")
    if isinstance(result, Conversion):
        model, origin = result.model, origin_of(result.model)
        origin = replace(
            origin,
            plans=plans_of(result),
            history=history_of(result),
        )
    else:
        model, origin = result, origin_of(result)
    check_writable(path)
    if origin.plans:
        modules = model.named_modules()
        origin = replace(origin, eps={k: m.eps for k, m in modules if isinstance(getattr(m, "eps", None), float)})
    origin = _rebuildable(model, origin, str(path), on_message)
    try:
        text = json.dumps(origin.to_dict())
    except TypeError as error:
        raise CheckpointError(f"cannot write {path}: the history is not of plain types ({error})") from error
    state = {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    if path.suffix == ".safetensors":
        write_atomically(path, lambda temporary: write_safetensors(temporary, state, {KEY: text}))
    else:
        content = {"state_dict": state, KEY: json.loads(text)}
        write_atomically(path, lambda temporary: write_pickle(temporary, content))
    return path


def _rebuildable(model: nn.Module, origin: Origin, where: str, on_message: Callable[[str], None]) -> Origin:
    """The origin, with a source that does give back ``model``'s layers, or with none."""
    own, guessed = origin.source, timm_source_of(model)
    if own is not None and own.kind == "callable" and _is_plain(own.kwargs):
        return origin
    # A hub id needs the network each time; the timm name of the same architecture does not.
    known = (guessed, own) if own is not None and own.name.startswith(HUB_PREFIXES) else (own, guessed)
    for source in (*known, *(_torchvision_sources(model, origin) if own is None else ())):
        if source is not None and _is_plain(source.kwargs) and _gives(replace(origin, source=source), model):
            return replace(origin, source=source)
    if own is not None:
        on_message(
            f"{where}: the model's layers are not those of {own.name} (changed by hand, or the .model of a "
            "conversion saved instead of the conversion): loading it takes load(path, model=one built alike)"
        )
    else:
        needed = "the BatchNorm model" if origin.plans else "one built alike"
        on_message(
            f"{where}: {type(model).__name__} is none of timm's or torchvision's networks, and its architecture is not "
            f"in the file: loading it takes load(path, model={needed})"
        )
    return replace(origin, source=None)


def _torchvision_sources(model: nn.Module, origin: Origin) -> Iterator[ModelSource]:
    """How torchvision may have made a network: each builder of its module, with as many classes as the network has."""
    state = {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    for source in torchvision_sources_of(model):
        rebuilt = _rebuilt(replace(origin, source=source))
        if rebuilt is not None and rebuilt.state_dict().keys() == state.keys():
            shown = differing_arguments(rebuilt.state_dict(), state)
            classes = {key: value for key, value in shown.items() if key == "num_classes"}
            yield replace(source, kwargs={**source.kwargs, **classes})


def _is_plain(kwargs: Mapping[str, Any]) -> bool:
    try:
        json.dumps(dict(kwargs))
    except TypeError:
        return False
    return True


def _gives(origin: Origin, model: nn.Module) -> bool:
    """Whether making the source and replaying the plans comes out at ``model``'s layers. Needs no memory."""
    try:
        rebuilt = _rebuilt(origin)
    except (RuntimeError, NotImplementedError):
        return True  # an architecture that cannot be made without memory: nothing speaks against it
    return rebuilt is not None and _layers(rebuilt) == _layers(model)


def _rebuilt(origin: Origin) -> nn.Module | None:
    """The source with the plans replayed, on the meta device; None where they do not go together."""
    assert origin.source is not None
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return _replayed(build(origin.source), origin)
    except NormSurgeonError:
        return None


def _layers(model: nn.Module) -> tuple[Any, ...]:
    """Every layer's class and settings, and every tensor's shape; dropout aside, a matter of training."""
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    if isinstance(model, fx.GraphModule):
        return (shapes,)
    layers = {k: (type(m).__name__, m.extra_repr()) for k, m in model.named_modules()}
    return shapes, {k: layer for k, layer in layers.items() if not layer[0].startswith("Drop")}


def header_of(rest: Mapping[str, Any], where: str) -> Origin | None:
    """The origin in a file's metadata, or None for a file that normsurgeon did not write."""
    header = rest.get(KEY)
    if header is None:
        return None
    if isinstance(header, str):
        try:
            header = json.loads(header)
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{where}: the header is damaged ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{where}: the header is damaged (a {type(header).__name__})")
    return Origin.from_dict(header, where)


def architecture_of(origin: Origin, where: str) -> nn.Module:
    """The batch norm network that a checkpoint's plans start from, with random weights.

    :raises CheckpointError: when the file does not say, or names a callable: a file must not run code.
    """
    source = origin.source
    if source is None:
        raise CheckpointError(
            f"{where} was saved from a model made by hand, and its architecture is not in the file; "
            "try: normsurgeon.load(path, model=the BatchNorm model)"
        )
    if source.kind == "callable" and source.name != DEMO:
        raise CheckpointError(
            f"{where} was made from {source.name}, which is code, and a file does not decide what code runs; "
            f"try: {source.name} --weights {where} (in Python: load({source.name!r}, weights=path))"
        )
    return build(source)


def _replayed(model: nn.Module, origin: Origin) -> nn.Module:
    for plan in origin.plans:
        model = convert_(model, plan, values=False).model
    # A file from before 2026-11-26 names eps only where a plan softens: then its norms have the original's.
    before = {d.name: d.site.eps for plan in origin.plans for d in plan.decisions if d.status == "converted"}
    known = origin.eps or before
    for name, module in model.named_modules():
        if name in known and isinstance(getattr(module, "eps", None), float):
            module.eps = known[name]
    return model


def rebuild(
    state: StateDict,
    origin: Origin,
    where: str,
    model: nn.Module,
    on_message: Callable[[str], None],
    prefix: str | None = None,
) -> nn.Module:
    """Replay a checkpoint's plans on ``model``, in place, and load strictly.

    prefix  of several networks in the file, the one to take

    :raises CheckpointError: when the tensors do not fit.
    :raises ConversionError: when the plans were made for another architecture.
    """
    model = _replayed(model, origin)
    load_state_dict_into(model, state, where, on_message, prefix)
    if origin.data:
        model.pretrained_cfg = dict(origin.data)  # type: ignore[assignment]
    return attach_origin(model, origin).eval()
