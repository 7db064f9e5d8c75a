"""From an image to what a network reads: timm's configuration, colour modes, normalisation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from normsurgeon.data.transforms import DataConfig
from normsurgeon.errors import DataError, UsageError


def test_a_configuration_survives_json():
    config = DataConfig((1, 28, 20), (0.1,), (0.3,), "bilinear", 0.9, "squash")
    assert DataConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"input_size": (3, 8)}, r"input_size=\(3, 8\) must be channels, height and width"),
        ({"mean": (0.5,)}, r"mean has 1 and std 3 numbers, and the input has 3 channels"),
        ({"std": (0.2, 0.0, 0.2)}, r"std=\(0\.2, 0\.0, 0\.2\) finite and above 0"),
        ({"mean": None}, r"mean=None must be a sequence of numbers"),
        ({"interpolation": "cubist"}, r"interpolation='cubist' is unknown"),
        ({"crop_pct": 0}, r"crop_pct=0 must be above 0"),
        ({"crop_mode": "tight"}, r"crop_mode='tight' is unknown; it is one of center, squash, border"),
        ({"size": 8}, r"a data configuration has no 'size'; it has input_size, mean"),
    ],
)
def test_a_wrong_configuration_is_refused_when_made(values, message):
    with pytest.raises(UsageError, match=message):
        DataConfig.from_dict(values)


def test_a_configuration_is_read_off_the_model():
    model = timm.create_model("test_resnet")
    assert DataConfig.of(model) == DataConfig((3, 160, 160), (0.5,) * 3, (0.5,) * 3, "bilinear", 0.95, "center")
    assert DataConfig.of(nn.Sequential(nn.Conv2d(3, 4, 3))) == DataConfig()  # timm's ImageNet defaults
    own = nn.Sequential(nn.Conv2d(3, 4, 3))
    own.pretrained_cfg = {"input_size": [3, 32, 48], "mean": [0.5, 0.4, 0.3], "crop_pct": 1.0}
    assert DataConfig.of(own) == DataConfig((3, 32, 48), (0.5, 0.4, 0.3), crop_pct=1.0)
    own.pretrained_cfg = None
    assert DataConfig.of(own) == DataConfig()


def test_a_grey_network_gets_grey_images_of_its_own_normalisation():
    assert DataConfig.of(nn.Conv2d(1, 4, 3)).input_size == (1, 224, 224)
    model = timm.create_model("test_resnet", in_chans=1)
    config = DataConfig.of(model)
    assert (config.input_size, config.mean, config.std) == ((1, 160, 160), (0.5,), (0.5,))
    tensor = config.transform()(Image.new("RGB", (200, 180), (255, 255, 255)))
    assert tensor.shape == (1, 160, 160)
    assert torch.allclose(tensor, torch.ones(()))  # (1 - 0.5) / 0.5
    with pytest.raises(UsageError, match="the network reads 5 channels, and images have 1 or 3"):
        DataConfig.of(timm.create_model("test_resnet", in_chans=5)).transform()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "I;16", "I"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_every_mode_are_taken(mode, channels):
    grey = Image.fromarray(np.full((16, 16), 200, np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.full((16, 16), 200 * 256 + 7, np.uint16))
    elif mode == "I":
        image = Image.fromarray(np.full((16, 16), 200 * 256, np.int32))
    else:
        image = grey.quantize() if mode == "P" else grey.convert("RGB").convert(mode)
    assert image.mode == mode
    config = DataConfig((channels, 8, 8), (0.0,) * channels, (1.0,) * channels)
    tensor = config.transform()(image)
    assert tensor.shape == (channels, 8, 8)
    assert tensor.mul(255).sub(200).abs().max() <= 1


def test_a_colour_mode_that_pillow_cannot_convert_is_a_data_error(monkeypatch):
    def convert(self, mode):  # as Pillow below 12 answers
        raise ValueError(f"conversion from {self.mode} to {mode} not supported")

    monkeypatch.setattr(Image.Image, "convert", convert)
    with pytest.raises(DataError, match="has the colour mode LAB, of which Pillow makes no RGB; try saving it as PNG"):
        DataConfig().transform()(Image.new("LAB", (8, 8)))


def test_normalisation_is_the_formula():
    config = DataConfig((3, 4, 4), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    found = config.transform()(Image.new("RGB", (9, 7), (10, 20, 30)))
    expected = (np.array([10, 20, 30]) / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    np.testing.assert_allclose(found[:, 2, 1].numpy(), expected, rtol=1e-5)
