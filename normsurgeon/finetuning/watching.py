"""A loss that rises, and the search for where a loss is not finite first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normsurgeon.inference.hooks import hooked
from normsurgeon.inference.run import first_tensor

EARLY_UPDATES, WINDOW = 200, 8
"""How many updates are the first, and over how many of them the present loss is averaged."""

START_IMAGES = 16
"""Images over which the loss at the start is averaged, or the first batch: single images vary."""

RISE, SMALL = 3.0, 0.5
"""By how much a loss has to rise to be reported; one below ``SMALL`` nats may grow to that without harm."""


class FirstUpdates:
    """Whether the first updates of a run raise the loss many times over, as a learning rate that is too high does."""

    def __init__(self, batch_size: int) -> None:
        self.start = -(-START_IMAGES // batch_size)
        self.losses: list[float] = []
        self.reported = False

    def add(self, step: int, loss: float) -> tuple[float, float] | None:
        """The mean loss at first and now, once, where it has risen ``RISE``-fold (and is not small); else None.

        step  the number of this update, from 1
        """
        if step > EARLY_UPDATES or self.reported:
            return None
        self.losses.append(loss)
        if len(self.losses) < self.start + WINDOW:
            return None
        first, now = sum(self.losses[: self.start]) / self.start, sum(self.losses[-WINDOW:]) / WINDOW
        self.reported = now > RISE * max(first, SMALL)
        return (first, now) if self.reported else None


def where_nonfinite(model: nn.Module, run_again: Callable[[], Tensor], images: Tensor) -> str:
    """Where the numbers of a batch are not finite first, in words.

    ``run_again`` repeats the forward and backward pass and returns the loss. The layer that is named is the first
    whose output is not finite although its inputs are.
    """
    if not bool(torch.isfinite(images).all()):
        return "in the images of the batch"
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
            out = first_tensor(output)
            if found or out is None or bool(torch.isfinite(out).all()):
                return
            given = first_tensor(args)
            if given is None or bool(torch.isfinite(given).all()):
                found.append(f"in the output of {name} ({type(module).__name__})")

        return look

    leaves = ((name, module) for name, module in model.named_modules() if name and not any(module.children()))
    with hooked([(module, "output", watch(name)) for name, module in leaves]):
        loss = run_again()
    if found:
        return found[0]
    if not bool(torch.isfinite(loss)):
        return "in the loss, after finite outputs of every layer"
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return f"in the gradient of {name}"
    return "in the sum of all gradients"
