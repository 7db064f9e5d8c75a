"""Swapping any layers of a model for others: the general case of which the norm conversion is one use."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from normsurgeon.errors import ConversionError, UsageError
from normsurgeon.patterns import select, shorten
from normsurgeon.surgery.replacing import copy_model, replace_modules_

Match = type[nn.Module] | tuple[type[nn.Module], ...] | str | Callable[[str, nn.Module], bool]


@dataclass
class Swap:
    """What ``swap_layers`` returns: the new model, the paths that were swapped, and the optimizer handed over."""

    model: nn.Module
    swapped: tuple[str, ...]
    optimizer: torch.optim.Optimizer | None = None


def swap_layers(
    model: nn.Module,
    match: Match,
    build: Callable[..., nn.Module],
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> Swap:
    """A copy of ``model`` in which every layer that matches is replaced by ``build(layer)``.

    match   a module class or tuple of classes (by ``isinstance``), a glob of module paths, or a function
            ``(name, module) -> bool``
    build   takes the old layer (and, if it takes two arguments, its path) and returns the new one; returning the
            old layer leaves it in place

    The copy keeps the class, methods, names and hooks; a shared layer is built once and shared again; the new layers
    take over the old ones' training flag, device and dtype. A match inside a matched layer is not visited.

    :raises UsageError: when nothing matches, or ``build`` returns no module.
    :raises PatternError: when a glob matches no path.
    :raises ConversionError: when a new layer cannot be moved to the old one's device, or the model itself matches.

    >>> import timm
    >>> swap = swap_layers(timm.create_model("test_resnet"), nn.ReLU, lambda relu: nn.SiLU(inplace=relu.inplace))
    >>> any(isinstance(m, nn.ReLU) for m in swap.model.modules())
    False
    """
    new_model, new_optimizer = copy_model(model, optimizer)
    chosen = _outermost(_chosen(new_model, match))
    takes_name = _positional_arguments(build) >= 2
    replacements: dict[nn.Module, nn.Module] = {}
    for name, module in chosen.items():
        built = build(module, name) if takes_name else build(module)
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


def _positional_arguments(build: Callable[..., nn.Module]) -> int:
    try:
        parameters = inspect.signature(build).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return 1
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)


def _move_like(built: nn.Module, old: nn.Module, model: nn.Module, name: str) -> None:
    tensors = [*old.parameters(), *old.buffers(), *model.parameters()]
    reference = next((t for t in tensors if t.is_floating_point()), None)
    if reference is None:
        return
    try:
        built.to(device=reference.device, dtype=reference.dtype)
    except (RuntimeError, NotImplementedError) as error:
        raise ConversionError(f"the new layer for {name} cannot move to {reference.device}: {error}") from error
