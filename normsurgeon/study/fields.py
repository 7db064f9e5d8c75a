"""One value of a grid, checked. An error knows where the value is; a file's line is put in front of it later."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from normsurgeon.errors import UsageError
from normsurgeon.study.lines import Path


class GridError(UsageError):
    """A value that a grid cannot have; ``path`` says where it is."""

    def __init__(self, text: str, path: Path = ()) -> None:
        super().__init__(text)
        self.path = path


@contextmanager
def within(*path: str | int) -> Iterator[None]:
    """Errors of the block are about the value at ``path``, or about something inside of it."""
    try:
        yield
    except GridError as error:
        raise GridError(str(error), (*path, *error.path)) from error
    except UsageError as error:
        raise GridError(str(error), path) from error


def entries(name: str, value: Any) -> tuple[Any, ...]:
    """An axis' values: one value, or a list of at least one.

    >>> entries("norms", "bn"), entries("norms", ["bn", "gn"])
    (('bn',), ('bn', 'gn'))
    """
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        return (value,)
    found = tuple(value)
    if not found:
        raise GridError(f"{name} is an empty list; give at least one value")
    return found


def shown(value: Any) -> str:
    """A value as a message quotes it: on one line, and not all of a long one.

    >>> shown("gm"), shown("x" * 100)
    ("'gm'", "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…")
    """
    try:
        found = " ".join(repr(value).split())
    except ValueError:  # a whole number of more digits than Python writes
        found = f"a {type(value).__name__}"
    return found if len(found) <= 60 else f"{found[:59]}…"


def text(name: str, value: Any) -> str:
    """A text that is not empty."""
    if not isinstance(value, str):
        if value is None:
            raise GridError(f"{name} is empty")
        quotes = "" if isinstance(value, (list, dict, tuple)) else "; put it in quotes"
        raise GridError(f"{name}={shown(value)} must be a text{quotes}")
    if not value.strip():
        raise GridError(f"{name} is empty")
    return " ".join(value.split())


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number within limits."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limits = f"at least {least}" if most is None else f"{least} to {most}"
        raise GridError(f"{name}={shown(value)} must be a whole number, {limits}")
    return value


def number(name: str, value: Any, above: float | None = None) -> float:
    """A finite number, above a limit where there is one. A text that is a number counts (``1e-4``, for YAML 1.1)."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    limit = "" if above is None else f", above {above:g}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise GridError(f"{name}={shown(value)} must be a number{limit}")
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value) or (above is not None and value <= above):
        raise GridError(f"{name}={value:g} must be a finite number{limit}")
    return value


def flag(name: str, value: Any) -> bool:
    """A truth value; YAML 1.1's words for it count."""
    words = {"yes": True, "on": True, "no": False, "off": False}
    found = words.get(value.lower(), value) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise GridError(f"{name}={shown(value)} must be true or false")
    return found


def pair(name: str, value: Any) -> tuple[float, float]:
    """Two numbers."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or len(value) != 2:
        raise GridError(f"{name}={shown(value)} must be a list of two numbers")
    return number(name, value[0]), number(name, value[1])
