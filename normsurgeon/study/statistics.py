"""The study's numbers: a table over seeds, paired comparisons of norms, a ranking, crossed tables, learning rates.

Seeds are the replicates. Runs in different settings with the same seed share their initial weights and their images,
so they are averaged before anything is tested, and n is the number of seeds. docs/study.md has the formulas.

An *arm* is what is compared (a norm; or a norm with a batch size), a *setting* all that is held equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from normsurgeon._util.estimates import ALPHA, Estimate, Interval, estimate, estimate_share, holm, paired
from normsurgeon.norms.target_names import TARGET_NAMES
from normsurgeon.study.records import AXES, LOST, Cell, Epoch, Outcome, Results

Setting = tuple[tuple[str, Any], ...]
"""(axis, value) pairs, of the axes that vary."""
Scope = Literal["overall", "batch size", "setting", "best lr"]

CLOSE = 0.02
"""A learning rate is close to the best one if its mean accuracy is at most this much lower."""
LR_LEVEL = "lr level"
"""Stands for the learning rate where batch sizes are compared: the k-th of those tried at that batch size."""
_FAMILIES: dict[str, str] = {"overall": "study", "batch size": "study", "setting": "setting", "best lr": "best lr"}


# Settings × arms × seeds


@dataclass(frozen=True)
class Scores:
    """Every run's score as an array, nan if it has none: its accuracy, and 0 if it diverged.

    Leaving diverged runs out would let a norm gain by its failures; the lowest score replaces them, as in trials in
    which patients die (Lachin, 1999).
    """

    settings: tuple[Setting, ...]
    arms: tuple[tuple[Any, ...], ...]
    seeds: tuple[int, ...]
    score_SAK: NDArray[Any]
    ran_SAK: NDArray[Any]
    diverged_SAK: NDArray[Any]
    guessing_SAK: NDArray[Any]

    @property
    def scored(self) -> list[int]:
        """The arms that have any score."""
        return [i for i in range(len(self.arms)) if not np.isnan(self.score_SAK[:, i]).all()]

    def complete(self, arms: Sequence[int]) -> Block:
        """Settings and seeds for which every one of these arms has a score, and how many units are left out.

        If some are missing, the setting or the seed with the greatest share of gaps is left out, all that are tied at
        once, a setting rather than a seed, until there are no gaps: n stays as large as can be.
        """
        full_SK: NDArray[Any] = ~np.isnan(self.score_SAK[:, list(arms)]).any(axis=1)
        units = int(self.ran_SAK[:, list(arms)].any(axis=1).sum())
        settings, seeds = np.flatnonzero(full_SK.any(1)), np.flatnonzero(full_SK.any(0))
        while len(settings) and len(seeds):
            gaps = ~full_SK[np.ix_(settings, seeds)]
            by_setting, by_seed = gaps.mean(1), gaps.mean(0)
            if not gaps.any():
                return Block(settings, seeds, units - len(settings) * len(seeds))
            if by_setting.max() >= by_seed.max():
                settings = settings[by_setting < by_setting.max()]
            else:
                seeds = seeds[by_seed < by_seed.max()]
        nothing = np.array([], dtype=int)
        return Block(nothing, nothing, units)

    def per_seed(self, block: Block, arm: int) -> list[float]:
        """One number per seed: an arm's mean over the block's settings."""
        return [math.fsum(self.score_SAK[block.settings, arm, k]) / len(block.settings) for k in block.seeds]

    def diverged(self, block: Block, arm: int) -> int:
        """How many of an arm's runs in the block diverged."""
        return int(self.diverged_SAK[:, arm][np.ix_(block.settings, block.seeds)].sum())

    def learned(self, block: Block, arm: int) -> bool:
        """Whether an arm's mean accuracy is more than guessing may reach; where chance is not known, it is."""
        at = np.ix_(block.settings, block.seeds)
        guessing, score = self.guessing_SAK[:, arm][at], self.score_SAK[:, arm][at]
        known = ~np.isnan(guessing) | self.diverged_SAK[:, arm][at]
        if not known.all() or np.isnan(guessing).all():
            return True
        return bool(score.mean() > np.nanmean(guessing))

    def averaged(self) -> tuple[Block, dict[Any, tuple[Estimate, int]]]:
        """The block of all arms that have a score; and each arm's estimate over its seeds, and its diverged runs."""
        scored, block = self.scored, self.complete(self.scored)
        return block, {
            arm: (estimate_share(self.per_seed(block, i) if i in scored else []), self.diverged(block, i))
            for i, arm in enumerate(self.arms)
        }


