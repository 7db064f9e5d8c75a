"""The results arranged as settings × arms × seeds, and the largest complete part of it.

An *arm* is what is compared (a norm; or a norm with a batch size), a *setting* all that is held equal, and a *seed*
the replicate. What is averaged over settings is averaged over the same settings and seeds for every arm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normsurgeon.norms.target_names import TARGET_NAMES
from normsurgeon.study.records import Cell, Outcome, Results

Setting = tuple[tuple[str, Any], ...]
"""(axis, value) pairs, of the axes that vary."""

_NORMS = ("bn", *TARGET_NAMES)
LR_LEVEL = "lr level"
"""Stands for the learning rate where batch sizes are compared: the k-th of those tried at that batch size."""


def score(outcome: Outcome) -> float | None:
    """A run's worth in a comparison: its accuracy; 0 where it diverged, for such a network answers nothing right.

    Leaving diverged runs out would let a norm gain by its failures; the worst outcome stands in, as in trials where
    patients die (Lachin, 1999). None where there is nothing to compare: failed, skipped.

    >>> score(Outcome(Cell("m", "d"), "diverged")), score(Outcome(Cell("m", "d"), "done", correct=3, images=4))
    (0.0, 0.75)
    """
    if outcome.status == "diverged":
        return 0.0
    return outcome.accuracy if outcome.status == "done" else None


@dataclass(frozen=True)
class Arranged:
    """Every run's score, by setting, arm and seed; None where it has none.

    finished_only  whether a diverged run has no score rather than 0
    """

    settings: tuple[Setting, ...]
    arms: tuple[tuple[Any, ...], ...]
    seeds: tuple[int, ...]
    runs: Mapping[tuple[Setting, tuple[Any, ...], int], Outcome]
    finished_only: bool = False

    def score(self, setting: Setting, arm: tuple[Any, ...], seed: int) -> float | None:
        """The run's score, or None."""
        outcome = self.runs.get((setting, arm, seed))
        if outcome is None or (self.finished_only and outcome.status == "diverged"):
            return None
        return score(outcome)

    @property
    def scored(self) -> tuple[tuple[Any, ...], ...]:
        """The arms that have any score."""
        known = {key[1] for key in self.runs if self.score(*key) is not None}
        return tuple(arm for arm in self.arms if arm in known)


@dataclass(frozen=True)
class Block:
    """Settings and seeds for which every one of ``arms`` has a score. ``lost``: seed-setting units not in it."""

    settings: tuple[Setting, ...]
    seeds: tuple[int, ...]
    lost: int


def setting_axes(results: Results) -> tuple[str, ...]:
    """The axes that tell settings apart: those that vary, but for the norm, and the learning rate where other axes
    determine it (as when it is scaled by the batch size)."""
    return tuple(a for a in results.varying() if a != "norm" and (a != "lr" or rates_are_tried(results)))


def rates_are_tried(results: Results) -> bool:
    """Whether cells differ in the learning rate alone."""
    cells = {_without(outcome.cell, "lr", "seed"): outcome.cell.lr for outcome in results.outcomes}
    return any(cells[_without(outcome.cell, "lr", "seed")] != outcome.cell.lr for outcome in results.outcomes)


def arranged(results: Results, arms: Sequence[str] = ("norm",)) -> Arranged:
    """The results with these axes as arms, in an order that does not depend on the cells' order.

    >>> cells = [Cell("resnet8", "digits", norm=norm, batch_size=size) for norm in ("gn", "bn") for size in (8, 2)]
    >>> made = arranged(Results("s", tuple(Outcome(cell, "done", correct=1, images=2) for cell in cells)))
    >>> made.arms, made.settings
    ((('bn',), ('gn',)), ((('batch_size', 2),), (('batch_size', 8),)))
    """
    axes = [axis for axis in setting_axes(results) if axis not in arms]
    levels = _rate_levels(results) if "lr" in axes and "batch_size" in arms else {}
    runs = {}
    for outcome in results.outcomes:
        cell = outcome.cell
        setting = tuple(
            (LR_LEVEL, levels[_without(cell, "lr", "seed", "norm")].index(cell.lr)) if axis == "lr" and levels
            else (axis, getattr(cell, axis))
            for axis in axes
        )  # fmt: skip
        runs[setting, tuple(getattr(cell, axis) for axis in arms), cell.seed] = outcome
    return Arranged(
        tuple(sorted({key[0] for key in runs}, key=lambda setting: [_order(*pair) for pair in setting])),
        tuple(sorted({key[1] for key in runs}, key=lambda arm: [_order(*p) for p in zip(arms, arm, strict=True)])),
        tuple(sorted({key[2] for key in runs})),
        runs,
    )


