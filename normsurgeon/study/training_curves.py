"""Training curves, the mean over seeds, for each setting and norm."""

from __future__ import annotations

from dataclasses import dataclass

from normsurgeon.study.estimates import estimate
from normsurgeon.study.pairing import Setting, arranged
from normsurgeon.study.records import Results

METRICS = (("accuracy", "accuracy"), ("loss", "held-out loss"), ("train_loss", "training loss"))


@dataclass(frozen=True)
class Point:
    """The mean at one epoch over the ``n`` runs that were judged then, and its 95 % interval."""

    epoch: float
    mean: float
    ci: tuple[float, float] | None
    n: int


@dataclass(frozen=True)
class MeanCurve:
    """One norm's curve in one setting, over the runs that finished; ``metric`` as ``Epoch`` calls it."""

    setting: Setting
    norm: str
    metric: str
    points: tuple[Point, ...]


def mean_curves(results: Results) -> tuple[MeanCurve, ...]:
    """Every curve of at least two points, at the epochs that all of its runs were judged at.

    >>> from normsurgeon.study.records import Cell, Epoch, Outcome
    >>> def run(seed, *accuracies): return Outcome(Cell("m", "d", seed=seed), "done", None, 1, 2, curve=tuple(
    ...     Epoch(float(i + 1), i, None, accuracy, None) for i, accuracy in enumerate(accuracies)))
    >>> [(p.epoch, p.mean, p.n) for p in mean_curves(Results("s", (run(0, 0.25, 0.5), run(1, 0.75, 1.0))))[0].points]
    [(1.0, 0.5, 2), (2.0, 0.75, 2)]
    """
    it = arranged(results)
    made = []
    for setting in it.settings:
        for arm in it.arms:
            runs = [it.runs[setting, arm, seed] for seed in it.seeds if (setting, arm, seed) in it.runs]
            runs = [run for run in runs if run.status == "done" and run.curve]
            for metric, _ in METRICS:
                values: dict[float, list[float]] = {}
                for run in runs:
                    for point in run.curve:
                        if (value := getattr(point, metric)) is not None:
                            values.setdefault(point.epoch, []).append(value)
                common = sorted(epoch for epoch, at in values.items() if len(at) == len(runs))
                if len(common) > 1:
                    means = [(epoch, estimate(values[epoch])) for epoch in common]
                    points = tuple(Point(e, m.mean, m.ci, m.n) for e, m in means if m.mean is not None)
                    made.append(MeanCurve(setting, arm[0], metric, points))
    return tuple(made)
