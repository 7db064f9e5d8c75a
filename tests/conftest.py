"""What several test files share: randomised networks, the real images, a small set of architectures."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from normsurgeon.norms.batchnorm import is_batch_norm

# Under pytest-xdist every worker has a core to itself; two threads that wait for a busy core spin.
torch.set_num_threads(1 if {"PYTEST_XDIST_WORKER", "OMP_NUM_THREADS"} & os.environ.keys() else 2)

IMAGENET_SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet-sample"


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background jobs get it, and keep it on purpose
    signal.signal(signal.SIGINT, signal.default_int_handler)


def few(names: Iterable[str], every: int = 4) -> list[Any]:
    """Parameters of a test, of which the fast suite takes some and make test-all the others."""
    return [pytest.param(name, marks=[pytest.mark.long] if i % every else []) for i, name in enumerate(names)]


@pytest.fixture(autouse=True)
def no_progress_lines(monkeypatch) -> None:
    """On a busy machine anything may take the seconds after which a command says how far it has come."""
    monkeypatch.setattr("normsurgeon_cli.lines.QUIET", 3600.0)


@pytest.fixture(scope="session")
def imagenet_sample() -> Path:
    if not IMAGENET_SAMPLE.is_dir():
        pytest.skip(f"the real images are not here ({IMAGENET_SAMPLE.name})")
    return IMAGENET_SAMPLE


def randomise_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch norm statistics and an affine far from the trivial ones, in place."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return torch.rand(like.shape, generator=generator, dtype=torch.float64) * (high - low) + low

    with torch.no_grad():
        for module in model.modules():
            if not is_batch_norm(module):
                continue
            if module.running_mean is not None:
                module.running_mean.copy_(uniform(module.running_mean, -1, 1))
                module.running_var.copy_(uniform(module.running_var, 0.3, 3))
            if module.weight is not None:
                module.weight.copy_(uniform(module.weight, 0.5, 1.5))
                module.bias.copy_(uniform(module.bias, -0.5, 0.5))
    return model


class ConvNet(nn.Module):
    """A small network with a foldable norm, one whose producer is read twice, and one after an addition."""

    pretrained_cfg: ClassVar = {"input_size": (3, 16, 16)}  # images as large as ImageNet's would only take time

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(32)
        self.bn3 = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.conv2(x)
        z = self.bn3(self.bn2(y) + y)
        return self.head(z.mean((2, 3)))


@pytest.fixture
def convnet() -> ConvNet:
    torch.manual_seed(0)
    return randomise_(ConvNet()).eval()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images of different sizes in a folder and a folder within; 10 comes after 2."""
    random = np.random.default_rng(0)
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for name, shape in (("2.png", (60, 90, 3)), ("10.png", (75, 50, 3)), ("more/a.png", (64, 64, 3))):
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def class_tree(root: Path, names: list[str]) -> Path:
    """A folder with an empty folder for each class."""
    for name in names:
        (root / "classes" / name).mkdir(parents=True)
    return root / "classes"


def put(path: Path, value: int = 128, mode: str = "RGB", size: tuple[int, int] = (12, 10)) -> Path:
    """An image of one colour, in a folder that need not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value,) * len(mode)).save(path)
    return path


def stored_outputs(model: nn.Module, images: torch.Tensor) -> dict[str, np.ndarray]:
    """Every module's output, kept whole: what the streaming pass must not need."""
    outputs: dict[str, np.ndarray] = {}
    handles = [
        module.register_forward_hook(
            lambda module, inputs, output, name=name: outputs.__setitem__(name, output.detach().double().numpy().copy())
        )
        for name, module in model.named_modules()
        if name
    ]
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    return outputs
