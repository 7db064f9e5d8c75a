"""Which layers to look at, and what is known of each before any image has gone through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from normsurgeon.errors import PatternError, TracingError, UsageError
from normsurgeon.graph.activations import activations
from normsurgeon.graph.blocks import residual_blocks
from normsurgeon.graph.sites import find_sites
from normsurgeon.graph.trace import trace
from normsurgeon.norms.families import family_of
from normsurgeon.patterns import select, shorten

KINDS = ("norm", "convolution", "linear", "block")
"""What is looked at unless layers are named."""

_RECTIFIERS = ("ReLU", "ReLU6", "relu", "relu_")


@dataclass(frozen=True, eq=False)
class Layer:
    """One module whose output is looked at.

    kind       one of ``KINDS``, or ``other`` for a module that was asked for by name
    rectified  whether a ReLU alone reads its output: then a channel that is never above 0 never fires
    feeds      path of the batch norm that it feeds and can absorb, if there is one
    """

    name: str
    kind: str
    module: nn.Module
    rectified: bool = False
    feeds: str | None = None


def kind_of(module: nn.Module) -> str:
    """``norm``, ``convolution``, ``linear`` or ``other``: what a module is by its class alone.

    >>> [kind_of(m) for m in (nn.BatchNorm2d(4), nn.Conv1d(1, 1, 1), nn.Linear(1, 1), nn.ReLU())]
    ['norm', 'convolution', 'linear', 'other']
    """
    if family_of(module) is not None:
        return "norm"
    if isinstance(module, _ConvNd):
        return "convolution"
    return "linear" if isinstance(module, nn.Linear) else "other"


def choose_layers(
    model: nn.Module,
    patterns: Sequence[str] = (),
    kinds: Sequence[str] = KINDS,
    example_inputs: Any = None,
    lenient: bool = False,
) -> tuple[Layer, ...]:
    """The layers of ``model`` to look at, in the module tree's order: children before the block that holds them.

    patterns  globs over module paths; they may name any module. None: all modules of the given kinds
    kinds     with no patterns: which kinds; with patterns: ignored
    lenient   a pattern that matches no module is no error

    :raises PatternError: a pattern that matches no module.
    :raises UsageError: an unknown kind, or a model without any such layer.

    >>> import timm
    >>> [layer.name for layer in choose_layers(timm.create_model("test_resnet"), kinds=("block", "linear"))]
    ['layer1.0', 'layer2.0', 'layer3.0', 'layer4.0', 'fc']
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise UsageError(f"there is no kind of layer {unknown[0]!r}; try {', '.join(KINDS)}")
    try:
        traced = trace(model, example_inputs)
        blocks, after = set(residual_blocks(traced)), activations(traced)
        feeds = {site.producer: site.name for site in find_sites(traced) if site.foldable}
    except TracingError:
        blocks, after, feeds = set(), {}, {}  # the layers are still there, only their surroundings are unknown
    modules = _after_their_children(model)
    wanted = set()
    if not patterns:
        wanted = {n for n, module in modules.items() if kind_of(module) in kinds or ("block" in kinds and n in blocks)}
    for pattern in patterns:
        try:
            wanted |= set(select(pattern, list(modules), "module"))
        except PatternError:
            if not lenient:
                raise
    found = tuple(
        Layer(
            name=name,
            kind="block" if name in blocks else kind_of(module),
            module=module,
            rectified=after.get(name) in _RECTIFIERS,
            feeds=feeds.get(name),
        )
        for name, module in modules.items()
        if name in wanted
    )
    if not found and not patterns:
        raise UsageError(
            f"this {type(model).__name__} has no {' or '.join(kinds)} layer; "
            f"name the modules to look at: {shorten(list(modules))}"
        )
    return found


def _after_their_children(model: nn.Module) -> dict[str, nn.Module]:
    """Every module but the root once, by its first path, a module after those inside it."""
    canonical = dict(model.named_modules())
    ordered: dict[str, nn.Module] = {}

    def visit(name: str, module: nn.Module) -> None:
        prefix = f"{name}." if name else ""
        for child_name, child in module.named_children():
            path = prefix + child_name
            if canonical.get(path) is child:
                visit(path, child)
        if name:
            ordered[name] = module

    visit("", model)
    return ordered
