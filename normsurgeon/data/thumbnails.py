"""What a network sees as a small picture."""

from __future__ import annotations

import base64
import io

import torch
from PIL import Image
from torch import Tensor

from normsurgeon.data.transforms import DataConfig

SIZE = 112
"""Pixels of the longer edge."""


def thumbnail(image_CHW: Tensor, config: DataConfig | None = None) -> str | None:
    """A network's input of 1 or 3 channels as a JPEG in base64; None for other inputs.

    config  how it was scaled; None: not known, and its least and greatest value become black and white

    >>> thumbnail(torch.zeros(3, 8, 8))[:4], thumbnail(torch.zeros(7, 8, 8))
    ('/9j/', None)
    """
    if image_CHW.ndim != 3 or image_CHW.shape[0] not in (1, 3):
        return None
    x = image_CHW.detach().float().cpu().nan_to_num()
    if config is not None and len(config.mean) == len(x):
        x = x * torch.tensor(config.std)[:, None, None] + torch.tensor(config.mean)[:, None, None]
    else:
        x = (x - x.min()) / (x.max() - x.min()).clamp_min(1e-12)
    pixels = (255 * x.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels if len(x) == 3 else pixels[:, :, 0])
    scale = SIZE / max(picture.size)
    size = [max(1, round(edge * scale)) for edge in picture.size]
    file = io.BytesIO()
    picture.resize((size[0], size[1]), Image.Resampling.BICUBIC).save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode("ascii")
