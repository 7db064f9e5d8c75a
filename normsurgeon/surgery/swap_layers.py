"""Swapping any layers of a model for others: the general case of which the norm conversion is one use."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from normsurgeon._util.one_line import one_line
from normsurgeon.errors import ConversionError, UsageError
from normsurgeon.graph.skeleton import deepcopy_module
from normsurgeon.patterns import select, shorten
from normsurgeon.surgery.replacing import Swap, copy_model, replace_modules_

_NOT_SETTINGS = ("training", "track_running_stats")
"""Of an old layer, what would give a new one running statistics that it has not seen."""

Match = type[nn.Module] | tuple[type[nn.Module], ...] | str | Callable[[str, nn.Module], bool]


Build = Callable[..., nn.Module] | type[nn.Module] | nn.Module


def swap_layers(
    model: nn.Module,
    match: Match,
    build: Build,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> Swap:
    """A copy of ``model`` in which every layer that matches is replaced by another.

    match   a module class or tuple of classes (by ``isinstance``), a glob of module paths, or a function
            ``(name, module) -> bool``
    build   the new layer: a class of layers, which is made with the old layer's settings of the same name (``inplace``,
            ``in_channels``, ``bias``); a layer, of which each place gets a copy; or a function that takes the old layer
            (and, if it takes two arguments, its path) and returns the new one, or the old one to leave it in place

    The copy keeps the class, methods, names and hooks; a shared layer is built once and shared again; the new layers
    take over the old ones' training flag, device and dtype. A match inside a matched layer is not visited.

    New layers have the weights that they are made with.

    :raises UsageError: when nothing matches, ``build`` returns no module, or is a class that needs other settings.
    :raises PatternError: when a glob matches no path.
    :raises ConversionError: when a new layer cannot be moved to the old one's device, or the model itself matches.

    >>> import timm
    >>> swap = swap_layers(timm.create_model("test_resnet"), nn.ReLU, nn.SiLU)
    >>> any(isinstance(m, nn.ReLU) for m in swap.model.modules())
    False
    """
    new_model, new_optimizer = copy_model(model, optimizer)
    chosen = _outermost(_chosen(new_model, match))
    make = _maker(build)
    replacements: dict[nn.Module, nn.Module] = {}
    for name, module in chosen.items():
        built = make(module, name)
        if not isinstance(built, nn.Module):
            raise UsageError(f"build returned {type(built).__name__} for {name}; it must return an nn.Module")
        if built is not module:
            _move_like(built, module, new_model, name)
        replacements[module] = built
    replace_modules_(new_model, replacements, new_optimizer)
    return Swap(new_model, tuple(n for n, m in chosen.items() if replacements[m] is not m), new_optimizer)


def _chosen(model: nn.Module, match: Match) -> dict[str, nn.Module]:
    named: dict[str, nn.Module] = dict(model.named_modules())
    if isinstance(match, str):
        names = select(match, [name for name in named if name], what="layer")
        return {name: named[name] for name in names}
    if isinstance(match, (type, tuple)):
        found = {name: module for name, module in named.items() if isinstance(module, match)}
    else:
        found = {name: module for name, module in named.items() if match(name, module)}
    if not found:
        classes = shorten(sorted({type(module).__name__ for module in named.values()}))
        raise UsageError(f"nothing in this {type(model).__name__} matches {match!r}; its layers are: {classes}")
    return found


def _outermost(found: dict[str, nn.Module]) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in found.items()
        if not any(name.startswith(f"{other}.") for other in found if other) and ("" not in found or name == "")
    }


def _maker(build: Build) -> Callable[[nn.Module, str], nn.Module]:
    """What makes the new layer for an old one and its path."""
    if isinstance(build, nn.Module):
        return lambda old, name: deepcopy_module(build)
    if isinstance(build, type):
        return lambda old, name: _made_like(build, old, name)
    if len(_required(build)) >= 2:
        return build
    return lambda old, name: build(old)


def _made_like(new: type[nn.Module], old: nn.Module, name: str) -> nn.Module:
    """A layer of a class with the old layer's settings of the same name; around the old layer, if it takes only one."""
    settings: dict[str, Any] = {}
    for parameter in _parameters(new):
        value = getattr(old, parameter, None)
        if parameter == "bias" and hasattr(old, "bias"):
            settings["bias"] = value is not None
        elif isinstance(value, (bool, int, float, str, tuple)) and parameter not in _NOT_SETTINGS:
            settings[parameter] = value
    unknown = [parameter for parameter in _required(new) if parameter not in settings]
    try:
        return new(old) if len(_required(new)) == len(unknown) == 1 else new(**settings)
    except Exception as error:  # a constructor may raise anything
        needs = f"it also needs {', '.join(unknown)}" if unknown else one_line(error)
        raise UsageError(
            f"a {new.__name__} cannot be made from the settings of {name}, a {type(old).__name__}: {needs}; "
            f"give a function instead, as in lambda old: {new.__name__}(…)"
        ) from error


def _required(build: Callable[..., Any]) -> list[str]:
    """The names of the arguments without which a function cannot be called."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, p in _parameters(build).items() if p.kind in kinds and p.default is inspect.Parameter.empty]


def _parameters(build: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(build).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return {}


def _move_like(built: nn.Module, old: nn.Module, model: nn.Module, name: str) -> None:
    tensors = [*old.parameters(), *old.buffers(), *model.parameters()]
    reference = next((t for t in tensors if t.is_floating_point()), None)
    if reference is None:
        return
    try:
        built.to(device=reference.device, dtype=reference.dtype)
    except (RuntimeError, NotImplementedError) as error:
        raise ConversionError(f"the new layer for {name} cannot move to {reference.device}: {error}") from error