@dataclass(frozen=True)
class Block:
    """Numbers of settings and seeds without gaps. ``lost``: units of the two that are not in it."""

    settings: NDArray[Any]
    seeds: NDArray[Any]
    lost: int


def setting_axes(results: Results) -> tuple[str, ...]:
    """The axes that tell settings apart: those that vary, but for the norm, and the learning rate if other axes
    determine it (as when it is scaled by the batch size)."""
    cells = {_without(outcome.cell, "lr", "seed"): outcome.cell.lr for outcome in results.outcomes}
    tried = any(cells[_without(outcome.cell, "lr", "seed")] != outcome.cell.lr for outcome in results.outcomes)
    return tuple(axis for axis in results.varying() if axis != "norm" and (axis != "lr" or tried))


def arranged(results: Results, arms: Sequence[str] = ("norm",)) -> Scores:
    """The results with these axes as arms, in an order that does not depend on the cells' order.

    >>> cells = [Cell("resnet8", "digits", norm=norm, batch_size=size) for norm in ("gn", "bn") for size in (8, 2)]
    >>> made = arranged(Results("s", tuple(Outcome(cell, "done", correct=1, images=2) for cell in cells)))
    >>> made.arms, made.settings
    ((('bn',), ('gn',)), ((('batch_size', 2),), (('batch_size', 8),)))
    """
    axes = [axis for axis in setting_axes(results) if axis not in arms]
    rates: dict[tuple[Any, ...], set[float]] = {}
    if "lr" in axes and "batch_size" in arms:
        for outcome in results.outcomes:
            rates.setdefault(_without(outcome.cell, "lr", "seed", "norm"), set()).add(outcome.cell.lr)
    runs: dict[tuple[Setting, tuple[Any, ...], int], Outcome] = {}
    for outcome in results.outcomes:
        cell, setting = outcome.cell, setting_of(outcome.cell, axes)
        if rates:
            level = sorted(rates[_without(cell, "lr", "seed", "norm")]).index(cell.lr)
            setting = tuple((LR_LEVEL, level) if axis == "lr" else (axis, value) for axis, value in setting)
        runs[setting, tuple(getattr(cell, axis) for axis in arms), cell.seed] = outcome
    settings = sorted({key[0] for key in runs}, key=lambda setting: [_order(*pair) for pair in setting])
    found = sorted({key[1] for key in runs}, key=lambda arm: [_order(*pair) for pair in zip(arms, arm, strict=True)])
    seeds = sorted({key[2] for key in runs})
    score = np.full((len(settings), len(found), len(seeds)), np.nan)
    ran, diverged = np.zeros(score.shape, bool), np.zeros(score.shape, bool)
    guessing = np.full(score.shape, np.nan)
    for (setting, arm, seed), outcome in runs.items():
        at = settings.index(setting), found.index(arm), seeds.index(seed)
        ran[at], diverged[at] = True, outcome.status == "diverged"
        if outcome.status in ("done", "diverged"):
            score[at] = outcome.accuracy or 0.0
        if outcome.guessing is not None:
            guessing[at] = outcome.guessing
    return Scores(tuple(settings), tuple(found), tuple(seeds), score, ran, diverged, guessing)


def setting_of(cell: Cell, axes: Iterable[str]) -> Setting:
    """A cell's values of these axes."""
    return tuple((axis, getattr(cell, axis)) for axis in axes)


def norm_order(norm: str) -> tuple[int, str, int]:
    """BatchNorm first, then the targets as the catalogue lists them, then by groups.

    >>> sorted(["ln", "gn:16", "gn:8", "gn", "bn"], key=norm_order)
    ['bn', 'gn', 'gn:8', 'gn:16', 'ln']
    """
    norms = ("bn", *TARGET_NAMES)
    name, _, groups = norm.partition(":")
    return norms.index(name) if name in norms else len(norms), name, int(groups) if groups.isdigit() else 0


