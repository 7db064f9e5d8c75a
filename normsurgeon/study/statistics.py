"""The study's numbers: a table over seeds, paired comparisons of norms, a ranking, and tables of norm × axis.

Seeds are the replicates. Runs at different batch sizes with the same seed share their initial weights and their
images, so they are averaged before anything is tested, and n is the number of seeds. docs/study.md has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from normsurgeon.study.estimates import estimate, holm, paired
from normsurgeon.study.pairing import Arranged, Block, Setting, arranged, axis_order, complete, diverged_runs, per_seed
from normsurgeon.study.quantities import Comparison, Crossing, Finished, Rank, Row, Scope
from normsurgeon.study.rates import at_best_rates, best_rates
from normsurgeon.study.records import AXES, Results
from normsurgeon.study.slopes import slope_weights

_FAMILIES: dict[str, str] = {"overall": "study", "batch size": "study", "setting": "setting", "best lr": "best lr"}


def table(results: Results) -> tuple[Row, ...]:
    """One row for each cell, its seeds pooled.

    >>> from normsurgeon.study.records import Cell, Outcome
    >>> runs = [Outcome(Cell("m", "d", seed=s), "done", correct=c, images=10) for s, c in enumerate((7, 8, 9))]
    >>> [(round(row.mean, 3), row.n) for row in table(Results("s", tuple(runs)))]
    [(0.8, 3)]
    """
    pooled = arranged(results, tuple(axis for axis in AXES if axis != "seed"))
    rows = []
    for arm in pooled.arms:
        runs = [pooled.runs[(), arm, seed] for seed in pooled.seeds if ((), arm, seed) in pooled.runs]
        it = estimate([run.accuracy for run in runs if run.status == "done" and run.accuracy is not None])
        lost = {kind: sum(run.status == kind for run in runs) for kind in ("diverged", "failed", "skipped")}
        rows.append(Row(runs[0].cell, it.mean, it.ci, it.sd, it.n, **lost))
    return tuple(rows)


def comparisons(results: Results) -> tuple[Comparison, ...]:
    """Every two norms: overall, in their slope on the batch size, in each setting, at each norm's best learning rate.

    >>> from normsurgeon.study.records import Cell, Outcome
    >>> def run(norm, seed, right): return Outcome(Cell("m", "d", norm=norm, seed=seed), "done", None, right, 100)
    >>> runs = [run("bn", s, 80 + s) for s in range(4)] + [run("gn", s, 70 + 2 * s) for s in range(4)]
    >>> [(c.a, c.b, round(c.difference, 3), c.n, round(c.p_holm, 4)) for c in comparisons(Results("s", tuple(runs)))]
    [('bn', 'gn', 0.085, 4, 0.0009)]
    """
    it = arranged(results)
    made = list(_overall(it, "overall")) + list(_slopes(it))
    if len(it.settings) > 1:
        made += [c for setting in it.settings for c in _overall(replace(it, settings=(setting,)), "setting")]
    if best := best_rates(results):
        made += _overall(arranged(at_best_rates(results, best)), "best lr")
    adjusted: dict[int, float | None] = {}
    for family in dict.fromkeys(_FAMILIES.values()):
        members = [i for i, c in enumerate(made) if _FAMILIES[c.scope] == family]
        adjusted |= zip(members, holm([made[i].p for i in members]), strict=True)
    return tuple(replace(c, p_holm=adjusted[i]) for i, c in enumerate(made))


def ranking(results: Results, compared: Sequence[Comparison] | None = None) -> tuple[Rank, ...]:
    """The norms from the best to the worst; ``compared`` spares comparing them again."""
    it = arranged(results)
    overall = [c for c in (comparisons(results) if compared is None else compared) if c.scope == "overall"]
    scored = it.scored
    block = complete(it, scored)
    ranks = []
    for arm in it.arms:
        (norm,) = arm
        runs = [outcome for (_, ran, _), outcome in it.runs.items() if ran == arm]
        mine = [c for c in overall if norm in (c.a, c.b)]
        above = tuple(c.better for c in mine if c.better not in (None, norm) and c.better is not None)
        known = arm in scored and (len(scored) == 1 or any(c.p is not None for c in mine))
        mean = estimate(per_seed(it, block, arm)) if arm in scored else estimate([])
        lost = {kind: sum(run.status == kind for run in runs) for kind in ("diverged", "failed", "skipped")}
        ranks.append(
            Rank(
                norm, 1 + len(above) if known else None, above, mean.mean, mean.ci, mean.n, len(block.settings), **lost
            )
        )
    return tuple(sorted(ranks, key=lambda r: (r.rank is None, r.rank or 0, r.mean is None, -(r.mean or 0.0))))


def crossing(results: Results, axis: str) -> Crossing:
    """Accuracy by the axis' levels and the norms, with everything else averaged over alike."""
    it = arranged(results, (axis, "norm"))
    scored = it.scored
    block = complete(it, scored)
    cells = []
    for arm in it.arms:
        mean = estimate(per_seed(it, block, arm)) if arm in scored else estimate([])
        cells.append((*arm, mean.mean, mean.ci, mean.n, diverged_runs(it, block, arm)))
    levels = axis_order(axis, (arm[0] for arm in it.arms))
    norms = axis_order("norm", (arm[1] for arm in it.arms))
    return Crossing(axis, tuple(levels), tuple(norms), len(block.settings), block.lost, tuple(cells))


