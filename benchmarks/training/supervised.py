"""Training with labels in a new domain: one pass over a few images, from each start."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import domains, starts
from training.cells import Cell

TRAIN_IMAGES, TEST_IMAGES = 2000, 1000


def run(cell: Cell) -> float:
    """The accuracy after one pass over the training images; ``setting`` is "OPTIMIZER BATCH_SIZE"."""
    optimizer, batch_size = cell.setting.split()
    task = domains.load(cell.network, cell.domain, TRAIN_IMAGES, TEST_IMAGES)
    torch.manual_seed(cell.seed)
    model = starts.training_mode(starts.start(task.model, cell.start, task.x), cell.start)
    task.fit_head_(model, cell.seed)
    if not fit(model, task.x, task.y, optimizer, int(batch_size), cell.lr, cell.seed):
        return 1 / task.classes
    return starts.top1(model, task.test_x, task.test_y)


def fit(model: nn.Module, x: Tensor, y: Tensor, optimizer: str, batch_size: int, lr: float, seed: int) -> bool:
    """One pass with a cosine schedule, in an order that depends on the seed alone. False where the loss is NaN."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    made: torch.optim.Optimizer = (
        torch.optim.SGD(parameters, lr=lr, momentum=0.9)
        if optimizer == "sgd"
        else torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    )
    batches = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).split(batch_size)
    for index, batch in enumerate(batches):
        for group in made.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * index / len(batches)))
        made.zero_grad()
        loss = F.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        made.step()
        if index % 50 == 0 and not math.isfinite(loss.item()):
            return False
    return True
