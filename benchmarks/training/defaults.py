"""``normsurgeon.finetune`` itself, with its defaults and with one setting at a time otherwise."""

from __future__ import annotations

from typing import Any

from torch.utils.data import TensorDataset

import normsurgeon as ns
from training import domains, starts
from training.cells import Cell

TRAIN_IMAGES, TEST_IMAGES, EPOCHS = 2000, 1000, 2
RATES = (5e-5, 2e-4, 1e-3, 3e-3)
CHANGES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "batch 16": {"batch_size": 16},
    "constant": {"sched": "constant"},
    "no warm-up": {"warmup_epochs": 0.0},
    "no clipping": {"clip_grad": None},
    "no weight decay": {"weight_decay": 0.0},
    "weight decay 0.2": {"weight_decay": 0.2},
    "sgd": {"opt": "sgd"},
    "sgd, batch 16": {"opt": "sgd", "batch_size": 16},
}
SETTINGS = tuple(CHANGES)


def run(cell: Cell) -> float:
    """The accuracy after two epochs without augmentation; ``setting`` is a key of ``CHANGES``."""
    task = domains.load(cell.network, cell.domain, TRAIN_IMAGES, TEST_IMAGES)
    model = starts.start(task.model, cell.start, domains.source_images(cell.network))
    task.fit_head_(model, cell.seed)
    settings = {"epochs": EPOCHS, "lr": cell.lr, "seed": cell.seed, "augment": False, "keep": "last"}
    model = starts.training_mode(model, cell.start)
    result = ns.finetune(model, TensorDataset(task.x, task.y), **{**settings, **CHANGES[cell.setting]})
    return starts.top1(result.model, task.test_x, task.test_y)
