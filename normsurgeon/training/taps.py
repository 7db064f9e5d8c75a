"""Reading the outputs of layers while a network runs: hooks that live only inside a context manager."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from normsurgeon.errors import UsageError
from normsurgeon.graph.blocks import residual_blocks
from normsurgeon.graph.tracing import trace
from normsurgeon.inference import first_tensor
from normsurgeon.patterns import select


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
    handles = []
    try:
        for name in names:

            def keep(module: nn.Module, inputs: object, output: object, name: str = name) -> None:
                found = first_tensor(output)
                if found is not None:
                    outputs[name] = found

            handles.append(modules[name].register_forward_hook(keep))
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def block_names(model: nn.Module) -> tuple[str, ...]:
    """The modules whose outputs stand for a network's features: residual blocks, else the children with parameters.

    The classifier is left out: its output are the logits.

    :raises UsageError: a network that has neither.
    """
    blocks = residual_blocks(trace(model))
    if blocks:
        return blocks
    children = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    if len(children) < 2:
        raise UsageError(
            f"{type(model).__name__} has no residual blocks and no stages to match features at; "
            "try features=0, or distance_layers with a glob of layer names"
        )
    return tuple(children[:-1])


def matching_layers(model: nn.Module, pattern: str) -> tuple[str, ...]:
    """The modules whose names match a glob.

    :raises PatternError: when none does.
    :raises UsageError: when only one does: a distance takes two.
    """
    chosen = select(pattern, [name for name, _ in model.named_modules() if name], "layer")
    if len(chosen) < 2:
        raise UsageError(f"the pattern {pattern!r} matches {chosen[0]} alone, and a distance takes two layers")
    return chosen
