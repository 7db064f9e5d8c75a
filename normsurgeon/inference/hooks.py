"""Hooks on a network's modules that live only inside a context manager."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from normsurgeon.inference.run import first_tensor

Tap = tuple[nn.Module, Literal["input", "output"], Callable[[Tensor], Tensor | None]]
"""A module, which side of it, and the function that is called with the tensor."""


@contextmanager
def listening(taps: Iterable[Tap]) -> Iterator[None]:
    """While inside, each tap's receiver is handed a tensor at every call of its module, before anything overwrites it.

    Of a tuple or dict that is the first tensor. What a receiver returns takes the place of all that the module was
    given or gave; None leaves it. All hooks are gone afterwards, after an error and Ctrl-C, too.

    >>> import torch
    >>> net = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))
    >>> seen = []
    >>> with listening([(net[0], "output", lambda x: seen.append(x.tolist())), (net[1], "input", torch.abs)]):
    ...     net(torch.tensor([-1.0])).tolist()
    [1.0]
    >>> seen, len(net[0]._forward_hooks)
    ([[-1.0]], 0)
    """
    with hooked(
        (module, side, _before(receive) if side == "input" else _after(receive)) for module, side, receive in taps
    ):
        yield


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Literal["input", "output"], Callable[..., Any]]]) -> Iterator[None]:
    """While inside, torch's own hooks: called with (module, args, kwargs) before, and the output after a forward pass.

    All of them are gone afterwards, after an error and Ctrl-C, too.
    """
    handles = []
    try:
        for module, side, hook in hooks:
            register: Any = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
            handles.append(register(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(receive: Callable[[Tensor], Tensor | None]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = first_tensor(args)
        new = None if found is None else receive(found)
        return None if new is None else ((new,), kwargs)

    return hook


def _after(receive: Callable[[Tensor], Tensor | None]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        found = first_tensor(output)
        return None if found is None else receive(found)

    return hook
