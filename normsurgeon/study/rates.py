"""The learning rate as an axis that is tuned: the one that each norm does best with."""

from __future__ import annotations

import math
from dataclasses import replace

from normsurgeon.study.pairing import Setting, arranged, setting_axes
from normsurgeon.study.records import Results


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
