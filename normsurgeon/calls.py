"""The arguments of one call of a model, as its owner gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.data import DataLoader

from normsurgeon.errors import UsageError


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a model."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def map(self, function: Callable[[Tensor], Tensor]) -> Call:
        """The same call with every tensor in it replaced."""

        def on_tensors(value: Any) -> Any:
            return function(value) if isinstance(value, Tensor) else value

        return Call(tree_map(on_tensors, self.args), tree_map(on_tensors, dict(self.kwargs)))

    def with_kwargs(self, **kwargs: Any) -> Call:
        """The same call with more keyword arguments."""
        return Call(self.args, {**self.kwargs, **kwargs})

    @property
    def tensor(self) -> Tensor | None:
        """The tensor that the model is called with, where that is all there is."""
        values = [*self.args, *self.kwargs.values()]
        return values[0] if len(values) == 1 and isinstance(values[0], Tensor) else None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of ``tensor``."""
        return tuple(self.tensor.shape) if self.tensor is not None else None

    def __call__(self, model: nn.Module) -> Any:
        """Call ``model`` with these arguments."""
        return model(*self.args, **self.kwargs)

    # As a batch: what batches of one tensor can do, too.

    def __len__(self) -> int:
        """The samples: the length of the first tensor."""
        return next(
            (len(t) for t in tree_leaves((self.args, dict(self.kwargs))) if isinstance(t, Tensor) and t.ndim), 0
        )

    def __getitem__(self, rows: slice) -> Call:
        """Some of the samples."""
        count = len(self)
        return self.map(lambda t: t[rows] if t.ndim and len(t) == count else t)

    def to(self, device: torch.device, dtype: torch.dtype | None) -> Call:
        """On another device; what is floating-point in another precision."""
        return self.map(lambda t: t.to(device, dtype if t.is_floating_point() else None))


def as_call(example_inputs: Any) -> Call:
    """An example as its owner gives it, as a call.

    A tensor or a list is one argument, a tuple holds the positional arguments, a dict the keyword arguments, and
    ``(args, kwargs)``, a tuple and a dict, both. Of a data loader it is the first batch: its images, where it holds
    images and labels.

    :raises UsageError: for anything else.

    >>> as_call({"pixel_values": torch.zeros(2, 3, 8, 8)}).shape
    (2, 3, 8, 8)
    """
    if isinstance(example_inputs, Call):
        return example_inputs
    if isinstance(example_inputs, DataLoader):
        batch = next(iter(example_inputs))
        return as_call(batch[0] if isinstance(batch, (tuple, list)) else batch)
    if isinstance(example_inputs, tuple):
        if len(example_inputs) == 2 and isinstance(example_inputs[0], tuple) and isinstance(example_inputs[1], Mapping):
            return Call(example_inputs[0], dict(example_inputs[1]))
        return Call(example_inputs)
    if isinstance(example_inputs, Mapping):
        return Call((), dict(example_inputs))
    if isinstance(example_inputs, (Tensor, list)):
        return Call((example_inputs,))
    raise UsageError(
        f"example_inputs is a {type(example_inputs).__name__}; "
        "give a tensor, a tuple of arguments, a dict, (args, kwargs), or a data loader"
    )


def on(inputs: Tensor | Call, device: torch.device, dtype: torch.dtype | None) -> Any:
    """A batch on a device; what is floating-point in that precision."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, dtype if inputs.is_floating_point() else None)
    return inputs.to(device, dtype)


def outputs_of(model: nn.Module, inputs: Tensor | Call) -> Any:
    """What a model gives for a batch."""
    return inputs(model) if isinstance(inputs, Call) else model(inputs)


def joined(parts: Sequence[Tensor | Call]) -> Any:
    """Several batches as one.

    >>> len(joined([Call((torch.zeros(2, 3),), {"flag": True}), Call((torch.zeros(1, 3),), {"flag": True})]))
    3
    """
    if isinstance(parts[0], Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    flat = [tree_flatten((part.args, dict(part.kwargs))) for part in parts if isinstance(part, Call)]
    if len({repr(structure) for _, structure in flat}) > 1:
        raise UsageError("the batches hold different arguments; give every batch the same ones")
    leaves = [
        torch.cat(each) if isinstance(each[0], Tensor) and each[0].ndim else each[0]
        for each in zip(*(values for values, _ in flat), strict=True)
    ]
    args, kwargs = tree_unflatten(leaves, flat[0][1])
    return Call(args, kwargs)
