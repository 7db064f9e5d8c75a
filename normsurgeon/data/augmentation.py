"""The settings of the random transform of training images."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from normsurgeon._util.config import Config, setting

AUGMENTATION = "Augmentation and regularisation"
"""The heading of these settings in the command line's help."""


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if not 0 < pair[0] <= pair[1]:
        raise ValueError("not ascending")
    return pair


def _to_one(value: Any) -> Any:
    """One number is the smallest share; the largest is then the whole image."""
    return (value, 1.0) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Pair = Annotated[tuple[float, float], AfterValidator(_ascending), Field(strict=False)]


class Augmentation(Config):
    """How training images are transformed at random; names are timm's.

    >>> Augmentation(scale=0.5).scale
    (0.5, 1.0)
    """

    what = "augmentation"

    augment: bool = setting(True, "Crop, flip and so on at random.", panel=AUGMENTATION)
    scale: Annotated[Pair, BeforeValidator(_to_one)] = setting(
        (0.35, 1.0),
        "Smallest and largest share of an image that a crop keeps; one number: the smallest.",
        panel=AUGMENTATION,
        must_be="two shares of an image, the smaller first",
    )
    ratio: Pair = setting(
        (0.75, 4 / 3),
        "Smallest and largest aspect ratio of a crop.",
        panel=AUGMENTATION,
        must_be="two aspect ratios, the smaller first",
    )
    hflip: float | None = setting(
        None,
        "Probability of a horizontal flip. None: 0.5, and 0 for grey drawings (digits).",
        panel=AUGMENTATION,
        ge=0,
        le=1,
    )
    vflip: float = setting(0.0, "Probability of a vertical flip.", panel=AUGMENTATION, ge=0, le=1)
    color_jitter: float = setting(0.2, "Strength of the colour jitter.", panel=AUGMENTATION, ge=0)
    aa: str | None = setting(None, "timm's AutoAugment policy, such as rand-m7.", panel=AUGMENTATION)
    reprob: float = setting(0.0, "Probability of random erasing.", panel=AUGMENTATION, ge=0, le=1)
