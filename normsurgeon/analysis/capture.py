"""Reading layers' outputs while a network runs: hooks that are never left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from normsurgeon.analysis.layers import Layer
from normsurgeon.inference import first_tensor

Receiver = Callable[[Layer, Tensor], None]


@contextmanager
def captured(layers: Sequence[Layer], on_output: Receiver, on_input: Receiver | None = None) -> Iterator[None]:
    """While inside, ``on_output(layer, tensor)`` is called right after each call of each layer, in calling order.

    Right after means before anything that follows can overwrite the tensor: an in-place activation changes it a
    moment later, so it must be read at once and not kept. ``on_input`` is called before each call of a norm layer,
    with its input. Of a tuple or dict the first tensor is taken; outputs without a floating-point tensor are passed
    over. All hooks are gone afterwards, after an error and Ctrl-C, too.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True))
    >>> seen = []
    >>> with captured([Layer("0", "convolution", net[0])], lambda layer, x: seen.append((layer.name, tuple(x.shape)))):
    ...     _ = net(torch.zeros(1, 1, 4, 4))
    >>> seen, len(net[0]._forward_hooks)
    ([('0', (1, 2, 4, 4))], 0)
    """
    handles = []
    try:
        for layer in layers:
            if on_input is not None and layer.kind == "norm":
                handles.append(layer.module.register_forward_pre_hook(_before(layer, on_input)))
            handles.append(layer.module.register_forward_hook(_after(layer, on_output)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(layer: Layer, receive: Receiver) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        _give(layer, inputs, receive)

    return hook


def _after(layer: Layer, receive: Receiver) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        _give(layer, output, receive)

    return hook


def _give(layer: Layer, value: Any, receive: Receiver) -> None:
    tensor = first_tensor(value)
    if tensor is not None and tensor.is_floating_point() and tensor.ndim >= 1 and tensor.numel():
        receive(layer, tensor)
