"""Means, intervals and paired tests of a handful of numbers, whose order does not matter: sums are exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scipy import stats

Interval = tuple[float, float]

ALPHA = 0.05
MIN_REPLICATES = 3
"""Below this nothing is tested: two points have a spread of one degree of freedom."""
_EQUAL = 1e-12  # differences of fractions closer than this are the same but for rounding


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` replicates. ``ci`` is None if n is 1 or all numbers are the same.

    effect, p  of ``paired`` alone; None if n < 3
    """

    mean: float | None
    ci: Interval | None
    sd: float | None
    n: int
    effect: float | None = None
    p: float | None = None


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, Student-t interval mean ± t(0.975; n − 1) · sd / √n, and sd with n − 1.

    >>> [round(x, 3) for x in estimate([0.5, 0.6, 0.7]).ci or ()]
    [0.352, 0.848]
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
    low, high = stats.t.interval(1 - ALPHA, n - 1, loc=mean, scale=sd / math.sqrt(n))
    return Estimate(mean, (float(low), float(high)), sd, n)


def estimate_share(values: Sequence[float]) -> Estimate:
    """``estimate`` of fractions, with an interval that stays within 0 and 1.

    Wilson's (1927) for m successes' share of ν trials, with the number of trials that have the replicates' standard
    error, ν = m (1 − m) n / s², and Student's quantile: as for proportions of clustered samples (Korn & Graubard, 1998,
    Survey Methodology 24, 193-201). Where the interval is narrow it is nearly Student's.

    >>> [round(x, 3) for x in estimate_share([0.99, 0.994]).ci or ()]
    [0.911, 0.999]
    >>> [round(x, 3) for x in estimate_share([0.5, 0.51, 0.52]).ci or ()]
    [0.485, 0.535]
    """
    it = estimate(values)
    if it.ci is None or it.mean is None or it.sd is None or not 0 < it.mean < 1:
        return it
    quantile = float(stats.t.ppf(1 - ALPHA / 2, it.n - 1))
    share = quantile**2 * it.sd**2 / (it.n * it.mean * (1 - it.mean))  # t² / ν
    middle = (it.mean + share / 2) / (1 + share)
    half = math.sqrt(share * it.mean * (1 - it.mean) + share**2 / 4) / (1 + share)
    return replace(it, ci=(max(0.0, middle - half), min(1.0, middle + half)))


def paired(differences: Sequence[float]) -> Estimate:
    """The two-sided paired t test, and Hedges' g_z: Cohen's d_z = mean / sd, corrected by ``hedges``.

    Differences that are all the same have no spread to measure against. All 0: p = 1. All the same and not 0: the
    exact sign-flip test, p = 2 / 2^n (every sign may as well have been the other; Fisher, 1935).

    >>> round(paired([0.01, 0.02, 0.06]).p or 0.0, 4)
    0.1885
    >>> paired([0.25, 0.25, 0.25]).p, paired([0.0, 0.0, 0.0]).p, paired([0.1, 0.2]).p
    (0.25, 1.0, None)
    """
    it = estimate(differences)
    if it.n < MIN_REPLICATES or it.mean is None or it.sd is None:
        return it
    if it.sd == 0:
        same = abs(it.mean) < _EQUAL
        return replace(it, effect=0.0 if same else None, p=1.0 if same else 2.0 ** (1 - it.n))
    p = float(2 * stats.t.sf(abs(it.mean) / (it.sd / math.sqrt(it.n)), it.n - 1))
    return replace(it, effect=it.mean / it.sd * hedges(it.n - 1), p=min(1.0, p))


def hedges(df: int) -> float:
    """Hedges' correction J = Γ(df/2) / (√(df/2) · Γ((df − 1)/2)), which makes d unbiased (Hedges, 1981).

    >>> round(hedges(4), 4), round(hedges(100), 4)
    (0.7979, 0.9925)
    """
    return math.exp(math.lgamma(df / 2) - math.lgamma((df - 1) / 2)) / math.sqrt(df / 2) if df > 1 else 0.0


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


# In words


def points(difference: float | None, signed: bool = False, digits: int | None = None) -> str:
    """A difference of fractions in percentage points: one decimal, two if one would show nothing.

    >>> points(0.1234), points(-0.0004), points(0.02, signed=True), points(None)
    ('12.3', '−0.04', '+2.0', '–')
    """
    if difference is None:
        return "–"
    digits = (1 if abs(difference) >= 0.0005 else 2) if digits is None else digits
    text = f"{abs(100 * difference):.{digits}f}"
    if float(text) == 0:
        return text
    return f"{'−' if difference < 0 else '+' if signed else ''}{text}"


def interval(ci: Interval | None, flip: bool = False) -> str:
    """A confidence interval in points; ``flip`` for the difference the other way round.

    >>> interval((-0.0001, 0.1)), interval((0.01, 0.02), flip=True), interval(None)
    ('95 % CI 0.0 to 10.0', '95 % CI −2.0 to −1.0', 'no interval')
    """
    if ci is None:
        return "no interval"
    low, high = (-ci[1], -ci[0]) if flip else ci
    digits = 1 if max(abs(low), abs(high)) >= 0.005 else 2
    return f"95 % CI {points(low, digits=digits)} to {points(high, digits=digits)}"


def effect(g: float | None) -> str:
    """An effect size with two decimals."""
    return "–" if g is None else f"{g:.2f}".replace("-", "−")


def probability(p: float | None) -> str:
    """A p value with its sign of equality, never rounded to 0.

    >>> probability(0.0321), probability(0.00001), probability(0.5), probability(None)
    ('= 0.032', '< 0.0001', '= 0.50', '–')
    """
    if p is None:
        return "–"
    if p < 0.0001:
        return "< 0.0001"
    if p < 0.01:
        return f"= {p:.4f}".rstrip("0")
    return f"= {p:.2f}" if p >= 0.0995 else f"= {p:.3f}"
