"""The CIFAR ResNets of He et al. (arXiv:1512.03385, section 4.2) with real weights, and images to move them to.

The weights and the images are a sample next to the project, ../shared/data/cifar10; see ``available()``.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NETWORKS = ("resnet20", "resnet56", "lite0")
FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters (option A: subsample, and pad with zero channels)."""

    def __init__(self, width: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride, self.missing = stride, planes - width

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.missing:
            half = self.missing // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """Images (N, 3, 32, 32) to logits (N, 10); 6 n + 2 layers."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for index, (width, planes) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            first = Block(width, planes, 1 if index == 1 else 2)
            setattr(self, f"layer{index}", nn.Sequential(first, *(Block(planes, planes, 1) for _ in range(n - 1))))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def available() -> bool:
    return FOLDER.is_dir()


def network(name: str) -> nn.Module:
    """A network with its weights, in eval mode; ``lite0`` is an ImageNet network, EfficientNet-Lite0."""
    if name == "lite0":
        from normsurgeon.models import demo

        return demo.network()
    from safetensors.torch import load_file

    model = CifarResNet((int(name.removeprefix("resnet")) - 2) // 6)
    model.load_state_dict(load_file(FOLDER / f"{name}.safetensors"))
    return model.eval()


@cache
def images(split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) from 0 to 1 and labels (N,), in a fixed random order: 5,000 to train, 2,000 to test."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import to_tensor

    found = ImageFolder(FOLDER / split)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [found[index] for index in order]
    return torch.stack([to_tensor(image) for image, _ in pairs]), torch.tensor([label for _, label in pairs])


def normalized(x: Tensor) -> Tensor:
    """As the networks take them."""
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def grey(x: Tensor) -> Tensor:
    """The new domain: grey, blurred (a Gaussian of 1 pixel), 0.6 of the contrast. The networks get 17 % right."""
    axis = torch.arange(-2, 3).float()
    kernel = torch.exp(-axis.square() / 2)
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    x = F.conv2d(F.pad(x.mean(1, keepdim=True), (2, 2, 2, 2), mode="reflect"), kernel[None, None])
    return (0.5 + 0.6 * (x - 0.5)).expand(-1, 3, -1, -1).contiguous()
