"""Training with differential privacy: DP-SGD (Abadi et al., arXiv:1607.00133) with the Opacus library.

Each image's gradient is clipped and noise is added to their sum, so a layer must give a gradient for each image. A
batch norm mixes the images of a batch and has none: Opacus (1.6.0) refuses it, and refuses it as well where it is in
eval mode, although it mixes nothing then. So ``bn`` and ``bn frozen`` are not possible here, ``affine`` is the frozen
batch norm as Opacus accepts it, and what others do is ``opacus fix``: fresh group norms of gcd(32, C) groups, which on
16 and 32 channels are instance norms. ``swap`` has the groups that a conversion chooses, and keeps gamma and beta.

What Opacus needs for our layers: nothing. It looks a layer's gradient rule up by its exact class and knows
``nn.GroupNorm``, not timm's subclasses ``GroupNorm`` and ``GroupNorm1``, nor ``ChannelAffine`` and ``RmsNormChw``. For
a class that it does not know, ``grad_sample_mode="hooks"`` (the default) falls back to ``torch.func``, which is right
for all four (tests/test_trainability.py compares them with one image at a time) and about as fast. ``"ew"`` (expanded
weights) fails on ``RmsNormChw``: it cannot handle a view. An in-place operation overwrites what the hooks read.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from training import domains, starts
from training.cells import Cell

TRAIN_IMAGES, TEST_IMAGES = 4000, 1000
EPOCHS, BATCH_SIZE, DELTA = 3, 256, 1e-5
MOST_AT_ONCE = 128
"""A batch has a random size (Poisson sampling); more images than this go through in parts."""

FIX = "opacus fix"


def run(cell: Cell) -> float:
    """The accuracy after a few epochs; ``setting`` is "epsilon EPSILON clip NORM"."""
    _, epsilon, _, clip = cell.setting.split()
    task = domains.load(cell.network, cell.domain, TRAIN_IMAGES, TEST_IMAGES)
    model = network(task.model, cell.start, domains.source_images(cell.network))
    task.fit_head_(model, cell.seed)
    if not fit(model, TensorDataset(task.x, task.y), float(epsilon), float(clip), cell.lr, cell.seed):
        return 1 / task.classes
    return starts.top1(model, task.test_x, task.test_y)


def network(original: nn.Module, start: str, public: Tensor) -> nn.Module:
    """A start in training mode, as Opacus takes it. It has seen ``public`` images only: others would spend privacy."""
    if start == FIX:
        from opacus.validators import ModuleValidator

        model = ModuleValidator.fix(original)
    else:
        model = starts.start(original, start, public)
    out_of_place_(model)
    return model.train()


def out_of_place_(model: nn.Module) -> None:
    """Activations and the like write to new tensors from now on."""
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False


def fit(model: nn.Module, data: TensorDataset, epsilon: float, clip: float, lr: float, seed: int) -> bool:
    """DP-SGD without momentum at a constant rate (De et al., arXiv:2204.13650). False where the loss is NaN.

    Batches and noise depend on the seed alone: all starts have parameters of the same shapes.
    """
    from opacus import PrivacyEngine
    from opacus.utils.batch_memory_manager import BatchMemoryManager

    batches, noise = (torch.Generator().manual_seed(number) for number in (2 * seed, 2 * seed + 1))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of noise that is not cryptographically secure, and of images without gradients
        engine = PrivacyEngine()
        private, optimizer, loader = engine.make_private_with_epsilon(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=lr),
            data_loader=DataLoader(data, batch_size=BATCH_SIZE, generator=batches),
            target_epsilon=epsilon,
            target_delta=DELTA,
            epochs=EPOCHS,
            max_grad_norm=clip,
            noise_generator=noise,
        )
        for _ in range(EPOCHS):
            with BatchMemoryManager(
                data_loader=loader, max_physical_batch_size=MOST_AT_ONCE, optimizer=optimizer
            ) as parts:
                for x, y in parts:
                    optimizer.zero_grad()
                    loss = F.cross_entropy(private(x), y)
                    if not loss.isfinite():
                        return False
                    loss.backward()
                    optimizer.step()
        spent = engine.get_epsilon(DELTA)
    private.remove_hooks()
    assert spent <= epsilon, f"epsilon {spent:.2f} was spent"
    return True