def axis_order(axis: str, values: Iterable[Any]) -> list[Any]:
    """An axis' different values, in the order in which tables list them."""
    return sorted(set(values), key=lambda value: _order(axis, value))


def _order(axis: str, value: Any) -> tuple[Any, ...]:
    return norm_order(value) if axis == "norm" else (value not in ("default", "none", "scratch", ()), value)


def _without(cell: Cell, *axes: str) -> tuple[Any, ...]:
    return tuple(value for axis, value in vars(cell).items() if axis not in axes)


# Tables


@dataclass(frozen=True)
class Row:
    """One cell of the table, its seeds pooled: of the ``n`` runs that finished; ``lost`` counts the others by kind."""

    cell: Cell
    estimate: Estimate
    lost: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """All axes but the seed, and the numbers, in one flat object."""
        axes, it = {k: v for k, v in self.cell.to_dict().items() if k != "seed"}, self.estimate
        return {**axes, "mean": it.mean, "ci": it.ci, "sd": it.sd, "n": it.n, **self.lost}


@dataclass(frozen=True)
class Comparison:
    """Norm ``a`` minus norm ``b``, paired by seed; docs/study.md explains the numbers.

    scope       ``overall``: each seed's differences averaged over the settings; ``batch size``: each seed's slope of
                the difference on log2(batch size), averaged over the rest; ``setting``: within one; ``best lr``:
                overall, at the learning rate that each norm does best with on these same images
    n           seeds; ``settings`` averaged over; ``pairs`` of runs used; ``lost``: pairs of the grid that are not
    finished    the difference where both runs finished, if any diverged; tests and claims do not use it
    learned     whether the networks of either norm answer better than guessing may; else they say nothing about norms
    """

    scope: Scope
    setting: Setting
    a: str
    b: str
    n: int
    settings: int
    pairs: int
    lost: int
    diverged_a: int
    diverged_b: int
    mean_a: float | None
    mean_b: float | None
    ci_a: Interval | None
    ci_b: Interval | None
    difference: float | None
    ci: Interval | None
    sd: float | None
    effect: float | None
    p: float | None
    p_holm: float | None = None
    finished: dict[str, Any] | None = None
    learned: bool = True

    @property
    def significant(self) -> bool:
        """Whether the adjusted p is below 0.05, and anything was learned."""
        return self.learned and self.p_holm is not None and self.p_holm < ALPHA

    @property
    def better(self) -> str | None:
        """The more accurate norm if that is significant. Of a slope there is no better."""
        if not self.significant or self.difference is None or self.scope == "batch size":
            return None
        return self.a if self.difference > 0 else self.b

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        setting = {axis: dict(value) if axis == "regularization" else value for axis, value in self.setting}
        return {**asdict(self), "setting": setting, "significant": self.significant, "better": self.better}


@dataclass(frozen=True)
class Rank:
    """A norm's place: 1 + the number of norms that are significantly better overall, so norms may share one.

    rank   None if it has no result, or none of its comparisons could be tested
    estimate, settings  over the seeds, each averaged over the settings in which every ranked norm has a score
    """

    norm: str
    rank: int | None
    worse_than: tuple[str, ...]
    estimate: Estimate
    settings: int
    lost: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        it = self.estimate
        own = {key: value for key, value in vars(self).items() if key not in ("estimate", "lost")}
        return {**own, "mean": it.mean, "ci": it.ci, "n": it.n, **self.lost}


@dataclass(frozen=True)
class Crossing:
    """Norm × another axis: mean accuracy over the same seeds and other settings for all that have a score.

    cells  (level, norm) → its estimate and diverged runs
    """

    axis: str
    settings: int
    lost: int
    cells: dict[tuple[Any, str], tuple[Estimate, int]]

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        cells = [
            {self.axis: level, "norm": norm, "mean": it.mean, "ci": it.ci, "n": it.n, "diverged": diverged}
            for (level, norm), (it, diverged) in self.cells.items()
        ]
        return {**vars(self), "cells": cells}


