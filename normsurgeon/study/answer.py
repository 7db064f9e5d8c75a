"""A study's answer: everything that its results say, in one record that shows and saves itself."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normsurgeon._util.files import check_writable, write_text
from normsurgeon.errors import UsageError
from normsurgeon.reporting.records import plain
from normsurgeon.study import findings as sentences
from normsurgeon.study import statistics
from normsurgeon.study.findings import Finding
from normsurgeon.study.pairing import axis_order, setting_axes
from normsurgeon.study.quantities import Comparison, Crossing, Rank, Row
from normsurgeon.study.records import Results

if TYPE_CHECKING:
    from normsurgeon.study.terminal import TerminalAnswer

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Answer:
    """The results and what follows from them.

    crossings  norm × each other axis that varies (the batch size among them), everything else averaged alike
    """

    results: Results
    table: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    ranking: tuple[Rank, ...]
    crossings: tuple[Crossing, ...]
    findings: tuple[Finding, ...]

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms that were compared, in the order of every table."""
        return tuple(axis_order("norm", (outcome.cell.norm for outcome in self.results.outcomes)))

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, which are the replicates."""
        return tuple(sorted({outcome.cell.seed for outcome in self.results.outcomes}))

    def scope(self, *scopes: str) -> tuple[Comparison, ...]:
        """The comparisons of these scopes."""
        return tuple(c for c in self.comparisons if c.scope in scopes)

    def to_dict(self) -> dict[str, Any]:
        """The documented JSON (docs/study.md): plain types, every key always there, nan and infinity as None."""
        axes = {}
        for axis in self.results.varying():
            values = axis_order(axis, (getattr(outcome.cell, axis) for outcome in self.results.outcomes))
            axes[axis] = [dict(value) if axis == "regularization" else value for value in values]
        return {
            "format": "normsurgeon-study",
            "version": FORMAT_VERSION,
            "study": {
                "name": self.results.name,
                "title": self.results.title,
                "axes": axes,
                "norms": list(self.norms),
                "seeds": list(self.seeds),
            },
            "training": plain(self.results.training),
            "counts": self.results.counts(),
            "table": [row.to_dict() for row in self.table],
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
            "ranking": [rank.to_dict() for rank in self.ranking],
            "crossings": [crossing.to_dict() for crossing in self.crossings],
            "findings": [finding.to_dict() for finding in self.findings],
            "cells": [plain(outcome.to_dict()) for outcome in self.results.outcomes],
        }

    # A renderer is imported when it is asked for: the numbers come without it.

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``.html`` (one self-contained page) or ``.json``, whole or not at all; the path comes back.

        :raises UsageError: another ending.
        :raises NormSurgeonError: the file cannot be written.
        """
        path = Path(path)
        ending = path.suffix.lower()
        if ending not in (".html", ".json"):
            raise UsageError(f"cannot tell how to write {path}: a study's answer ends in .html (a page) or .json")
        check_writable(path)  # before the page is made
        if ending == ".html":
            from normsurgeon.study.page import page

            text = page(self)
        else:
            text = json.dumps(self.to_dict(), allow_nan=False, ensure_ascii=False) + "\n"
        write_text(path, text)
        return path

    def __repr__(self) -> str:
        """One line; ``print`` shows everything."""
        counts = ", ".join(f"{number} {kind}" for kind, number in self.results.counts().items() if number)
        return f"<Answer of {self.results.name}: {counts or 'no runs'}, {len(self.findings)} findings>"

    def __str__(self) -> str:
        """The whole answer as plain text."""
        from normsurgeon.study.plain import plain_text

        return plain_text(self)

    def __rich__(self) -> TerminalAnswer:
        """What rich shows: as wide, and as colourful, as the terminal is."""
        from normsurgeon.study.terminal import TerminalAnswer

        return TerminalAnswer(self)


def answer(results: Results) -> Answer:
    """What the results say.

    >>> answer(Results("empty", ()))
    <Answer of empty: no runs, 1 findings>
    """
    compared = statistics.comparisons(results)
    ranked = statistics.ranking(results, compared)
    # Rates that are scaled by the batch size are never the same in two of them: there is nothing to cross.
    crossings = [statistics.crossing(results, axis) for axis in setting_axes(results)]
    return Answer(
        results=results,
        table=statistics.table(results),
        comparisons=compared,
        ranking=ranked,
        crossings=tuple(crossed for crossed in crossings if crossed.settings or crossed.axis != "lr"),
        findings=sentences.findings(results, compared, ranked),
    )
