"""What a misspelt name may have meant, for the end of an error message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggest(name: str, known: Iterable[str], otherwise: str | None = None, most: int = 1, cutoff: float = 0.5) -> str:
    """The nearest of the known names as a question; without one ``otherwise``, by default all of them.

    >>> suggest("grops", ["groups", "eps"])
    'did you mean groups?'
    >>> suggest("x", ["groups", "eps"]), suggest("x", [], otherwise="try --help")
    ('choose one of: groups, eps', 'try --help')
    """
    known = list(known)
    by_case = {entry.lower(): entry for entry in known}
    near = [by_case[entry] for entry in difflib.get_close_matches(name.lower(), by_case, most, cutoff)]
    if near:
        return f"did you mean {', '.join(near)}?"
    return f"choose one of: {', '.join(known)}" if otherwise is None else otherwise