def table(results: Results) -> tuple[Row, ...]:
    """One row for each cell, its seeds pooled."""
    axes = [axis for axis in AXES if axis != "seed"]
    groups: dict[tuple[Any, ...], list[Outcome]] = {}
    for outcome in results.outcomes:
        key = tuple(_order(axis, getattr(outcome.cell, axis)) for axis in axes)
        groups.setdefault(key, []).append(outcome)
    rows = []
    for _, runs in sorted(groups.items()):
        known = [run.accuracy for run in runs if run.status == "done" and run.accuracy is not None]
        rows.append(Row(min(run.cell for run in runs), estimate_share(known), _lost(runs)))
    return tuple(rows)


def _lost(runs: Iterable[Outcome]) -> dict[str, int]:
    runs = list(runs)
    return {kind: sum(run.status == kind for run in runs) for kind in LOST}


def comparisons(results: Results) -> tuple[Comparison, ...]:
    """Every two norms: overall, in their slope on the batch size, in each setting, at each norm's best learning rate.

    >>> def run(norm, seed, right): return Outcome(Cell("m", "d", norm=norm, seed=seed), "done", None, right, 100)
    >>> runs = [run("bn", s, 80 + s) for s in range(4)] + [run("gn", s, 70 + 2 * s) for s in range(4)]
    >>> [(c.a, c.b, round(c.difference, 3), c.n, round(c.p_holm, 4)) for c in comparisons(Results("s", tuple(runs)))]
    [('bn', 'gn', 0.085, 4, 0.0009)]
    """
    it = arranged(results)
    made = _all_pairs(it, "overall") + [c for c in _all_pairs(it, "batch size") if c.n]
    for i, setting in enumerate(it.settings if len(it.settings) > 1 else ()):
        arrays = {
            name: getattr(it, name)[i : i + 1] for name in ("score_SAK", "ran_SAK", "diverged_SAK", "guessing_SAK")
        }
        made += [c for c in _all_pairs(replace(it, settings=(setting,), **arrays), "setting") if c.n]
    if best := best_rates(results):
        made += _all_pairs(arranged(at_best_rates(results, best)), "best lr")
    adjusted: dict[int, float | None] = {}
    for family in dict.fromkeys(_FAMILIES.values()):
        members = [i for i, c in enumerate(made) if _FAMILIES[c.scope] == family]
        adjusted |= zip(members, holm([made[i].p for i in members]), strict=True)
    return tuple(replace(c, p_holm=adjusted[i]) for i, c in enumerate(made))


def _all_pairs(it: Scores, scope: Scope) -> list[Comparison]:
    return [_compared(it, scope, a, b) for a, b in combinations(it.scored, 2)]


def _compared(it: Scores, scope: Scope, a: int, b: int) -> Comparison:
    block, of_a, of_b = _per_seed(it, scope, a, b)
    test = paired([x - y for x, y in zip(of_a, of_b, strict=True)])
    mean_a, mean_b = map(estimate if scope == "batch size" else estimate_share, (of_a, of_b))
    learned = not of_a or it.learned(block, a) or it.learned(block, b)
    diverged_a, diverged_b = it.diverged(block, a), it.diverged(block, b)
    finished = None
    if diverged_a or diverged_b:
        part, x, y = _per_seed(replace(it, score_SAK=np.where(it.diverged_SAK, np.nan, it.score_SAK)), scope, a, b)
        left = estimate([one - other for one, other in zip(x, y, strict=True)])
        finished = {"difference": left.mean, "ci": left.ci, "n": left.n, "settings": len(part.settings)}
    return Comparison(
        scope, it.settings[0] if scope == "setting" else (), it.arms[a][0], it.arms[b][0], test.n, len(block.settings),
        len(block.settings) * len(block.seeds), block.lost, diverged_a, diverged_b, mean_a.mean, mean_b.mean, mean_a.ci,
        mean_b.ci, test.mean, test.ci, test.sd, test.effect, test.p, finished=finished, learned=learned,
    )  # fmt: skip


def _per_seed(it: Scores, scope: Scope, a: int, b: int) -> tuple[Block, list[float], list[float]]:
    """What a comparison is made on, and one number per seed for both norms."""
    block = it.complete((a, b))
    if scope != "batch size":
        return block, it.per_seed(block, a), it.per_seed(block, b)
    weights = slope_weights([it.settings[i] for i in block.settings], it.settings)
    kept = np.array([i for i in block.settings if it.settings[i] in weights], dtype=int)
    seeds = block.seeds if len(kept) else block.seeds[:0]
    lost = block.lost + len(block.settings) * len(block.seeds) - len(kept) * len(seeds)

    def slopes(arm: int) -> list[float]:
        return [math.fsum(weights[it.settings[i]] * it.score_SAK[i, arm, k] for i in kept) for k in seeds]

    return Block(kept, seeds, lost), slopes(a), slopes(b)


