"""The settings of a reconstruction."""

from __future__ import annotations

from normsurgeon._util.config import Config, setting


class ReconstructionConfig(Config):
    """How to reconstruct; the defaults were measured (docs/decisions.md).

    :raises UsageError: if a setting does not exist, or cannot have that value.
    """

    what = "reconstruction"

    local_steps: int = setting(40, "Updates of each block, in the first part.", ge=0)
    local_lr: float = setting(5e-4, "Learning rate of the first part.", gt=0)
    steps: int = setting(20, "Updates of the whole network, after its blocks, in a reconstruction.", ge=0)
    lr: float = setting(2e-5, "Learning rate of the second part.", gt=0)
    batch_size: int = setting(32, "Images in an update.", ge=1)
    features: float = setting(0.3, "Weight of the block outputs next to the logits, in the second part.")
    held_out: float = setting(
        0.15, "Share of the images that only judge; at most 256.", gt=0, lt=1, must_be="a share between 0 and 1"
    )
    check_every: int = setting(10, "Updates between two looks at the held-out images.", ge=1)
    patience: int = setting(3, "Looks without progress after which a part ends.", ge=1)
    mix: float = setting(0.7, "Share of updates on images mixed in pairs (mixup and cutmix, half each).", ge=0, le=1)
    scale: float = setting(
        0.2, "Smallest share of an image that a random crop keeps.", gt=0, lt=1, must_be="a share between 0 and 1"
    )
    minutes: float | None = setting(
        None, "Minutes of a reconstruction; the best state by then is kept. None: as many as it takes.", gt=0
    )
    seed: int = setting(0, "Of the split, the order, the crops and the mixing.")