def complete(it: Arranged, arms: Sequence[tuple[Any, ...]]) -> Block:
    """Settings and seeds in which all of these arms have a score.

    Where some are missing, the setting or the seed with the greatest share of gaps is left out, all that are tied
    at once, a setting rather than a seed, until there are no gaps: n stays as large as can be.
    """
    units = {
        (setting, seed): all(it.score(setting, arm, seed) is not None for arm in arms)
        for setting in it.settings
        for seed in it.seeds
        if any((setting, arm, seed) in it.runs for arm in arms)
    }
    settings = [s for s in it.settings if any(units.get((s, seed)) for seed in it.seeds)]
    seeds = [seed for seed in it.seeds if any(units.get((s, seed)) for s in settings)]
    while settings and seeds:
        by_setting = {s: sum(not units.get((s, seed)) for seed in seeds) / len(seeds) for s in settings}
        by_seed = {seed: sum(not units.get((s, seed)) for s in settings) / len(settings) for seed in seeds}
        worst_setting, worst_seed = max(by_setting.values()), max(by_seed.values())
        if worst_setting == 0:
            break
        if worst_setting >= worst_seed:
            settings = [s for s in settings if by_setting[s] < worst_setting]
        else:
            seeds = [seed for seed in seeds if by_seed[seed] < worst_seed]
    kept = len(settings) * len(seeds) if settings and seeds else 0
    return Block(tuple(settings) if kept else (), tuple(seeds) if kept else (), len(units) - kept)


def per_seed(it: Arranged, block: Block, arm: tuple[Any, ...]) -> list[float]:
    """One number a seed: an arm's mean over the block's settings."""
    return [math.fsum(it.score(s, arm, seed) or 0.0 for s in block.settings) / len(block.settings)
            for seed in block.seeds]  # fmt: skip


def diverged_runs(it: Arranged, block: Block, arm: tuple[Any, ...]) -> int:
    """How many of an arm's runs in the block diverged."""
    runs = [it.runs[s, arm, seed] for s in block.settings for seed in block.seeds if (s, arm, seed) in it.runs]
    return sum(run.status == "diverged" for run in runs)


def norm_order(norm: str) -> tuple[int, str, int]:
    """BatchNorm first, then the targets as the catalogue lists them, then by groups.

    >>> sorted(["ln", "gn:16", "gn:8", "gn", "bn"], key=norm_order)
    ['bn', 'gn', 'gn:8', 'gn:16', 'ln']
    """
    name, _, groups = norm.partition(":")
    place = _NORMS.index(name) if name in _NORMS else len(_NORMS)
    return place, name, int(groups) if groups.isdigit() else 0


def axis_order(axis: str, values: Iterable[Any]) -> list[Any]:
    """An axis' different values, in the order in which tables list them."""
    return sorted(set(values), key=lambda value: _order(axis, value))


def _order(axis: str, value: Any) -> tuple[Any, ...]:
    if axis == "norm":
        return norm_order(value)
    first = value in ("default", "none", "scratch", ())  # the plain one
    return (not first, value)


def _without(cell: Cell, *axes: str) -> tuple[Any, ...]:
    return tuple(value for axis, value in vars(cell).items() if axis not in axes)


def _rate_levels(results: Results) -> dict[tuple[Any, ...], list[float]]:
    """The learning rates tried at each point of the other axes, in order."""
    rates: dict[tuple[Any, ...], set[float]] = {}
    for outcome in results.outcomes:
        rates.setdefault(_without(outcome.cell, "lr", "seed", "norm"), set()).add(outcome.cell.lr)
    return {key: sorted(values) for key, values in rates.items()}