def slope_weights(settings: Iterable[Setting], tried: Iterable[Setting]) -> dict[Setting, float]:
    """What each setting's accuracy counts in the mean slope: (x − x̄) / Σ(x − x̄)², x = log2(batch size).

    Learning rates are matched between batch sizes by their place among those ``tried`` there.

    >>> sizes = [(("batch_size", n),) for n in (2, 4, 8)]
    >>> {dict(setting)["batch_size"]: weight for setting, weight in slope_weights(sizes, sizes).items()}
    {2: -0.5, 4: 0.0, 8: 0.5}
    """
    rates: dict[Setting, list[float]] = {}
    for setting in tried:
        rates.setdefault(_all_but(setting, "lr"), []).append(dict(setting).get("lr", 0.0))
    contexts: dict[Setting, dict[Setting, float]] = {}
    for setting in settings:
        values = dict(setting)
        if "batch_size" in values:
            level = sorted(rates[_all_but(setting, "lr")]).index(values.get("lr", 0.0))
            context = (*_all_but(setting, "lr", "batch_size"), (LR_LEVEL, level))
            contexts.setdefault(context, {})[setting] = math.log2(values["batch_size"])
    several = [sizes for sizes in contexts.values() if len(sizes) > 1]
    weights: dict[Setting, float] = {}
    for sizes in several:
        middle = math.fsum(sizes.values()) / len(sizes)
        spread = math.fsum((x - middle) ** 2 for x in sizes.values())
        weights |= {setting: (x - middle) / spread / len(several) for setting, x in sizes.items()}
    return weights


def _all_but(setting: Setting, *axes: str) -> Setting:
    return tuple(pair for pair in setting if pair[0] not in axes)


def ranking(results: Results, compared: Sequence[Comparison] | None = None) -> tuple[Rank, ...]:
    """The norms from the best to the lowest; give ``compared`` if it is known already."""
    it = arranged(results)
    overall = [c for c in (comparisons(results) if compared is None else compared) if c.scope == "overall"]
    scored, (block, cells) = [it.arms[i] for i in it.scored], it.averaged()
    ranks = []
    for (norm,), (mean, _) in cells.items():
        mine = [c for c in overall if norm in (c.a, c.b)]
        above = tuple(c.better for c in mine if c.better is not None and c.better != norm)
        known = (norm,) in scored and (len(scored) == 1 or any(c.p is not None for c in mine))
        lost = _lost(outcome for outcome in results.outcomes if outcome.cell.norm == norm)
        ranks.append(Rank(norm, 1 + len(above) if known else None, above, mean, len(block.settings), lost))
    none = math.inf
    return tuple(sorted(ranks, key=lambda r: (r.rank or none, none if r.estimate.mean is None else -r.estimate.mean)))


def crossing(results: Results, axis: str) -> Crossing:
    """Accuracy by the axis' levels and the norms, with everything else averaged over alike."""
    block, cells = arranged(results, (axis, "norm")).averaged()
    return Crossing(axis, len(block.settings), block.lost, cells)


# Curves over learning rates and over epochs


@dataclass(frozen=True)
class Point:
    """A curve's mean at ``x`` over ``n`` seeds, with its 95 % interval."""

    x: float
    mean: float
    ci: Interval | None
    n: int
    diverged: int = 0


@dataclass(frozen=True)
class RateCurve:
    """Accuracy against the learning rate of one norm from one start; a diverged run counts as 0 right.

    settings  all else that varies, averaged over
    """

    start: str
    norm: str
    settings: int
    points: tuple[Point, ...]

    @property
    def best(self) -> Point:
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
        return self.points[low].x, self.points[high].x


