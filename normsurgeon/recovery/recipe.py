"""The settings of a reconstruction."""

from __future__ import annotations

import math
from dataclasses import dataclass

from normsurgeon.errors import UsageError


@dataclass(frozen=True)
class Recipe:
    """How to reconstruct; the defaults were measured (docs/decisions.md).

    local_steps, local_lr   updates of each block in the first part
    steps, lr               updates of the second part, in which the whole network follows the original's logits, too
    batch_size              images an update
    features                weight of the block outputs beside the logits, in the second part
    held_out                share of the images that is only judged by; at most 256
    check_every             updates between two looks at the held-out images
    patience                looks without progress after which a part ends
    mix                     share of updates on images mixed in pairs (mixup and cutmix, half each)
    scale                   the least share of an image that a random crop keeps
    seed                    of the split, the order, the crops and the mixing
    """

    local_steps: int = 40
    local_lr: float = 5e-4
    steps: int = 20
    lr: float = 2e-5
    batch_size: int = 32
    features: float = 0.3
    held_out: float = 0.15
    check_every: int = 10
    patience: int = 3
    mix: float = 0.7
    scale: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("local_steps", 0), ("steps", 0), ("batch_size", 1), ("check_every", 1), ("patience", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ("local_lr", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name}={getattr(self, name)} must be above 0")
        for name in ("held_out", "mix", "scale"):
            if not 0 <= getattr(self, name) <= 1 or (name != "mix" and getattr(self, name) in (0, 1)):
                raise UsageError(f"{name}={getattr(self, name)} must be a share, between 0 and 1")
