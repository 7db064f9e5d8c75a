"""What benchmarks/zoo.py and benchmarks/beyond.py share: kinds of reasons, and the two parts of docs/coverage.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from measuring import table

START, END = "<!-- beyond -->", "<!-- /beyond -->"

_MARKS = (
    "is also read by",
    "read directly",
    "is parametrized",
    "is not linear in its weight",
    "shares its parameters",
    "not always for this norm",
    "times, behind",
    "one of its",
    "not reached",
    "channels",
    "holds running statistics",
)


def kind(reason: str | None) -> str:
    """A reason without the names of one model's layers."""
    reason = (reason or "none given").removeprefix("not folded: ")
    for mark in _MARKS:
        if mark in reason:
            return mark
    return " ".join(reason.split()[:2]) if "follows" in reason else reason[:80]


def total(counts: Iterable[dict[str, int]]) -> Counter[str]:
    """Several counts as one."""
    return sum(map(Counter, counts), Counter())


def reasons(counts: Counter[str]) -> str:
    """A table of reasons, the most frequent first."""
    return table(("reason", "sites"), counts.most_common())


def listed(entries: Iterable[tuple[str, object]]) -> str:
    """A list of names, each with what there is to know of it."""
    return "\n".join(f"- {name}: {what}" for name, what in entries) or "None."


def write(path: Path, timm: str | None = None, beyond: str | None = None) -> None:
    """Write one part of docs/coverage.md; the part that is not given stays as it is."""
    before, _, rest = path.read_text().partition(START) if path.exists() else ("", "", "")
    section = rest.partition(END)[0].strip("\n") if beyond is None else beyond
    text = (before if timm is None else timm).rstrip("\n") + "\n"
    path.write_text(f"{text}\n{START}\n{section}\n{END}\n" if section else text)
