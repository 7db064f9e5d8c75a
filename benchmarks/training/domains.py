"""The tasks that a pretrained network is moved to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import cifar


@dataclass(frozen=True)
class Task:
    """A network (BatchNorm, in eval mode) and images to train and test it on, pre-processed."""

    model: nn.Module
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    new_head: bool

    def fit_head_(self, model: nn.Module, seed: int) -> None:
        """Other labels need another last layer: of zeros, as good as any for a layer without one behind it."""
        if self.new_head:
            name, old = next((name, module) for name, module in model.named_children() if isinstance(module, nn.Linear))
            head = nn.Linear(old.in_features, self.classes)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            setattr(model, name, head)


@cache
def load(network: str, domain: str, train_images: int, test_images: int) -> Task:
    """``grey``: CIFAR-10, grey, blurred, of low contrast. ``fashion``: Fashion-MNIST, other images and other labels."""
    read = _grey if domain == "grey" else _fashion
    parts: list[Tensor] = []
    for split, count in (("train", train_images), ("test", test_images)):
        x, y = read(split, count)
        parts += [prepared(network, x), y]
    return Task(cifar.network(network), *parts, classes=10, new_head=domain == "fashion" or network == "lite0")


def prepared(network: str, x: Tensor) -> Tensor:
    """Images (N, 3, 32, 32) from 0 to 1 as a network takes them: EfficientNet-Lite0 three times as large."""
    if network == "lite0":
        return 2 * F.interpolate(x, scale_factor=3, mode="bilinear") - 1
    return cifar.normalized(x)


@cache
def source_images(network: str = "resnet20", count: int = 256) -> Tensor:
    """Images of the domain that the networks come from, in colour, which no task trains or tests on.

    To convert and calibrate where the new domain's images are private, with the clients, or yet to come.
    """
    x, _ = cifar.images("test")
    return prepared(network, x[-count:])


def _grey(split: str, count: int) -> tuple[Tensor, Tensor]:
    x, y = cifar.images(split)
    return cifar.grey(x[:count]), y[:count]


def _fashion(split: str, count: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) from 0 to 1, padded from 28 pixels, and labels, in a fixed random order."""
    from torchvision.transforms.functional import to_tensor

    from normsurgeon.data.sources import open_source

    source = open_source("fashion-mnist", split=split)
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:count].tolist()
    pairs = [source[index] for index in order]
    x = torch.stack([to_tensor(image) for image, _ in pairs])
    return F.pad(x.expand(-1, 3, -1, -1), (2, 2, 2, 2)), torch.tensor([int(label) for _, label in pairs])
