"""Text from files, shown so that it can neither steer a terminal nor fill it."""

from __future__ import annotations

import re

_STEERING = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # C0 (ESC among them), DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that turn the direction of writing
    "\u2028\u2029\ufeff\U000e0000-\U000e007f"  # line separators, and tags that nothing shows
    "\ud800-\udfff]"  # halves of characters: bytes of a file name that are no UTF-8, which no stream can write
)


def printable(text: str, keep: str = "\n") -> str:
    """``text`` with escapes in place of control characters and of marks that turn the direction of writing.

    keep  control characters that stay as they are

    >>> printable("layer\\x1b[2J1\\n"), printable("a\\nb", keep=""), printable("\\u202egpj")
    ('layer\\\\x1b[2J1\\n', 'a\\\\nb', '\\\\u202egpj')
    """
    return _STEERING.sub(lambda found: found[0] if found[0] in keep else _escaped(found[0]), text)


def one_short_line(text: str, most: int = 300) -> str:
    """``text`` as one printable line of at most ``most`` characters; what is too long loses its middle.

    >>> one_short_line("a\\nb"), one_short_line("0123456789", most=6)
    ('a b', '012…89')
    """
    line = printable(" ".join(text.split()), keep="")
    if len(line) <= most:
        return line
    tail = most // 3
    return f"{line[: most - tail - 1]}…{line[-tail:]}"


def _escaped(character: str) -> str:
    code = ord(character)
    short = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(character)
    return short or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")
