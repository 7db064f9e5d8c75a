"""The study's numbers: a table over seeds, paired comparisons of norms, a ranking, and tables of norm × axis.

Seeds are the replicates. Runs at different batch sizes with the same seed share their initial weights and their
images, so they are averaged before anything is tested, and n is the number of seeds. docs/study.md has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any, Literal

from normsurgeon.study.estimates import estimate, holm, paired
from normsurgeon.study.pairing import LR_LEVEL, Block, Grid, Setting, axis_order, complete, grid, score
from normsurgeon.study.rates import at_best_rates, best_rates
from normsurgeon.study.records import AXES, Cell, Results

ALPHA = 0.05
Scope = Literal["overall", "batch size", "setting", "best lr"]
_FAMILIES: dict[str, str] = {"overall": "study", "batch size": "study", "setting": "setting", "best lr": "best lr"}


@dataclass(frozen=True)
class Row:
    """One cell of the table, its seeds pooled: mean, 95 % Student-t interval and sd of the runs that finished.

    cell   any of them: all axes but the seed are the same
    n      runs with a result, behind mean, ci and sd; diverged, failed and skipped ones are counted beside it
    """

    cell: Cell
    mean: float | None
    ci: tuple[float, float] | None
    sd: float | None
    n: int
    diverged: int
    failed: int
    skipped: int

    def to_dict(self) -> dict[str, Any]:
        """All axes but the seed, and the numbers, in one flat object."""
        axes = {axis: value for axis, value in self.cell.to_dict().items() if axis != "seed"}
        ci = None if self.ci is None else list(self.ci)
        return {**axes, **{k: v for k, v in vars(self).items() if k not in ("cell", "ci")}, "ci": ci}


@dataclass(frozen=True)
class Comparison:
    """Norm ``a`` minus norm ``b``, paired by seed; a diverged run counts as 0 right (``pairing.score``).

    scope       ``overall``: each seed's differences averaged over the settings; ``batch size``: each seed's slope of
                the difference on log2(batch size), averaged over the rest; ``setting``: within one; ``best lr``:
                overall, at the learning rate that each norm does best with on these same images
    setting     what is held equal, of the axes that vary; () but for ``setting``
    n           seeds; ``settings`` averaged over; ``pairs`` of runs used; ``lost``: pairs of the grid that are not
    diverged_a, diverged_b  diverged runs among the pairs used
    mean_a, mean_b, difference, ci, sd  of the per-seed numbers: accuracies, or accuracy per doubling
    effect      Hedges' g_z; None where it has no value
    p, p_holm   two-sided paired t test; adjusted within the comparison's family (``overall`` and ``batch size``
                together, ``setting``, ``best lr``); None where there are fewer than 3 seeds
    """

    scope: Scope
    a: str
    b: str
    setting: Setting
    n: int
    settings: int
    pairs: int
    lost: int
    diverged_a: int
    diverged_b: int
    mean_a: float | None
    mean_b: float | None
    difference: float | None
    ci: tuple[float, float] | None
    sd: float | None
    effect: float | None
    p: float | None
    p_holm: float | None = None

    @property
    def significant(self) -> bool:
        """Whether the adjusted p is below 0.05."""
        return self.p_holm is not None and self.p_holm < ALPHA

    @property
    def better(self) -> str | None:
        """The more accurate norm where that is significant. Of a slope there is no better."""
        if not self.significant or self.difference is None or self.scope == "batch size":
            return None
        return self.a if self.difference > 0 else self.b

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        setting = {axis: dict(value) if axis == "regularization" else value for axis, value in self.setting}
        return {**asdict(self), "setting": setting, "ci": None if self.ci is None else list(self.ci),
                "significant": self.significant, "better": self.better}  # fmt: skip


@dataclass(frozen=True)
class Rank:
    """A norm's place: 1 + the number of norms that are significantly better overall, so norms may share one.

    rank   None where it has no result, or none of its comparisons could be tested
    mean, ci, n, settings  over the seeds, each averaged over the settings where every ranked norm has a score
    """

    norm: str
    rank: int | None
    worse_than: tuple[str, ...]
    mean: float | None
    ci: tuple[float, float] | None
    n: int
    settings: int
    diverged: int
    failed: int
    skipped: int

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {**asdict(self), "worse_than": list(self.worse_than), "ci": None if self.ci is None else list(self.ci)}


@dataclass(frozen=True)
class Crossing:
    """Norm × another axis: mean accuracy over the same seeds and other settings for all that have a score.

    cells  one entry a (level, norm): level, norm, mean, ci, n, diverged
    """

    axis: str
    levels: tuple[Any, ...]
    norms: tuple[str, ...]
    settings: int
    lost: int
    cells: tuple[tuple[Any, str, float | None, tuple[float, float] | None, int, int], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        keys = (self.axis, "norm", "mean", "ci", "n", "diverged")
        plain = [dict(zip(keys, cell, strict=True)) for cell in self.cells]
        for entry in plain:
            entry["ci"] = None if entry["ci"] is None else list(entry["ci"])
        return {"axis": self.axis, "settings": self.settings, "lost": self.lost, "cells": plain}


def table(results: Results) -> tuple[Row, ...]:
    """One row for each cell, its seeds pooled.

    >>> from normsurgeon.study.records import Outcome
    >>> runs = [Outcome(Cell("m", "d", seed=s), "done", correct=c, images=10) for s, c in enumerate((7, 8, 9))]
    >>> [(round(row.mean, 3), row.n) for row in table(Results("s", tuple(runs)))]
    [(0.8, 3)]
    """
    pooled = grid(results, tuple(axis for axis in AXES if axis != "seed"))
    rows = []
    for arm in pooled.arms:
        runs = [pooled.runs[(), arm, seed] for seed in pooled.seeds if ((), arm, seed) in pooled.runs]
        it = estimate([run.accuracy for run in runs if run.status == "done" and run.accuracy is not None])
        lost = {kind: sum(run.status == kind for run in runs) for kind in ("diverged", "failed", "skipped")}
        rows.append(Row(runs[0].cell, it.mean, it.ci, it.sd, it.n, **lost))
    return tuple(rows)


def comparisons(results: Results) -> tuple[Comparison, ...]:
    """Every two norms: overall, in their slope on the batch size, in each setting, at each norm's best learning rate.

    >>> from normsurgeon.study.records import Outcome
    >>> def run(norm, seed, right): return Outcome(Cell("m", "d", norm=norm, seed=seed), "done", None, right, 100)
    >>> runs = [run("bn", s, 80 + s) for s in range(4)] + [run("gn", s, 70 + 2 * s) for s in range(4)]
    >>> [(c.a, c.b, round(c.difference, 3), c.n, round(c.p_holm, 4)) for c in comparisons(Results("s", tuple(runs)))]
    [('bn', 'gn', 0.085, 4, 0.0009)]
    """
    it = grid(results)
    made = list(_overall(it, "overall")) + list(_slopes(it))
    if len(it.settings) > 1:
        made += [c for setting in it.settings for c in _overall(replace(it, settings=(setting,)), "setting")]
    if best := best_rates(results):
        made += _overall(grid(at_best_rates(results, best)), "best lr")
    adjusted: dict[int, float | None] = {}
    for family in dict.fromkeys(_FAMILIES.values()):
        members = [i for i, c in enumerate(made) if _FAMILIES[c.scope] == family]
        adjusted |= zip(members, holm([made[i].p for i in members]), strict=True)
    return tuple(replace(c, p_holm=adjusted[i]) for i, c in enumerate(made))


def ranking(results: Results, compared: Sequence[Comparison] | None = None) -> tuple[Rank, ...]:
    """The norms from the best to the worst; ``compared`` spares comparing them again."""
    it = grid(results)
    overall = [c for c in (comparisons(results) if compared is None else compared) if c.scope == "overall"]
    scored = [arm for arm in it.arms if any(run[1] == arm and score(o) is not None for run, o in it.runs.items())]
    block = complete(it, scored)
    ranks = []
    for arm in it.arms:
        (norm,) = arm
        runs = [outcome for (_, ran, _), outcome in it.runs.items() if ran == arm]
        mine = [c for c in overall if norm in (c.a, c.b)]
        above = tuple(c.better for c in mine if c.better not in (None, norm) and c.better is not None)
        known = arm in scored and (len(scored) == 1 or any(c.p is not None for c in mine))
        mean = estimate(_per_seed(it, block, arm)) if arm in scored else estimate([])
        lost = {kind: sum(run.status == kind for run in runs) for kind in ("diverged", "failed", "skipped")}
        ranks.append(
            Rank(
                norm, 1 + len(above) if known else None, above, mean.mean, mean.ci, mean.n, len(block.settings), **lost
            )
        )
    return tuple(sorted(ranks, key=lambda r: (r.rank is None, r.rank or 0, r.mean is None, -(r.mean or 0.0))))


def crossing(results: Results, axis: str) -> Crossing:
    """Accuracy by the axis' levels and the norms, with everything else averaged over alike."""
    it = grid(results, (axis, "norm"))
    scored = [arm for arm in it.arms if any(run[1] == arm and score(o) is not None for run, o in it.runs.items())]
    block = complete(it, scored)
    cells = []
    for arm in it.arms:
        mean = estimate(_per_seed(it, block, arm)) if arm in scored else estimate([])
        cells.append((*arm, mean.mean, mean.ci, mean.n, _diverged(it, block, arm)))
    levels = axis_order(axis, (arm[0] for arm in it.arms))
    norms = axis_order("norm", (arm[1] for arm in it.arms))
    return Crossing(axis, tuple(levels), tuple(norms), len(block.settings), block.lost, tuple(cells))


