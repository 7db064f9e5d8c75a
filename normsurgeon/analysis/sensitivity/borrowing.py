"""A model that is somebody else's, borrowed: whatever is changed for a measurement is put back afterwards."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from normsurgeon.errors import UsageError
from normsurgeon.inference.run import eval_mode, home_of, name_of, placed


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """A model in eval mode, with gradients possible and the caller's random state set aside."""
    with ExitStack() as stack:
        stack.enter_context(placed(model, None))
        stack.enter_context(eval_mode(model))
        home = home_of(model)[0]
        stack.enter_context(torch.random.fork_rng(devices=[home] if home.type == "cuda" else []))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        # The fused attention kernels have no second derivative, and none for a vmap.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


@contextmanager
def differentiable(model: nn.Module, wanted: Iterable[Tensor]) -> Iterator[None]:
    """Let these parameters take gradients, frozen ones too, and no others: those would only cost time."""
    flags = [(tensor, tensor.requires_grad) for tensor in model.parameters()]
    if any(tensor.is_inference() for tensor, _ in flags):
        raise UsageError(
            f"{name_of(model)} was made in inference mode, so that nothing can be differentiated; "
            "try making it outside of torch.inference_mode()"
        )
    chosen = {id(tensor) for tensor in wanted}
    try:
        for tensor, _ in flags:
            tensor.requires_grad_(id(tensor) in chosen)
        yield
    finally:
        for tensor, flag in flags:
            tensor.requires_grad_(flag)


@contextmanager
def restored(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Tensors that may be written to, and get back every bit afterwards."""
    # Through .data, which counts as no change: a graph that the caller still holds stays usable.
    saved = [(tensor, tensor.data.clone()) for tensor in tensors]
    try:
        yield
    finally:
        for tensor, values in saved:
            tensor.data.copy_(values)


@contextmanager
def attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """A module's attribute set to another value for a while."""
    own = getattr(module, name)
    try:
        setattr(module, name, value)
        yield
    finally:
        setattr(module, name, own)


@contextmanager
def out_of_place(model: nn.Module) -> Iterator[None]:
    """Activations that write to new memory: an in-place one changes what a hook on the layer before it has kept."""
    with ExitStack() as stack:
        for module in model.modules():
            if getattr(module, "inplace", None) is True:
                stack.enter_context(attribute(module, "inplace", False))
        yield


def generator_for(device: torch.device, *key: Any) -> torch.Generator:
    """A random generator that depends on nothing but its key.

    >>> a, b = (generator_for(torch.device("cpu"), 0, "fc.weight") for _ in range(2))
    >>> bool(torch.randn(1, generator=a) == torch.randn(1, generator=b))
    True
    """
    return torch.Generator(device).manual_seed(zlib.crc32("/".join(map(str, key)).encode()))
