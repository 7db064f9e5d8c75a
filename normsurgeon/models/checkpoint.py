"""Saving a converted model and getting it back: architecture, plans, history and weights in one file.

``.safetensors``: the tensors, and in the header one JSON text under ``normsurgeon``. ``.pt``: a dict of plain
types with ``state_dict`` and ``normsurgeon``. Reading runs no code from a file, nor any that it names.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from normsurgeon._util.files import check_writable, write_atomically
from normsurgeon._util.schema import MAX_TEXT
from normsurgeon.errors import CheckpointError, NormSurgeonError, UsageError
from normsurgeon.models.described import differing_arguments
from normsurgeon.models.origin import Origin, add_record_, attach_origin, header_of, history_of, origin_of, plans_of
from normsurgeon.models.rebuilding import skeleton, why_refused
from normsurgeon.models.registry import ModelSource, timm_source_of, torchvision_sources_of
from normsurgeon.models.state_dict import KEY, write_pickle, write_safetensors
from normsurgeon.surgery.convert import Conversion
from normsurgeon.surgery.replacing import Swap

__all__ = ["Origin", "add_record_", "attach_origin", "header_of", "history_of", "origin_of", "plans_of", "save"]


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
    if len(text) > MAX_TEXT:
        raise CheckpointError(f"cannot write {path}: its plans and history have {len(text)} characters of {MAX_TEXT}")
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
    # What a file may not decide (an address, arguments that are code) would not be built again from it.
    for source in (own, guessed, *(_torchvision_sources(model, origin) if own is None else ())):
        if source is not None and why_refused(source) is None and _gives(replace(origin, source=source), model):
            return replace(origin, source=source)
    if own is not None:
        refused = why_refused(own)
        why = (
            f"the model was made from {own.name}, {refused}"
            if refused is not None
            else f"the model's layers are not those of {own.name} (changed by hand, or the .model of a "
            "conversion saved instead of the conversion)"
        )
        on_message(f"{where}: {why}: loading it takes load(path, model=one built alike)")
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
    rebuilt = _rebuilt(origin)
    return rebuilt is not None and _layers(rebuilt) == _layers(model)


def _rebuilt(origin: Origin) -> nn.Module | None:
    """The source with the plans replayed, on the meta device; None where they do not go together."""
    assert origin.source is not None
    try:
        return skeleton(origin.source, origin)
    except NormSurgeonError:
        return None


def _layers(model: nn.Module) -> tuple[Any, ...]:
    """Every layer's class and settings, and every tensor's shape; dropout aside, a matter of training."""
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    if isinstance(model, fx.GraphModule):
        return (shapes,)
    layers = {k: (type(m).__name__, m.extra_repr()) for k, m in model.named_modules()}
    return shapes, {k: layer for k, layer in layers.items() if not layer[0].startswith("Drop")}
