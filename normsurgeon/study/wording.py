"""How a study's values read: settings, differences in points, intervals, probabilities."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from normsurgeon.reporting.formatting import DASH
from normsurgeon.study.pairing import LR_LEVEL, Setting
from normsurgeon.study.records import Cell

TITLES = {
    "batch_size": "batch size", "lr": "learning rate", "preprocessing": "pre-processing", "dataset": "data set",
    LR_LEVEL: "learning rate",
}  # fmt: skip


def axis_title(axis: str) -> str:
    """An axis' name as a reader sees it.

    >>> axis_title("batch_size"), axis_title("norm")
    ('batch size', 'norm')
    """
    return TITLES.get(axis, axis)


def value_label(axis: str, value: Any) -> str:
    """One value as a reader sees it.

    >>> value_label("regularization", (("weight_decay", 0.0005),)), value_label("batch_size", 8)
    ('weight_decay=0.0005', '8')
    """
    if axis == LR_LEVEL:
        return f"no. {value + 1}"
    return Cell("", "", **{axis: value}).label(axis) if axis not in ("model", "dataset") else str(value)


def setting_label(setting: Setting) -> str:
    """A setting in words: values that speak for themselves bare, others with their axis.

    >>> setting_label((("model", "resnet8"), ("batch_size", 2), ("preprocessing", "none")))
    'resnet8, batch size 2, pre-processing none'
    """
    words = []
    for axis, value in setting:
        label = value_label(axis, value)
        bare = axis in ("model", "dataset") or label in ("scratch", "converted") or "=" in label
        words.append(label if bare else f"{axis_title(axis)} {label}")
    return ", ".join(words)


def rate_range(low: float, high: float) -> str:
    """Learning rates from one to another, both of them tried.

    >>> rate_range(0.03, 0.3), rate_range(0.1, 0.1)
    ('0.03 to 0.3', '0.1 alone')
    """
    return f"{low:g} alone" if low == high else f"{low:g} to {high:g}"


def points(difference: float | None, signed: bool = False, digits: int | None = None) -> str:
    """A difference of fractions in percentage points: one decimal, two where one would show nothing.

    >>> points(0.1234), points(-0.0004), points(0.02, signed=True), points(None)
    ('12.3', '−0.04', '+2.0', '–')
    """
    if difference is None:
        return DASH
    digits = (1 if abs(difference) >= 0.0005 else 2) if digits is None else digits
    text = f"{abs(100 * difference):.{digits}f}"
    if float(text) == 0:
        return text
    return f"{'−' if difference < 0 else '+' if signed else ''}{text}"


def interval(ci: tuple[float, float] | None, flip: bool = False) -> str:
    """A confidence interval in points; ``flip`` for the difference the other way round.

    >>> interval((-0.0001, 0.1)), interval((0.01, 0.02), flip=True), interval(None)
    ('95 % CI 0.0 to 10.0', '95 % CI −2.0 to −1.0', 'no interval')
    """
    if ci is None:
        return "no interval"
    low, high = (-ci[1], -ci[0]) if flip else ci
    digits = 1 if max(abs(low), abs(high)) >= 0.005 else 2
    return f"95 % CI {points(low, digits=digits)} to {points(high, digits=digits)}"


def plus_minus(ci: tuple[float, float] | None) -> str:
    """Half an interval's width in points.

    >>> plus_minus((0.5, 0.52)), plus_minus(None)
    ('± 1.0', '')
    """
    return "" if ci is None else f"± {points((ci[1] - ci[0]) / 2)}"


def effect(g: float | None) -> str:
    """An effect size with two decimals.

    >>> effect(-1.234), effect(None)
    ('−1.23', '–')
    """
    return DASH if g is None else f"{g:.2f}".replace("-", "−")


def probability(p: float | None) -> str:
    """A p value with its sign of equality, never rounded to 0.

    >>> probability(0.0321), probability(0.00001), probability(0.5), probability(None)
    ('= 0.032', '< 0.0001', '= 0.50', '–')
    """
    if p is None:
        return DASH
    if p < 0.0001:
        return "< 0.0001"
    if p < 0.01:
        return f"= {p:.4f}".rstrip("0")
    return f"= {p:.2f}" if p >= 0.0995 else f"= {p:.3f}"


def listed(words: Iterable[str], last: str = "and") -> str:
    """Words in a row.

    >>> listed(["bn"]), listed(["bn", "gn", "ln"])
    ('bn', 'bn, gn and ln')
    """
    *first, end = list(words)
    return f"{', '.join(first)} {last} {end}" if first else end
