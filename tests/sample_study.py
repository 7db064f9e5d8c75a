"""Made-up studies for the tests: accuracies from a formula, not from training."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

from normsurgeon.study.records import Cell, CellAnalysis, Epoch, LayerSummary, Outcome, Results

IMAGES = 1000
TRAINING = {"epochs": 8, "optimizer": "sgd", "schedule": "cosine", "train_images": 1437, "test_images": 360}


def run(right: float, status: str = "done", reason: str | None = None, **cell: object) -> Outcome:
    """One run with so many of 1000 images right."""
    made = Cell(**{"model": "resnet8", "dataset": "digits", **cell})  # type: ignore[arg-type]
    if status != "done":
        return Outcome(made, status, reason)  # type: ignore[arg-type]
    return Outcome(made, "done", correct=round(right), images=IMAGES, loss=round(2 - right / 600, 4))


def study(right: dict[str, Sequence[float]], **cell: object) -> Results:
    """One setting: each norm's right answers by seed."""
    return Results("small", tuple(run(x, norm=n, seed=s, **cell) for n, xs in right.items() for s, x in enumerate(xs)))


def null_study(number: int, norms: Iterable[str] = ("bn", "gn", "ln"), sizes: Iterable[int] = (2, 8, 32),
               seeds: int = 3, spread: float = 8.0) -> Results:  # fmt: skip
    """Nothing but noise: seeds and batch sizes matter, norms do not."""
    noise = random.Random(number)
    shared = [noise.gauss(0, 20) for _ in range(seeds)]
    outcomes = [
        run(800 + 20 * math.log2(size) + shared[seed] + noise.gauss(0, spread), norm=norm, batch_size=size, seed=seed)
        for norm in norms
        for size in sizes
        for seed in range(seeds)
    ]
    return Results(f"null {number}", tuple(outcomes))


def full_study(seeds: int = 5) -> Results:
    """Norms × batch sizes × activations × pre-processing, with curves, some runs lost and two networks analysed."""
    noise = random.Random(7)
    shift = {"bn": 20, "gn": 0, "ln": -15}
    outcomes = []
    for activation in ("relu", "silu"):
        for preprocessing in ("none", "standard"):
            for size in (2, 8, 32):
                for norm in ("bn", "gn", "ln", "gn:64"):
                    for seed in range(seeds):
                        cell = {"activation": activation, "preprocessing": preprocessing, "batch_size": size,
                                "norm": norm, "seed": seed, "start": "converted"}  # fmt: skip
                        if norm == "gn:64":
                            outcomes.append(run(0, "skipped", "64 groups do not divide 32 channels", **cell))
                            continue
                        if norm == "ln" and preprocessing == "none" and size == 2 and seed == 1:
                            outcomes.append(run(0, "diverged", "the loss was nan at update 41", **cell))
                            continue
                        if norm == "gn" and activation == "silu" and size == 32 and seed == 4:
                            outcomes.append(run(0, "failed", "out of memory", **cell))
                            continue
                        right = 900 + shift[norm] + 12 * (preprocessing == "standard") + noise.gauss(0, 7)
                        right -= {2: 150, 8: 30, 32: 0}[size] if norm == "bn" else 0
                        made = run(right, **cell)
                        made = replace(made, start_accuracy=0.1, steps=800, curve=curve(right / IMAGES, noise))
                        if seed == 0 and activation == "relu" and preprocessing == "none":
                            made = replace(made, analysis=analysed(norm, noise))
                        outcomes.append(made)
    return Results("norms-and-batches", tuple(outcomes), "Which norm suits small batches?", TRAINING)


RATES = (0.001, 0.01, 0.1, 1.0)
BY_RATE = {
    ("scratch", "bn"): (300, 700, 900, 890),
    ("scratch", "gn"): (200, 500, 800, 100),
    ("converted", "bn"): (940, 950, 955, 700),
    ("converted", "gn"): (945, 940, 120, 0),
}


def rates_study(sizes: Sequence[int] = (32,)) -> Results:
    """Both starts at four learning rates, scaled with the batch size; at the highest one a converted run diverges."""
    outcomes = []
    for size in sizes:
        for (start, norm), accuracies in BY_RATE.items():
            for rate, right in zip(RATES, accuracies, strict=True):
                for seed in range(3):
                    cell = {"start": start, "norm": norm, "lr": rate * size / 32, "seed": seed, "batch_size": size}
                    if right == 0 and seed == 2:
                        outcomes.append(run(0, "diverged", "the loss is not finite at update 3", **cell))
                    else:
                        outcomes.append(run(right + 30 * (right == 0) + 2 * seed + size // 32, **cell))
    return Results("rates", tuple(outcomes), "How sensitive is each start?", {**TRAINING, "lr_batch_size": 32})


def curve(final: float, noise: random.Random, epochs: int = 8) -> tuple[Epoch, ...]:
    """A curve that ends at that accuracy."""
    points = []
    for epoch in range(1, epochs + 1):
        share = 1 - math.exp(-epoch / 2) if epoch < epochs else 1.0
        at = final * share + (noise.gauss(0, 0.01) if epoch < epochs else 0.0)
        points.append(Epoch(float(epoch), 100 * epoch, 2.3 - 2 * share, at, 2.2 - 1.9 * share))
    return tuple(points)


def analysed(norm: str, noise: random.Random) -> CellAnalysis:
    """Layers of a small residual network."""
    names = ["conv1", "bn1"] + [f"layer{i}.0.{part}" for i in (1, 2, 3) for part in ("conv1", "bn1", "conv2", "bn2")]
    layers = tuple(
        LayerSummary(name, "norm" if "bn" in name else "convolution", 16, noise.gauss(0, 0.3), 1 + noise.random(),
                     0.0 if "conv" in name else 0.4, 0.0, 12 - 0.5 * i, 0.2 + 0.02 * i, 10.0 ** (-i / 4))
        for i, name in enumerate(names)
    )  # fmt: skip
    cka = tuple(tuple(math.exp(-abs(i - j) / (4 if norm == "bn" else 8)) for j in range(14)) for i in range(14))
    return CellAnalysis(layers, tuple(names), cka)
