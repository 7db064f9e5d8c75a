"""The smallest study that is one, and its outcomes as they are compared."""

from __future__ import annotations

from dataclasses import replace

from normsurgeon.study.records import Outcome

TINY = {"epochs": 1, "train_images": 128, "test_images": 100, "image_size": 8}
GRID = {
    "name": "tiny",
    "models": "resnet8",
    "norms": ["bn", "gn", "gn:3"],
    "datasets": "digits",
    "batch_sizes": [16, 32],
    "seeds": 2,
    "training": TINY,
}


def without_time(outcomes) -> list[Outcome]:
    return [replace(outcome, seconds=0.0) for outcome in outcomes]
