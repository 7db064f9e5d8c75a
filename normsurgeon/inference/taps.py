"""Which outputs of a network are followed while it trains, and reading them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from normsurgeon.data.transforms import DataConfig
from normsurgeon.errors import TracingError, UsageError
from normsurgeon.graph.blocks import residual_blocks
from normsurgeon.graph.trace import trace
from normsurgeon.inference.hooks import listening
from normsurgeon.inference.run import eval_mode, home_of, name_of
from normsurgeon.patterns import select
from normsurgeon.surgery.plan import ConversionPlan


@contextmanager
def tapped(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """A dict that, after each forward pass, holds the named modules' outputs (of several calls, the last).

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with tapped(net, ["0"]) as outputs:
    ...     _ = net(torch.ones(1, 2))
    >>> outputs["0"].shape, len(net[0]._forward_hooks)
    (torch.Size([1, 3]), 0)
    """
    outputs: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def keeping(name: str) -> Callable[[Tensor], None]:
        return lambda x: outputs.__setitem__(name, x)

    with listening([(modules[name], "output", keeping(name)) for name in names]):
        yield outputs


def block_names(model: nn.Module, plans: Sequence[ConversionPlan] = ()) -> tuple[str, ...]:
    """The modules whose outputs stand for a network's features: residual blocks, else the children with parameters.

    The classifier is left out: its output are the logits. So is what hands a whitened output to a converted norm
    outside of itself, by the ``plans`` that were carried out: that output differs from the original's by design.

    :raises UsageError: a network that has neither.
    """
    blocks = list(residual_blocks(trace(model)))
    if not blocks:
        blocks = [name for name, child in model.named_children() if any(True for _ in child.parameters())][:-1]
    decisions = [decision for plan in plans for decision in plan.decisions]
    folds = [(d.site.producer or "", d.name) for d in decisions if "fold" in (d.whitening, d.target)]

    def whitened(block: str) -> bool:
        return any(_within(producer, block) and not _within(norm, block) for producer, norm in folds)

    chosen = tuple(block for block in blocks if not whitened(block))
    if not chosen:
        raise UsageError(
            f"{type(model).__name__} has no residual blocks and no stages to match features at; "
            "try features=0, or distance_layers with a glob of layer names"
        )
    return chosen


def shared_blocks(
    model: nn.Module, teacher: nn.Module, plans: Sequence[ConversionPlan], config: DataConfig, required: bool
) -> tuple[str, ...]:
    """The blocks whose outputs can be matched: those that both networks call, with outputs of the same shape.

    In the order in which they are called.

    :raises UsageError: when there are none although they are ``required``.
    """
    try:
        names = block_names(model, plans)
    except (UsageError, TracingError):
        if required:
            raise
        return ()
    shapes = []
    for each in (model, teacher):
        device, dtype = home_of(each)
        shapes.append(_reached(each, names, torch.zeros(1, *config.input_size, device=device, dtype=dtype)))
    shared = tuple(name for name, shape in shapes[0].items() if shape == shapes[1].get(name))
    if required and not shared:
        raise UsageError(
            f"{name_of(model)} and its teacher {name_of(teacher)} have no blocks with outputs of the same shape; "
            "try features=0"
        )
    return shared


def _reached(model: nn.Module, names: Sequence[str], image: Tensor) -> dict[str, tuple[int, ...]]:
    """Of the named modules, those that a forward pass of one image calls, and the shapes of what they return."""
    known = {name for name, _ in model.named_modules()}
    with eval_mode(model), torch.no_grad(), tapped(model, [name for name in names if name in known]) as outputs:
        model(image)
        return {name: tuple(x.shape) for name, x in outputs.items()}


def _within(name: str, block: str) -> bool:
    return name == block or name.startswith(f"{block}.")


def matching_layers(model: nn.Module, pattern: str) -> tuple[str, ...]:
    """The modules whose names match a glob.

    :raises PatternError: when none does.
    :raises UsageError: when only one does: a distance takes two.
    """
    chosen = select(pattern, [name for name, _ in model.named_modules() if name], "layer")
    if len(chosen) < 2:
        raise UsageError(f"the pattern {pattern!r} matches {chosen[0]} alone, and a distance takes two layers")
    return chosen
