"""The learning rate as an axis: the one that each norm does best with, and how much the choice matters."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from normsurgeon.study.estimates import estimate
from normsurgeon.study.pairing import Setting, arranged, complete, diverged_runs, per_seed, setting_axes
from normsurgeon.study.records import Results

CLOSE = 0.02
"""A learning rate is close to the best one where its mean accuracy is at most so much lower."""


@dataclass(frozen=True)
class RatePoint:
    """Mean accuracy at one learning rate over ``n`` seeds, with its 95 % interval; a diverged run counts as 0 right."""

    rate: float
    mean: float
    ci: tuple[float, float] | None
    n: int
    diverged: int


@dataclass(frozen=True)
class RateCurve:
    """Accuracy against the learning rate of one norm from one start, the rates increasing.

    settings  all else that varies, averaged over
    """

    start: str
    norm: str
    settings: int
    points: tuple[RatePoint, ...]

    @property
    def best(self) -> RatePoint:
        """The point of the highest mean; of equal ones, that of the lowest rate."""
        return max(self.points, key=lambda point: point.mean)

    @property
    def close(self) -> tuple[float, float]:
        """The lowest and the highest rate of the unbroken row around the best one that is within ``CLOSE`` of it."""
        good = [self.best.mean - point.mean <= CLOSE + 1e-9 for point in self.points]
        low = high = self.points.index(self.best)
        while low > 0 and good[low - 1]:
            low -= 1
        while high + 1 < len(good) and good[high + 1]:
            high += 1
        return self.points[low].rate, self.points[high].rate


def rate_curves(results: Results) -> tuple[RateCurve, ...]:
    """The curve of every start and norm, over the same seeds and settings; () where one rate was tried.

    >>> from normsurgeon.study.records import Cell, Outcome
    >>> right = {1.0: 50, 0.1: 90, 0.3: 89}
    >>> runs = tuple(Outcome(Cell("m", "d", lr=lr), "done", None, n, 100) for lr, n in right.items())
    >>> curve, = rate_curves(Results("s", runs))
    >>> curve.best.rate, curve.close
    (0.1, (0.1, 0.3))
    """
    if "lr" not in setting_axes(results):
        return ()
    it = arranged(results, ("start", "norm", "lr"))
    block = complete(it, it.scored)
    if not block.seeds:
        return ()
    found: dict[tuple[str, str], list[RatePoint]] = {}
    for arm in it.scored:
        start, norm, rate = arm
        made = estimate(per_seed(it, block, arm))
        assert made.mean is not None
        found.setdefault((start, norm), []).append(
            RatePoint(rate, made.mean, made.ci, made.n, diverged_runs(it, block, arm))
        )
    return tuple(RateCurve(*key, len(block.settings), tuple(points)) for key, points in found.items())


def unscaled(results: Results) -> tuple[Results, int | None]:
    """The results with the rates as the grid gives them, where batches of several sizes scaled them, so that the same
    rate is compared with itself; and the batch size that they are then for, None where they are as they were.

    >>> from normsurgeon.study.records import Cell, Outcome
    >>> runs = tuple(Outcome(Cell("m", "d", batch_size=size, lr=0.1 * size / 32), "done") for size in (8, 64))
    >>> made, size = unscaled(Results("s", runs, training={"lr_batch_size": 32}))
    >>> [outcome.cell.lr for outcome in made.outcomes], size
    ([0.1, 0.1], 32)
    """
    size = results.training.get("lr_batch_size")
    if not isinstance(size, int) or len({outcome.cell.batch_size for outcome in results.outcomes}) < 2:
        return results, None
    outcomes = []
    for outcome in results.outcomes:
        rate = float(f"{outcome.cell.lr * size / outcome.cell.batch_size:.12g}")  # as it was before it was scaled
        outcomes.append(replace(outcome, cell=replace(outcome.cell, lr=rate)))
    return replace(results, outcomes=tuple(outcomes)), size


def best_rates(results: Results) -> dict[tuple[Setting, str], float]:
    """The learning rate with the highest mean over the seeds, for each setting and norm; {} where only one was tried.

    Of equal ones, the lowest. A rate at which a run failed or was skipped can only win by the runs that it has.
    """
    if "lr" not in setting_axes(results):
        return {}
    it = arranged(results, ("norm", "lr"))
    best: dict[tuple[Setting, str], tuple[float, float]] = {}
    for setting in it.settings:
        for norm, rate in it.arms:
            values = [v for seed in it.seeds if (v := it.score(setting, (norm, rate), seed)) is not None]
            if values and (mean := math.fsum(values) / len(values)) > best.get((setting, norm), (-1.0, 0.0))[0]:
                best[setting, norm] = mean, rate
    return {key: rate for key, (_, rate) in best.items()}


def at_best_rates(results: Results, best: dict[tuple[Setting, str], float]) -> Results:
    """The results with each norm's runs at its best learning rate alone, the rate taken off the grid."""
    axes = [axis for axis in setting_axes(results) if axis != "lr"]
    kept = []
    for outcome in results.outcomes:
        cell = outcome.cell
        if best.get((tuple((axis, getattr(cell, axis)) for axis in axes), cell.norm)) == cell.lr:
            kept.append(replace(outcome, cell=replace(cell, lr=0.0)))
    return replace(results, outcomes=tuple(kept))