def rate_curves(results: Results) -> tuple[RateCurve, ...]:
    """The curve of every start and norm, over the same seeds and settings; () if one rate was tried.

    >>> right = {1.0: 50, 0.1: 90, 0.3: 89}
    >>> runs = tuple(Outcome(Cell("m", "d", lr=lr), "done", None, n, 100) for lr, n in right.items())
    >>> curve, = rate_curves(Results("s", runs))
    >>> curve.best.x, curve.close
    (0.1, (0.1, 0.3))
    """
    if "lr" not in setting_axes(results):
        return ()
    block, cells = arranged(results, ("start", "norm", "lr")).averaged()
    found: dict[tuple[str, str], list[Point]] = {}
    for (start, norm, rate), (it, diverged) in cells.items():
        if it.mean is not None:
            found.setdefault((start, norm), []).append(Point(rate, it.mean, it.ci, it.n, diverged))
    return tuple(RateCurve(*key, len(block.settings), tuple(points)) for key, points in found.items())


def unscaled(results: Results) -> tuple[Results, int | None]:
    """The results with the rates as the grid gives them, if batches of several sizes scaled them, so that the same
    rate is compared with itself; and the batch size that they are then for, None if nothing was scaled."""
    size = results.training.get("lr_batch_size")
    if not isinstance(size, int) or len({outcome.cell.batch_size for outcome in results.outcomes}) < 2:
        return results, None
    outcomes = []
    for outcome in results.outcomes:
        rate = float(f"{outcome.cell.lr * size / outcome.cell.batch_size:.12g}")  # as it was before it was scaled
        outcomes.append(replace(outcome, cell=replace(outcome.cell, lr=rate)))
    return replace(results, outcomes=tuple(outcomes)), size


def best_rates(results: Results) -> dict[tuple[Setting, str], float]:
    """The learning rate with the highest mean over the seeds, for each setting and norm; {} if only one was tried.

    Of equal ones, the lowest. A rate at which a run failed or was skipped can only win by the runs that it has.
    """
    if "lr" not in setting_axes(results):
        return {}
    it = arranged(results, ("norm", "lr"))
    best: dict[tuple[Setting, str], tuple[float, float]] = {}
    for i, setting in enumerate(it.settings):
        for j, (norm, rate) in enumerate(it.arms):
            known = [value for value in it.score_SAK[i, j] if not math.isnan(value)]
            if known and (mean := math.fsum(known) / len(known)) > best.get((setting, norm), (-1.0, 0.0))[0]:
                best[setting, norm] = mean, rate
    return {key: rate for key, (_, rate) in best.items()}


def at_best_rates(results: Results, best: dict[tuple[Setting, str], float]) -> Results:
    """The results with each norm's runs at its best learning rate alone, the rate taken off the grid."""
    axes = [axis for axis in setting_axes(results) if axis != "lr"]
    kept = [
        replace(outcome, cell=replace(outcome.cell, lr=0.0))
        for outcome in results.outcomes
        if best.get((setting_of(outcome.cell, axes), outcome.cell.norm)) == outcome.cell.lr
    ]
    return replace(results, outcomes=tuple(kept))


def mean_curves(results: Results, metric: str = "accuracy") -> dict[tuple[Setting, str], tuple[Point, ...]]:
    """By setting and norm, the training curve over the runs that finished, at the epochs that all were judged at.

    metric  a field of ``Epoch``; curves of a single point are left out
    """
    axes = setting_axes(results)
    runs: dict[tuple[Setting, str], list[tuple[Epoch, ...]]] = {}
    for outcome in results.outcomes:
        if outcome.status == "done" and outcome.curve:
            runs.setdefault((setting_of(outcome.cell, axes), outcome.cell.norm), []).append(outcome.curve)
    made: dict[tuple[Setting, str], tuple[Point, ...]] = {}
    for key in sorted(runs, key=lambda k: ([_order(*pair) for pair in k[0]], norm_order(k[1]))):
        values: dict[float, list[float]] = {}
        for curve in runs[key]:
            for point in curve:
                if (value := getattr(point, metric)) is not None:
                    values.setdefault(point.epoch, []).append(value)
        mean = estimate_share if metric == "accuracy" else estimate
        means = [(epoch, mean(at)) for epoch, at in sorted(values.items()) if len(at) == len(runs[key])]
        points = tuple(Point(epoch, it.mean, it.ci, it.n) for epoch, it in means if it.mean is not None)
        if len(points) > 1:
            made[key] = points
    return made
