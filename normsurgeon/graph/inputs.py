"""What a model is called with: an example as its owner gives it, or a guess from its layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from normsurgeon.errors import UsageError

SIDES = {1: (256, 1024, 16000, 64), 2: (224, 32, 28, 64, 128, 299, 384, 512), 3: (32, 64, 16)}
"""Extents to try where nothing tells the input's: 224 is the ImageNet custom, 32 and 28 those of CIFAR and MNIST."""


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


def guesses(model: nn.Module) -> Iterator[Call]:
    """Calls that the model may accept, the most likely first; their tensors are on the meta device.

    From timm's ``pretrained_cfg``, or from the first convolution or linear layer. Every argument without a default
    gets such a tensor. There are two samples, so that a batch differs from a token dimension.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    required = max(1, sum(p.default is p.empty for p in positional(model)))
    for shape in _shapes(model):
        yield Call(tuple(torch.empty(shape, dtype=dtype, device="meta") for _ in range(required)))


def positional(model: nn.Module) -> list[inspect.Parameter]:
    """The parameters of a model's ``forward`` that can be given by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        return [p for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]
    except (TypeError, ValueError):
        return []


def _shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    for module in model.modules():  # the outermost first: a wrapper has none of its own
        config = getattr(module, "pretrained_cfg", None)
        size = config.get("input_size") if isinstance(config, dict) else getattr(config, "input_size", None)
        if size:
            yield (2, *size)
            break
    for module in model.modules():
        for dims, cls in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)):
            if isinstance(module, cls):
                yield from ((2, module.in_channels, *[side] * dims) for side in SIDES[dims])
                return
        if isinstance(module, nn.Linear):
            yield (2, module.in_features)
            yield (2, 7, module.in_features)
            return
