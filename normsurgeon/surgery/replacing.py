"""Putting modules in the place of others, with everything that hangs on a module carried over.

The one mechanism under both ``convert`` and ``swap_layers``: every path of a shared module, its training flag, its
hooks, and the optimizer that trains its parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normsurgeon.errors import ConversionError, TracingError
from normsurgeon.graph.skeleton import HOOKS, deepcopy_module, require_plain


@dataclass
class Swap:
    """What ``swap_layers`` returns: the new model, the paths that were swapped, and the optimizer handed over."""

    model: nn.Module
    swapped: tuple[str, ...]
    optimizer: torch.optim.Optimizer | None = None


def copy_model(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    """A deep copy of a model and of the optimizer that trains it; the copies belong to each other.

    :raises ConversionError: for a model that cannot be copied or is not plain Python.
    """
    require_plain(model)
    try:
        return deepcopy_module((model, optimizer))
    except TracingError as error:
        raise ConversionError(str(error)) from error


def replace_modules_(
    model: nn.Module,
    replacements: Mapping[nn.Module, nn.Module],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    touched: Iterable[nn.Parameter] = (),
    gained: Mapping[nn.Parameter, nn.Parameter] | None = None,
) -> None:
    """Put each new module at every path of its old one, in place.

    ``touched``: parameters whose values were changed, whose optimizer state is stale. ``gained``: new parameters of
    modules that stay, each under the parameter whose group it joins.

    :raises ConversionError: when the model itself is to be replaced.
    """
    if model in replacements:
        raise ConversionError(
            f"the model is itself the {type(model).__name__} to replace; wrap it, as in nn.Sequential(model)"
        )
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            new = replacements.get(child) if child is not None else None
            if new is not None:
                parent._modules[name] = new
                # Where a class looks its child up by attribute only, _modules is what nn.Module answers from.
    for old, new in replacements.items():
        if new is not old:
            _inherit(old, new)
    if optimizer is not None:
        _update_optimizer(optimizer, replacements, set(touched), gained or {})


def _inherit(old: nn.Module, new: nn.Module) -> None:
    """Training flag and hooks. Children that came from the old module keep their own flags."""
    kept = {id(module) for module in old.modules()}
    for module in new.modules():
        if id(module) not in kept:
            module.training = old.training
    for hooks in HOOKS:
        ours, theirs = getattr(new, hooks, None), getattr(old, hooks, None)
        if theirs and ours is not None:
            ours.update(theirs)


def _update_optimizer(
    optimizer: torch.optim.Optimizer,
    replacements: Mapping[nn.Module, nn.Module],
    touched: set[nn.Parameter],
    gained: Mapping[nn.Parameter, nn.Parameter],
) -> None:
    successors: dict[Any, list[nn.Parameter]] = {}
    surviving = {p for new in replacements.values() for p in new.parameters()}
    for old, new in replacements.items():
        known = set(old.parameters())
        fresh = [p for p in new.parameters() if p not in known]
        for parameter in old.parameters():
            if parameter not in surviving:
                successors.setdefault(parameter, []).extend(fresh)
                fresh = []  # all of them in the place of the first
    for neighbour, new_parameter in gained.items():
        successors.setdefault(neighbour, [neighbour]).append(new_parameter)
    seen: set[nn.Parameter] = set()
    for group in optimizer.param_groups:
        renewed = []
        for parameter in group["params"]:
            for successor in successors.get(parameter, [parameter]):
                if successor not in seen:
                    seen.add(successor)
                    renewed.append(successor)
        group["params"] = renewed
    for stale in list(optimizer.state):
        if stale not in seen or stale in touched:
            del optimizer.state[stale]
