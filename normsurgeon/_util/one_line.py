"""An exception of another library as one short line, for the inside of a message."""

from __future__ import annotations


def one_line(error: BaseException, limit: int = 140, kind: bool = True) -> str:
    """``Kind: text``, cut off after ``limit`` characters of text; without the ``kind`` the text alone.

    >>> one_line(ValueError("two\\n  lines"))
    'ValueError: two lines'
    """
    text = " ".join(str(error).split())
    text = f"{text[:limit]}…" if len(text) > limit else text
    if not kind:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
