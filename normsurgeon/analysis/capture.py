"""Reading layers' outputs while a network runs: hooks that are never left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from normsurgeon.analysis.choosing import Layer
from normsurgeon.inference.hooks import Tap, listening

Receiver = Callable[[Layer, Tensor], None]


@contextmanager
def captured(layers: Sequence[Layer], on_output: Receiver, on_input: Receiver | None = None) -> Iterator[None]:
    """While inside, ``on_output(layer, tensor)`` is called right after each call of each layer, in calling order.

    Right after means before anything that follows can overwrite the tensor: an in-place activation changes it a
    moment later, so it must be read at once and not kept. ``on_input`` is called before each call of a norm layer,
    with its input. Of a tuple or dict the first tensor is taken; outputs without a floating-point tensor are passed
    over. All hooks are gone afterwards, after an error and Ctrl-C, too.

    >>> import torch
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True))
    >>> seen = []
    >>> with captured([Layer("0", "convolution", net[0])], lambda layer, x: seen.append((layer.name, tuple(x.shape)))):
    ...     _ = net(torch.zeros(1, 1, 4, 4))
    >>> seen, len(net[0]._forward_hooks)
    ([('0', (1, 2, 4, 4))], 0)
    """
    taps: list[Tap] = []
    for layer in layers:
        if on_input is not None and layer.kind == "norm":
            taps.append((layer.module, "input", _giving(layer, on_input)))
        taps.append((layer.module, "output", _giving(layer, on_output)))
    with listening(taps):
        yield


def _giving(layer: Layer, receive: Receiver) -> Callable[[Tensor], None]:
    def give(tensor: Tensor) -> None:
        if tensor.is_floating_point() and tensor.ndim >= 1 and tensor.numel():
            receive(layer, tensor)

    return give