def _overall(it: Grid, scope: Scope) -> Iterator[Comparison]:
    for a, b in combinations(it.arms, 2):
        block = complete(it, (a, b))
        if block.settings or scope != "setting":
            yield _compared(it, scope, block, a, b, _per_seed(it, block, a), _per_seed(it, block, b))


def _slopes(it: Grid) -> Iterator[Comparison]:
    """The interaction norm × batch size: least-squares slopes on log2(batch size), within each context of at least
    two sizes, averaged over contexts."""
    for a, b in combinations(it.arms, 2):
        block = complete(it, (a, b))
        weights = _slope_weights(block.settings, it.settings)
        if weights:
            block = replace(block, settings=tuple(weights))
            lines = (_weighted(it, weights, block.seeds, arm) for arm in (a, b))
            yield _compared(it, "batch size", block, a, b, *lines)


def _slope_weights(settings: Iterable[Setting], tried: Iterable[Setting]) -> dict[Setting, float]:
    """What each setting's accuracy counts in the mean slope: (x − x̄) / Σ(x − x̄)², x = log2(batch size).

    Learning rates are matched between batch sizes by their place among those ``tried`` there.

    >>> sizes = [(("batch_size", n),) for n in (2, 4, 8)]
    >>> {dict(setting)["batch_size"]: weight for setting, weight in _slope_weights(sizes, sizes).items()}
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
    contexts = {context: sizes for context, sizes in contexts.items() if len(sizes) > 1}
    weights: dict[Setting, float] = {}
    for sizes in contexts.values():
        middle = math.fsum(sizes.values()) / len(sizes)
        spread = math.fsum((x - middle) ** 2 for x in sizes.values())
        weights |= {setting: (x - middle) / spread / len(contexts) for setting, x in sizes.items()}
    return weights


def _all_but(setting: Setting, *axes: str) -> Setting:
    return tuple(pair for pair in setting if pair[0] not in axes)


def _weighted(it: Grid, weights: dict[Setting, float], seeds: Sequence[int], arm: tuple[str]) -> list[float]:
    """One number a seed: the sum of the weighted scores."""
    return [math.fsum(w * (it.score(s, arm, seed) or 0.0) for s, w in weights.items()) for seed in seeds]


def _compared(
    it: Grid, scope: Scope, block: Block, a: tuple[str], b: tuple[str], of_a: Sequence[float], of_b: Sequence[float]
) -> Comparison:
    test = paired([x - y for x, y in zip(of_a, of_b, strict=True)])
    setting = it.settings[0] if scope == "setting" else ()
    counted = len(block.settings) * len(block.seeds)
    diverged = (_diverged(it, block, a), _diverged(it, block, b))
    means = (estimate(of_a).mean, estimate(of_b).mean)
    return Comparison(scope, *a, *b, setting, test.n, len(block.settings), counted, block.lost, *diverged, *means,
                      test.mean, test.ci, test.sd, test.effect, test.p)  # fmt: skip


def _per_seed(it: Grid, block: Block, arm: tuple[Any, ...]) -> list[float]:
    """One number a seed: the mean over the block's settings."""
    return [math.fsum(it.score(s, arm, seed) or 0.0 for s in block.settings) / len(block.settings)
            for seed in block.seeds]  # fmt: skip


def _diverged(it: Grid, block: Block, arm: tuple[Any, ...]) -> int:
    runs = [it.runs[s, arm, seed] for s in block.settings for seed in block.seeds if (s, arm, seed) in it.runs]
    return sum(run.status == "diverged" for run in runs)
