"""Networks small enough for an explicit Hessian, and what the tests of sensitivity measure them with."""

from __future__ import annotations

import torch
from conftest import randomise_
from torch import Tensor, nn
from torch.nn import functional as F

from normsurgeon.analysis.records import Sensitivity
from normsurgeon.analysis.sensitivity.measure import METHODS, measure_sensitivity

PARAMETER_METHODS = METHODS[:4]


class Small(nn.Module):
    """A convolution, a batch norm, a chosen activation and a head: 3×6×6 images, 4 classes, 118 parameters."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, stride=2)
        self.bn = nn.BatchNorm2d(3)
        self.act = act
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.bn(self.conv(x))).mean((2, 3)))


class InPlace(nn.Module):
    """As torchvision writes it: one in-place ReLU for all, and ``out += identity``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(identity))
        out += identity
        return self.fc(F.relu(out, inplace=True).mean((2, 3)))


def small(act: nn.Module | None = None, seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return randomise_(Small(act or nn.Tanh())).double().eval()


def data(count: int = 6, classes: int = 4, side: int = 6, size: int | None = None, labels: bool = True):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, side, side, generator=generator, dtype=torch.float64)
    answers = torch.randint(classes, (count,), generator=generator)
    pieces = zip(images.split(size or count), answers.split(size or count), strict=True)
    return [(x, y if labels else None) for x, y in pieces]


def measure(model: nn.Module, batches, method: str, **options) -> Sensitivity:
    (found,) = measure_sensitivity(model, batches, methods=[method], **options)
    assert found.method == method
    return found


def by_name(scores) -> dict[str, float]:
    return {score.name: score.score for score in scores}


def flat_loss(model: nn.Module, images: Tensor, targets: Tensor):
    """The mean loss as a function of all parameters in one vector, and that vector."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [tensor.shape for tensor in model.parameters()]

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes])
        values = {n: part.view(shape) for n, part, shape in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, values, (images,)), targets)

    return loss, torch.cat([tensor.detach().flatten() for tensor in model.parameters()])


def blocks(model: nn.Module) -> dict[str, slice]:
    found, start = {}, 0
    for name, tensor in model.named_parameters():
        found[name] = slice(start, start + tensor.numel())
        start += tensor.numel()
    return found
