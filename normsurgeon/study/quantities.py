"""What an answer is made of: rows of the table, comparisons, ranks, crossed tables. Plain types only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from normsurgeon.study.pairing import Setting
from normsurgeon.study.records import Cell

ALPHA = 0.05
Scope = Literal["overall", "batch size", "setting", "best lr"]


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
class Finished:
    """A difference without the diverged runs, over ``n`` seeds and ``settings``."""

    difference: float | None
    ci: tuple[float, float] | None
    n: int
    settings: int

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {**asdict(self), "ci": None if self.ci is None else list(self.ci)}


@dataclass(frozen=True)
class Comparison:
    """Norm ``a`` minus norm ``b``, paired by seed; a diverged run counts as 0 right (``pairing.score``).

    scope       ``overall``: each seed's differences averaged over the settings; ``batch size``: each seed's slope of
                the difference on log2(batch size), averaged over the rest; ``setting``: within one; ``best lr``:
                overall, at the learning rate that each norm does best with on these same images
    setting     what is held equal, of the axes that vary; () but for ``setting``
    n           seeds; ``settings`` averaged over; ``pairs`` of runs used; ``lost``: pairs of the grid that are not
    diverged_a, diverged_b  diverged runs among the pairs used
    mean_a, mean_b, ci_a, ci_b  of each norm's per-seed numbers: accuracies, or accuracy per doubling of the batch size
    difference, ci, sd          of their differences
    effect      Hedges' g_z; None where it has no value
    finished    the difference where both runs finished, if any diverged; tests and claims do not use it
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
    ci_a: tuple[float, float] | None
    ci_b: tuple[float, float] | None
    difference: float | None
    ci: tuple[float, float] | None
    sd: float | None
    effect: float | None
    p: float | None
    p_holm: float | None = None
    finished: Finished | None = None

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
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}
        finished = None if self.finished is None else self.finished.to_dict()
        return {
            **plain,
            "setting": setting,
            "finished": finished,
            "significant": self.significant,
            "better": self.better,
        }


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
