"""From images to a network's input: the pre-processing it was trained for, and batches of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.transforms import str_to_interp_mode
from torch import nn
from torchvision.transforms import Compose

from normsurgeon.data.images import plain_image
from normsurgeon.errors import UsageError

CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class DataConfig:
    """How a network wants its images, in timm's terms.

    input_size     channels, height, width
    mean, std      one number a channel, for pixels of 0 to 1
    interpolation  ``bicubic``, ``bilinear``, …
    crop_pct       the share of the resized image that the crop keeps (a few networks pad: above 1)
    crop_mode      ``center`` (the shorter edge resized), ``squash`` (both), ``border`` (the longer, padded)

    :raises UsageError: values that do not fit together.

    >>> DataConfig().input_size
    (3, 224, 224)
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        """Check, and make plain tuples of whatever sequences came in."""
        for name, kind in (("input_size", int), ("mean", float), ("std", float)):
            try:
                object.__setattr__(self, name, tuple(kind(value) for value in getattr(self, name)))
            except (TypeError, ValueError) as error:
                raise UsageError(f"{name}={getattr(self, name)!r} must be a sequence of numbers") from error
        if len(self.input_size) != 3 or min(self.input_size) < 1:
            raise UsageError(f"input_size={self.input_size} must be channels, height and width, each at least 1")
        if not len(self.mean) == len(self.std) == self.input_size[0]:
            raise UsageError(
                f"mean has {len(self.mean)} and std {len(self.std)} numbers, and the input has "
                f"{self.input_size[0]} channels; give one number a channel"
            )
        if not all(map(math.isfinite, self.mean)) or not all(0 < value < math.inf for value in self.std):
            raise UsageError(f"mean={self.mean} must be finite, and std={self.std} finite and above 0")
        try:
            str_to_interp_mode(self.interpolation)
        except KeyError as error:
            raise UsageError(f"interpolation={self.interpolation!r} is unknown; try bicubic or bilinear") from error
        if not 0 < self.crop_pct < math.inf:
            raise UsageError(f"crop_pct={self.crop_pct!r} must be above 0; most networks use 0.875 to 1")
        if self.crop_mode not in CROP_MODES:
            raise UsageError(f"crop_mode={self.crop_mode!r} is unknown; it is one of {', '.join(CROP_MODES)}")

    @classmethod
    def of(cls, model: nn.Module) -> DataConfig:
        """What ``model.pretrained_cfg`` says, and timm's ImageNet defaults for what it leaves open.

        A network whose first convolution reads one channel gets grey images, with the average of the mean and
        std: timm's own record still says three channels after ``create_model(…, in_chans=1)``.
        """
        given = getattr(model, "pretrained_cfg", None) or {}
        given = given if isinstance(given, Mapping) else given.to_dict()
        found = resolve_data_config(args={"in_chans": 3}, pretrained_cfg=dict(given))
        channels = _channels_of(model, given) or found["input_size"][0]
        return cls(
            input_size=(channels, *found["input_size"][1:]),
            mean=_fit(found["mean"], channels),
            std=_fit(found["std"], channels),
            interpolation=found["interpolation"],
            crop_pct=float(found["crop_pct"]),
            crop_mode=found["crop_mode"],
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain types that JSON keeps as they are."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataConfig:
        """The inverse of ``to_dict``; what is missing takes its default.

        :raises UsageError: an unknown key, or values that do not fit together.
        """
        known = [field.name for field in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise UsageError(f"a data configuration has no {unknown[0]!r}; it has {', '.join(known)}")
        return cls(**values)

    def transform(self) -> Callable[[Image.Image], torch.Tensor]:
        """A PIL image of any mode → float32 (C, H, W), normalised; deterministic.

        Pixels are read by the rules of :func:`~normsurgeon.data.images.plain_image`.

        :raises UsageError: a network that reads neither one channel nor three.
        """
        channels = self.input_size[0]
        if channels not in (1, 3):
            raise UsageError(
                f"the network reads {channels} channels, and images have 1 or 3; "
                "try batches of tensors instead: (images (N, C, H, W), labels)"
            )
        steps = create_transform(**asdict(self), is_training=False)
        return Compose([ToMode("L" if channels == 1 else "RGB"), steps])


@dataclass(frozen=True)
class ToMode:
    """An image in another mode. A class, so that worker processes can be sent it."""

    mode: str

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image, read by the rules of ``plain_image``."""
        image = plain_image(image)
        return image if image.mode == self.mode else image.convert(self.mode)


def _channels_of(model: nn.Module, given: Mapping[str, Any]) -> int | None:
    """What the network's first convolution reads, if that says something about the images."""
    named = given.get("first_conv")
    named = named[0] if isinstance(named, (list, tuple)) and named else named
    modules = dict(model.named_modules())
    first = modules.get(named) if isinstance(named, str) else None
    if first is None:
        first = next((m for m in modules.values() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), None)
        channels = getattr(first, "in_channels", None)
        return 1 if channels == 1 else None  # not surely the stem: believe it only in the common case
    channels = getattr(first, "in_channels", None)
    if not isinstance(channels, int) or channels % 3 == 0:  # 12 and 48: an RGB image, space to depth
        return None
    return channels


def _fit(values: Any, channels: int) -> tuple[float, ...]:
    values = tuple(float(value) for value in values)
    if len(values) == channels:
        return values
    if len(values) == 1:
        return values * channels
    return (sum(values) / len(values),) * channels
