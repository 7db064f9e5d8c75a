"""The ResNets for small images: 6n + 2 layers in three stages of 16, 32 and 64 channels.

He et al., Deep Residual Learning for Image Recognition, arXiv:1512.03385, section 4.2, with timm's blocks and
projection shortcuts (their option B).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models.resnet import BasicBlock, downsample_conv
from torch import Tensor, nn


class SmallResNet(nn.Module):
    """Images (N, in_chans, H, W) → logits (N, num_classes); any size from 8 pixels on.

    blocks  in each of the three stages (n)
    """

    def __init__(self, blocks: int, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.drop_rate = num_classes, 64, 0.0
        self.pretrained_cfg: dict[str, Any] = {
            "input_size": (in_chans, 32, 32),
            "num_classes": num_classes,
            "crop_pct": 1.0,
            "first_conv": "conv1",
            "classifier": "fc",
        }
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = nn.ReLU(inplace=True)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """A new last layer."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, (N, 64, H/4, W/4)."""
        x = self.act1(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (N, num_classes)."""
        x = torch.flatten(self.global_pool(self.forward_features(x)), 1)
        if self.drop_rate:
            x = nn.functional.dropout(x, self.drop_rate, self.training)
        return self.fc(x)


def _stage(width: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    shortcut = downsample_conv(width, planes, 1, stride=stride) if stride > 1 else None
    first = BasicBlock(width, planes, stride=stride, downsample=shortcut)
    return nn.Sequential(first, *(BasicBlock(planes, planes) for _ in range(blocks - 1)))


def resnet8(num_classes: int = 10, in_chans: int = 3) -> nn.Module:
    """One block a stage: 78,000 parameters.

    >>> resnet8(in_chans=1)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    return SmallResNet(1, num_classes, in_chans)


def resnet14(num_classes: int = 10, in_chans: int = 3) -> nn.Module:
    """Two blocks a stage: 175,000 parameters."""
    return SmallResNet(2, num_classes, in_chans)


def resnet20(num_classes: int = 10, in_chans: int = 3) -> nn.Module:
    """Three blocks a stage: 272,000 parameters."""
    return SmallResNet(3, num_classes, in_chans)


SMALL: dict[str, Callable[..., nn.Module]] = {"resnet8": resnet8, "resnet14": resnet14, "resnet20": resnet20}
"""By the names that a study's configuration uses."""
