"""Guesses from a model's layers what it may be called with."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import nn

from normsurgeon.calls import Call

SIDES = {1: (256, 1024, 16000, 64), 2: (224, 32, 28, 64, 128, 299, 384, 512), 3: (32, 64, 16)}
"""Extents to try if the input's are not known: 224 is the ImageNet custom, 32 and 28 those of CIFAR and MNIST."""


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
