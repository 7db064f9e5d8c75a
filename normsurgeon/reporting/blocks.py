"""Numbers as characters: sparklines, bars and matrices for a terminal or a pipe."""

from __future__ import annotations

import math
from collections.abc import Sequence

from normsurgeon.reporting.records import Matrix

RAMP = "▁▂▃▄▅▆▇█"
ASCII_RAMP = "_.-=+*#@"
EIGHTHS = " ▏▎▍▌▋▊▉█"

VIRIDIS = (
    (68, 1, 84), (72, 36, 117), (65, 68, 135), (53, 95, 141), (42, 120, 142), (33, 145, 140), (34, 168, 132),
    (68, 191, 112), (122, 209, 81), (189, 223, 38), (253, 231, 37),
)  # fmt: skip

Values = Sequence[float | None]


def sparkline(values: Values, width: int, log: bool = False, ramp: str = RAMP) -> str:
    """One character a value, or the mean of neighbours where there are more values than ``width``.

    >>> sparkline([0, 1, None, 3], 10)
    '▁▃ █'
    >>> sparkline([1, 10, 100, 100], 2, log=True)
    '▁█'
    """
    if log:
        values = [math.log(v) if v is not None and v > 0 else None for v in values]
    pooled = [mean(part) for part in _parts(values, width)]
    known = [v for v in pooled if v is not None]
    if not known:
        return " " * len(pooled)
    low, span = min(known), (max(known) - min(known)) or 1.0
    last = len(ramp) - 1
    return "".join(" " if v is None else ramp[min(last, int((v - low) / span * len(ramp)))] for v in pooled)


def bar(value: float, most: float, width: int, solid: str = "") -> str:
    """A bar of ``value / most`` of the width, in eighths of a character (or of ``solid`` ones).

    >>> bar(3, 8, 2), bar(8, 8, 2), bar(1, 2, 4, "#")
    ('▊', '██', '##')
    """
    eighths = round(8 * width * min(1.0, abs(value) / most)) if most > 0 else 0
    if solid:
        return solid * round(eighths / 8)
    return (EIGHTHS[8] * (eighths // 8) + EIGHTHS[eighths % 8]).strip()


def extent(values: Values) -> tuple[float | None, float | None]:
    """The least and the greatest of the values that there are."""
    known = [v for v in values if v is not None]
    return (min(known), max(known)) if known else (None, None)


def shrunk(values: Matrix, rows: int, columns: int) -> Matrix:
    """The matrix with at most so many rows and columns: means of neighbouring cells."""
    narrow = [[mean(part) for part in _parts(tuple(map(_finite, row)), columns)] for row in values]
    across = [tuple(mean(part) for part in _parts(column, rows)) for column in zip(*narrow, strict=True)]
    return tuple(zip(*across, strict=True))


def digit(value: float | None) -> str:
    """A similarity as one character: tenths, 9 for 0.9 and above, a dot for no value.

    >>> "".join(digit(v) for v in (None, -0.1, 0.05, 0.51, 1.0))
    '·0059'
    """
    return "·" if value is None else str(max(0, min(9, int(value * 10))))


def colour(value: float) -> tuple[int, int, int]:
    """Viridis, from 0 to 1."""
    place = max(0.0, min(1.0, value)) * (len(VIRIDIS) - 1)
    low = min(int(place), len(VIRIDIS) - 2)
    return tuple(round(a + (b - a) * (place - low)) for a, b in zip(VIRIDIS[low], VIRIDIS[low + 1], strict=True))  # type: ignore[return-value]


def mean(values: Values) -> float | None:
    """Of the values that there are; None when there are none."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _parts(values: Sequence[float | None], most: int) -> list[Sequence[float | None]]:
    """At most ``most`` runs of neighbours, of lengths that differ by at most one."""
    count = max(1, min(most, len(values))) if values else 0
    return [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
