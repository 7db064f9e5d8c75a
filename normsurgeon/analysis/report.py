"""What an analysis returns: its records, which print, show and save themselves."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normsurgeon._util.files import check_writable, write_text
from normsurgeon._util.plain import plain
from normsurgeon.analysis import sections
from normsurgeon.analysis.layer_table import Measures, Rows, labelled, layer_rows, records
from normsurgeon.analysis.records import (
    Comparison,
    Finding,
    LayerStatistics,
    Provenance,
    Sensitivity,
    Similarity,
    SweepPoint,
)
from normsurgeon.errors import UsageError
from normsurgeon.render.document import Document, Section
from normsurgeon.render.presentable import Presentable
from normsurgeon.selection.swap_report import SwapSensitivity

if TYPE_CHECKING:
    from pandas import DataFrame

FORMAT_VERSION = 1


@dataclass(frozen=True, repr=False)
class Report(Presentable):
    """Everything that one analysis found. What was not measured is None (or empty).

    ``print`` shows all of it; ``save`` writes ``.html`` (one self-contained page), ``.json``, or ``.csv`` (the layer
    table); ``frame`` is the layer table for pandas.
    """

    provenance: Provenance
    findings: tuple[Finding, ...] = ()
    statistics: tuple[LayerStatistics, ...] | None = None
    baseline_statistics: tuple[LayerStatistics, ...] | None = None
    similarity: Similarity | None = None
    comparison: Comparison | None = None
    sensitivity: tuple[Sensitivity, ...] | None = None
    sweep: tuple[SweepPoint, ...] = ()
    swap: SwapSensitivity | None = None
    history: tuple[dict[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The documented JSON (docs/report.md): plain types, every key always there, nan and infinity as None."""
        values = plain({**asdict(self), "swap": self.swap.to_dict() if self.swap is not None else None})
        for entry in values["sensitivity"] or ():
            for key, label in (("layers", "layer"), ("parameters", "parameter")):
                entry[key] = [{label: score.pop("name"), **score} for score in entry[key]]
        return {"format": "normsurgeon-report", "version": FORMAT_VERSION, **values}

    def document(self) -> Document:
        """Only what there is, the findings first."""
        rows, measures, it = self._rows(), labelled(self.sensitivity), self.provenance
        layers = len(self.statistics or ()) or (len(self.similarity.layers) if self.similarity else 0)
        important = frozenset(str(entry.anchor) for entry in sections.standouts(self.findings, rows))
        parts: list[Section] = [
            *sections.profile_sections(rows),
            sections.similarity_section(self.similarity),
            sections.comparison_section(self.comparison, rows),
            sections.sensitivity_section(measures, rows),
            *sections.sweep_sections(self.sweep),
            *(self.swap.sections() if self.swap is not None else ()),
            *sections.history_sections(self.history),
            sections.layers_section(rows, measures, important),
        ]
        parts = [section for section in parts if section.blocks]
        if parts or self.findings:
            parts.insert(0, sections.findings_section(self.findings, rows))
        return Document(
            "normsurgeon report",
            it.model,
            (*parts, sections.provenance_section(it)),
            subtitle=f"compared with {it.baseline}" if it.baseline else "",
            facts=sections.header(it, self.comparison, layers, self._measured(measures)),
        )

    @property
    def frame(self) -> DataFrame:
        """The layer table: a row a layer, numbers in full, the columns of the CSV."""
        from pandas import DataFrame

        header, rows = self._records()
        return DataFrame(rows, columns=header)

    def csv(self) -> str:
        """The layer table as text, an empty cell for what has no value."""
        text = io.StringIO()
        header, rows = self._records()
        writer = csv.DictWriter(text, header, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``.html``, ``.json`` or ``.csv``, whole or not at all; returns the path.

        :raises UsageError: if the name has another ending.
        :raises NormSurgeonError: if the file cannot be written.
        """
        path = Path(path)
        ending = path.suffix.lower()
        if ending not in (".html", ".json", ".csv"):
            raise UsageError(
                f"cannot write a report as {path}: its name ends in .html (a page), .json or .csv (the layer table)"
            )
        check_writable(path)  # before the page is made
        if ending == ".html":
            from normsurgeon.render.html import to_page

            text = to_page(self.document())
        elif ending == ".json":
            text = json.dumps(self.to_dict(), allow_nan=False, ensure_ascii=False) + "\n"
        else:
            text = self.csv()
        write_text(path, text)
        return path

    def __repr__(self) -> str:
        """One line: a whole report is thousands of numbers. ``print`` shows more."""
        it = self.provenance
        against = f" against {it.baseline}" if it.baseline else ""
        layers = f", {len(self.statistics)} layers" if self.statistics is not None else ""
        return f"<Report of {it.model}{against}: {it.images} images{layers}, {len(self.findings)} findings>"

    def _rows(self) -> Rows:
        measures = labelled(self.sensitivity)
        return layer_rows(self.statistics, self.baseline_statistics, self.similarity, self.comparison, measures)

    def _records(self) -> tuple[list[str], list[dict[str, Any]]]:
        statistics, baseline = self.statistics is not None, self.baseline_statistics is not None
        measures = labelled(self.sensitivity)
        return records(self._rows(), measures, statistics, baseline, self.comparison is not None)

    def _measured(self, measures: Measures) -> list[str]:
        """The parts that there are, in words."""
        return [
            *(part for part in ("statistics", "similarity", "comparison") if getattr(self, part) is not None),
            *([f"sensitivity ({', '.join(measures)})"] if measures else ()),
            *(["settings"] if self.sweep else ()),
            *(["history"] if self.history else ()),
        ]
