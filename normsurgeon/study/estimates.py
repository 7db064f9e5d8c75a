"""Means, intervals and paired tests of a handful of numbers: pure arithmetic, nothing of studies.

Sums are exactly rounded (``math.fsum``), so that the order of the numbers never shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import special

LEVEL = 0.95
FEWEST = 3
"""Replicates below which nothing is tested: two points have a spread of one degree of freedom."""
_EQUAL = 1e-12  # differences of fractions closer than this are the same but for rounding


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` replicates. ``ci`` is None where n is 1 or all numbers are the same."""

    mean: float | None
    ci: tuple[float, float] | None
    sd: float | None
    n: int


@dataclass(frozen=True)
class Paired:
    """A mean difference over ``n`` pairs, and the paired t test of its being 0.

    effect  Hedges' g_z: Cohen's d_z = mean / sd of the differences (Cohen, 1988), times Hedges' (1981) exact
            small-sample correction; None where n < 3 or the differences do not vary around something else than 0
    p       two-sided; None where n < 3
    """

    mean: float | None
    ci: tuple[float, float] | None
    sd: float | None
    n: int
    effect: float | None
    p: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, Student-t interval mean ± t(0.975; n − 1) · sd / √n, and sd with n − 1.

    >>> [round(x, 3) for x in estimate([0.5, 0.6, 0.7]).ci or ()]
    [0.352, 0.848]
    >>> estimate([0.5])
    Estimate(mean=0.5, ci=None, sd=None, n=1)
    """
    n = len(values)
    if n == 0:
        return Estimate(None, None, None, 0)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, None, 1)
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    if sd < _EQUAL:
        return Estimate(mean, None, 0.0, n)
    half = float(special.stdtrit(n - 1, 0.5 + LEVEL / 2)) * sd / math.sqrt(n)
    return Estimate(mean, (mean - half, mean + half), sd, n)


def paired(differences: Sequence[float]) -> Paired:
    """The paired t test, t = mean / (sd / √n) with n − 1 degrees of freedom, and the effect size.

    Differences that are all the same have no spread to measure against. All 0: p = 1. All the same and not 0: the
    exact sign-flip test, p = 2 / 2^n (every sign may as well have been the other; Fisher, 1935).

    >>> round(paired([0.01, 0.02, 0.06]).p or 0.0, 4)
    0.1885
    >>> paired([0.25, 0.25, 0.25]).p, paired([0.0, 0.0, 0.0]).p, paired([0.1, 0.2]).p
    (0.25, 1.0, None)
    """
    it = estimate(differences)
    if it.n < FEWEST or it.mean is None or it.sd is None:
        return Paired(it.mean, it.ci, it.sd, it.n, None, None)
    if it.sd == 0:
        same = abs(it.mean) < _EQUAL
        return Paired(it.mean, None, 0.0, it.n, 0.0 if same else None, 1.0 if same else 2.0 ** (1 - it.n))
    t = it.mean / (it.sd / math.sqrt(it.n))
    p = min(1.0, 2 * float(special.stdtr(it.n - 1, -abs(t))))
    return Paired(it.mean, it.ci, it.sd, it.n, it.mean / it.sd * hedges(it.n - 1), p)


def hedges(df: int) -> float:
    """Hedges' correction J = Γ(df/2) / (√(df/2) · Γ((df − 1)/2)), which makes d unbiased (Hedges, 1981).

    >>> round(hedges(4), 4), round(hedges(100), 4)
    (0.7979, 0.9925)
    """
    if df < 2:
        return 0.0
    return math.exp(math.lgamma(df / 2) - math.lgamma((df - 1) / 2)) / math.sqrt(df / 2)


def holm(p_values: Sequence[float | None]) -> tuple[float | None, ...]:
    """Holm's step-down adjustment (Holm, 1979): the probability of any false claim in the family is at most the level.

    Of the k-th smallest of m: the greatest of (m − j + 1) · p_(j) over j ≤ k, at most 1. None stays None and is not
    counted.

    >>> holm([0.01, 0.04, None, 0.03])
    (0.03, 0.06, None, 0.06)
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        adjusted[i] = highest
    return tuple(adjusted)
