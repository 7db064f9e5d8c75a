"""Choosing layers by glob pattern, with an error that shows what there was to choose from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from normsurgeon.errors import PatternError


def select(pattern: str, names: Sequence[str], what: str = "norm layer") -> tuple[str, ...]:
    """The names that match a shell-style pattern (``*`` also crosses dots).

    :raises PatternError: when none does; the message lists names that were there.

    >>> select("layer1.*", ["bn1", "layer1.0.bn1", "layer1.0.bn2"])
    ('layer1.0.bn1', 'layer1.0.bn2')
    """
    chosen = tuple(name for name in names if fnmatchcase(name, pattern))
    if chosen:
        return chosen
    raise PatternError(f"the pattern {pattern!r} matches no {what}; there are: {shorten(names)}")


def shorten(names: Iterable[str], most: int = 8) -> str:
    """The names as one line, the middle left out where there are many.

    >>> shorten("abcdefghij", most=4)
    'a, b, … (6 more) …, i, j'
    """
    names = list(names)
    if len(names) <= most:
        return ", ".join(names) or "none"
    half = most // 2
    return ", ".join(names[:half]) + f", … ({len(names) - 2 * half} more) …, " + ", ".join(names[-half:])
