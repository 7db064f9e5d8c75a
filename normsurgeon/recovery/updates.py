"""The one loop of a reconstruction: updates by gradient descent, with looks at held-out images in between."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from normsurgeon.errors import TrainingError


def fit_(
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[int], Tensor],
    improved: Callable[[int], bool],
    *,
    steps: int,
    check_every: int,
    patience: int,
    warmup: int = 1,
    part: str,
    setting: str,
    count: Callable[[int], None] = lambda updates: None,
    is_over: Callable[[], bool] = lambda: False,
) -> int:
    """Minimise ``loss_of(update)`` along a cosine of the learning rate, in place; returns the updates made.

    improved       called with the number of updates every ``check_every`` of them, and at the end; whether the present
                   state is the best so far. ``patience`` times False in a row end the loop
    warmup         updates in which the learning rate rises
    count          called with 1 after each update
    is_over        whether time is up, after each update: the last look is then taken
    part, setting  what is fitted, and the setting of its learning rate, for the error

    :raises TrainingError: if a loss is not finite.

    >>> x = torch.tensor([1.0], requires_grad=True)
    >>> options = {"steps": 9, "check_every": 2, "patience": 2, "part": "x", "setting": "lr"}
    >>> fit_(torch.optim.SGD([x], lr=0.1), lambda update: x.square().sum(), lambda updates: updates < 4, **options)
    6
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    stale = 0
    for update in range(steps):
        factor = min(1.0, (update + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * update / steps))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        loss = loss_of(update)
        if not loss.isfinite():
            raise TrainingError(
                f"the loss is not finite at update {update + 1} of {part}, nothing was changed; try a lower {setting}"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        count(1)
        last = is_over() or update + 1 == steps
        if last or (update + 1) % check_every == 0:
            stale = 0 if improved(update + 1) else stale + 1
            if last or stale == patience:
                return update + 1
    return steps
