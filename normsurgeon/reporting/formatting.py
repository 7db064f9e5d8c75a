"""Numbers in words: three significant digits, a dash for what has no value."""

from __future__ import annotations

import math
from typing import Any

DASH = "–"


def has_value(value: Any) -> bool:
    """Whether there is something to show: a finite number, or a text that is not empty."""
    if isinstance(value, float):
        return math.isfinite(value)
    return value is not None and value != ""


def significant(value: float | None, digits: int = 3) -> str:
    """A number to three significant digits, as short as can be.

    >>> [significant(v) for v in (0.123456, 9.996, 1234.5, 12345.0, -2.5e-5, 0, None, float("nan"))]
    ['0.123', '10.0', '1234', '1.23e4', '-2.50e-5', '0', '–', '–']
    """
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if -3 <= int(exponent) < 4:
        return f"{value:.{max(0, digits - 1 - int(exponent))}f}"
    return f"{mantissa}e{int(exponent)}"


def exact(value: float | None) -> str:
    """A number that may be a count: whole ones whole, others to three digits.

    >>> exact(3.0), exact(0.61234), exact(None)
    ('3', '0.612', '–')
    """
    whole = value is not None and abs(value) < 1e6 and value == int(value)
    return str(int(value)) if whole and value is not None else significant(value)


def percent(value: float | None) -> str:
    """A fraction as a percentage with one decimal.

    >>> percent(0.9345), percent(0.0), percent(None)
    ('93.5 %', '0.0 %', '–')
    """
    return DASH if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def shown(value: Any) -> str:
    """Any plain value as a short text: floats to three digits, whole numbers whole.

    >>> shown(0.12345), shown(25088), shown((64, 7, 7)), shown(None), shown(True)
    ('0.123', '25088', '64 × 7 × 7', '–', 'yes')
    """
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return significant(value)
    if isinstance(value, (list, tuple)):
        return " × ".join(shown(inner) for inner in value) or DASH
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(inner)}" for key, inner in value.items()) or DASH
    return str(value)


def in_brief(value: Any, most: int = 3) -> str:
    """A value of any size in a few words: of a long list the first entries, of many numbers the range.

    >>> in_brief(["a", "b", "c", "d", "e"]), in_brief({"a": 0.25, "b": 3.0, "c": 1.0, "d": None}), in_brief({})
    ('a, b, c and 2 more', '0.250 to 3.00 (3 values)', '')
    """
    if isinstance(value, dict):
        numbers = [x for x in value.values() if isinstance(x, (int, float)) and math.isfinite(x)]
        if len(value) > most and numbers:
            return f"{significant(min(numbers))} to {significant(max(numbers))} ({len(numbers)} values)"
        value = [f"{key}: {shown(inner)}" for key, inner in value.items()]
    if isinstance(value, (list, tuple)):
        rest = f" and {len(value) - most} more" if len(value) > most else ""
        return ", ".join(shown(entry) for entry in value[:most]) + rest
    return shown(value)


def plural(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun.

    >>> plural(1, "layer"), plural(3, "layer")
    ('1 layer', '3 layers')
    """
    return f"{number} {one if number == 1 else many or one + 's'}"


def short_name(name: str, width: int) -> str:
    """A layer's name in at most ``width`` characters; the end, which tells layers apart, is kept longest.

    >>> short_name("layer4.2.downsample.conv1", 14), short_name("bn1", 14)
    ('lay…mple.conv1', 'bn1')
    """
    if len(name) <= width:
        return name
    if width <= 4:
        return name[-width:]
    head = (width - 1) // 4
    return f"{name[:head]}…{name[len(name) - (width - 1 - head) :]}"