def _overall(it: Arranged, scope: Scope) -> Iterator[Comparison]:
    """Each seed's scores averaged over the settings."""
    for a, b in combinations(it.scored, 2):
        made = _compared(it, scope, a, b)
        if made.n or scope != "setting":
            yield made


def _slopes(it: Arranged) -> Iterator[Comparison]:
    """The interaction norm × batch size: least-squares slopes on log2(batch size), within each context of at least
    two sizes, averaged over contexts."""
    made = (_compared(it, "batch size", a, b) for a, b in combinations(it.scored, 2))
    return (comparison for comparison in made if comparison.n)


def _compared(it: Arranged, scope: Scope, a: tuple[str], b: tuple[str]) -> Comparison:
    block, of_a, of_b = _lines(it, scope, a, b)
    test = paired([x - y for x, y in zip(of_a, of_b, strict=True)])
    mean_a, mean_b = estimate(of_a), estimate(of_b)
    diverged_a, diverged_b = diverged_runs(it, block, a), diverged_runs(it, block, b)
    finished = None
    if diverged_a or diverged_b:
        part, x, y = _lines(replace(it, finished_only=True), scope, a, b)
        left = estimate([one - other for one, other in zip(x, y, strict=True)])
        finished = Finished(left.mean, left.ci, left.n, len(part.settings))
    return Comparison(
        scope, *a, *b, it.settings[0] if scope == "setting" else (), test.n, len(block.settings),
        len(block.settings) * len(block.seeds), block.lost, diverged_a, diverged_b, mean_a.mean, mean_b.mean, mean_a.ci,
        mean_b.ci, test.mean, test.ci, test.sd, test.effect, test.p, finished=finished,
    )  # fmt: skip


def _lines(it: Arranged, scope: Scope, a: tuple[str], b: tuple[str]) -> tuple[Block, list[float], list[float]]:
    """What a comparison is made on, and one number a seed for both norms."""
    block = complete(it, (a, b))
    if scope != "batch size":
        return block, per_seed(it, block, a), per_seed(it, block, b)
    weights = slope_weights(block.settings, it.settings)
    if not weights:
        return Block((), (), block.lost + len(block.settings) * len(block.seeds)), [], []
    unused = (len(block.settings) - len(weights)) * len(block.seeds)
    block = Block(tuple(weights), block.seeds, block.lost + unused)
    return block, _weighted(it, weights, block.seeds, a), _weighted(it, weights, block.seeds, b)


def _weighted(it: Arranged, weights: dict[Setting, float], seeds: Sequence[int], arm: tuple[str]) -> list[float]:
    """One number a seed: the sum of the weighted scores."""
    return [math.fsum(w * (it.score(s, arm, seed) or 0.0) for s, w in weights.items()) for seed in seeds]
