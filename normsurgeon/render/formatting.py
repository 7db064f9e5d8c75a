"""Numbers in words: three significant digits, a dash for what has no value; and what is left of it in ASCII."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from normsurgeon.printable import printable
from normsurgeon.render.document import Finding, Form, Table, Value

DASH = "–"
RAMP = "▁▂▃▄▅▆▇█"
_ASCII = str.maketrans(
    dict(zip(RAMP, "_.-=+*#@", strict=True))
    | {"→": "->", "±": "+-", "…": "...", "−": "-", "–": "-", "·": ".", "×": "x", "²": "^2", "‖": "||"}
)


def as_ascii(text: str) -> str:
    """The signs that this package draws, in ASCII; names are left as they are.

    >>> as_ascii("0.93 → 0.97 ± 0.01")
    '0.93 -> 0.97 +- 0.01'
    """
    return text.translate(_ASCII)


def has_value(value: Any) -> bool:
    """Whether there is something to show: a finite number, or a text that is not empty."""
    if isinstance(value, float):
        return math.isfinite(value)
    return value is not None and value != ""


def significant(value: float | None) -> str:
    """A number to three significant digits, as short as can be.

    >>> [significant(v) for v in (0.123456, 9.996, 1234.5, 12345.0, -2.5e-5, 0, None, float("nan"))]
    ['0.123', '10.0', '1234', '1.23e4', '-2.50e-5', '0', '–', '–']
    """
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    if -3 <= int(exponent) < 4:
        return f"{value:.{max(0, 2 - int(exponent))}f}"
    return f"{mantissa}e{int(exponent)}"


def plus_minus(value: float | None, error: float | None) -> str:
    """A number and its error, where it has one.

    >>> plus_minus(0.5, 0.1), plus_minus(0.5, None)
    ('0.500 ± 0.100', '0.500')
    """
    return significant(value) + (f" ± {significant(error)}" if error is not None else "")


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


def in_form(value: Value, form: Form) -> str:
    """A value as a column of that form shows it; a text stays as it is.

    >>> in_form(0.5, "percent"), in_form(0.5, "number"), in_form(3, "count"), in_form("0.5 ± 0.1", "number")
    ('50.0 %', '0.500', '3', '0.5 ± 0.1')
    """
    if isinstance(value, str) or value is None or isinstance(value, bool):
        return shown(value)
    return percent(value) if form == "percent" else significant(value) if form == "number" else shown(value)


def used(table: Table) -> Table:
    """The table without the columns that hold no value."""
    kept = [i for i in range(len(table.columns)) if i == 0 or any(has_value(row[i]) for row in table.rows)]
    rows = tuple(tuple(row[i] for i in kept) for row in table.rows)
    return replace(table, columns=tuple(table.columns[i] for i in kept), rows=rows)


def cell_texts(table: Table) -> list[list[str]]:
    """Each row's cells in words, on one line each; where a text has no value, an empty one."""
    forms = [column.form for column in table.columns]
    return [
        [
            "" if form == "text" and value is None else printable(in_form(value, form), keep="")
            for value, form in zip(row, forms, strict=True)
        ]
        for row in table.rows
    ]


def number_in(value: Value) -> float | None:
    """A cell's number, or the one that its text begins with: what a table is sorted and shaded by.

    >>> number_in(0.5), number_in("± 1.2"), number_in("−0.5 *"), number_in("–")
    (0.5, 1.2, -0.5, None)
    """
    if isinstance(value, (int, float)):
        return float(value) if math.isfinite(value) else None
    found = re.search(r"-?\d+(\.\d+)?(e-?\d+)?", (value or "").replace("−", "-"))
    return float(found.group()) if found else None


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


def plural(number: int, one: str) -> str:
    """A number with its noun.

    >>> plural(1, "layer"), plural(3, "layer")
    ('1 layer', '3 layers')
    """
    return f"{number} {one if number == 1 else one + 's'}"


def duration(seconds: float) -> str:
    """Rounded as an estimate deserves.

    >>> duration(3.4), duration(60), duration(5000), duration(100_000)
    ('3 s', '1 minute', '83 minutes', '27.8 hours')
    """
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        minutes = round(seconds / 60)
        return f"{minutes} minute{'' if minutes == 1 else 's'}"
    return f"{seconds / 3600:.1f} hours"


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


def number_behind(finding: Finding) -> str:
    """The number behind a finding, with its name."""
    name = finding.metric.replace("_", " ")
    return f"{name} {exact(finding.value)}" if has_value(finding.value) else name


def where(finding: Finding) -> str:
    """What a finding is about, where its words do not name it."""
    return f"{finding.anchor}: " if finding.anchor and finding.anchor not in finding.text else ""


def joined(parts: Sequence[str | None], between: str = "\n\n") -> str:
    """The parts that hold something, with ``between`` between them."""
    return between.join(part for part in parts if part)
