"""What ``swap_sensitivity`` returns: each site's damage, beside what predicts it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from normsurgeon.render.document import Bars, Column, Document, Facts, Notes, Section, Table
from normsurgeon.render.presentable import Presentable

SHOWN = 12

PREDICTORS = ("elements", "norm_error", "taylor")


@dataclass(frozen=True)
class SwapPoint:
    """What one site's conversion does.

    site, target  the module path, and the norm in short: ``gn:8``
    damage        mean KL(original ‖ changed) in nats over the images; of what is no classifier, the mean squared error
                  of the outputs relative to the original's deviations from their mean
    stderr        its standard error over the images
    lost          of a classifier, the share of images whose answer is another one, or None
    images        that it was measured on: fewer where the site was clearly harmless
    left_out      how much less damage the conversion of all sites does without this one; None where not measured
    elements      values that share a mean and a variance, or None
    norm_error    the norm's error at the site: root mean square, relative to the batch norm's own deviations
    taylor        the damage that is predicted from the norm's error and the outputs' gradients
    """

    site: str
    target: str
    damage: float
    stderr: float
    lost: float | None
    images: int
    left_out: float | None = None
    elements: int | None = None
    norm_error: float | None = None
    taylor: float | None = None


@dataclass(frozen=True)
class SwapSensitivity(Presentable):
    """The sites' ``points`` in the order of the data; ``all_damage`` is of all sites together.

    measure  "KL (nats)", or "squared error" of what is no classifier
    """

    model: str
    measure: str
    images: int
    points: tuple[SwapPoint, ...]
    all_damage: float
    all_stderr: float

    @property
    def total(self) -> float:
        """The sum of the single damages: near ``all_damage`` where damages add up."""
        return sum(point.damage for point in self.points)

    def rank_correlation(self, predictor: Literal["elements", "norm_error", "taylor"]) -> float | None:
        """Spearman's correlation of a predictor with the measured damage; None for fewer than three sites."""
        from scipy.stats import spearmanr  # half a second

        pairs = [(getattr(p, predictor), p.damage) for p in self.points if getattr(p, predictor) is not None]
        if len(pairs) < 3:
            return None
        predicted, measured = zip(*pairs, strict=True)
        sign = -1 if predictor == "elements" else 1
        found = sign * float(spearmanr(predicted, measured).statistic)
        return found if math.isfinite(found) else None

    @property
    def correlations(self) -> dict[str, float | None]:
        """``rank_correlation`` of every predictor."""
        return {name: self.rank_correlation(name) for name in PREDICTORS}  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "model": self.model,
            "measure": self.measure,
            "images": self.images,
            "all": {"damage": self.all_damage, "stderr": self.all_stderr},
            "sum": self.total,
            "rank_correlation": self.correlations,
            "sites": [asdict(point) for point in self.points],
        }

    def document(self) -> Document:
        """The sites, the most damaging first."""
        return Document("normsurgeon", f"Swap sensitivity of {self.model}", self.sections())

    def sections(self) -> tuple[Section, ...]:
        """What a report shows of it."""
        columns = (
            Column("site"),
            Column("to"),
            Column("damage", "number", f"{self.measure} when this site alone is converted"),
            Column("±", "number", "standard error over the images"),
            Column("left out", "number", "damage of all sites less that of all but this one"),
            Column("lost", "percent", "images with another answer than the original's"),
            Column("Taylor", "number", "damage predicted from gradients"),
            Column("norm error", "percent", "the norm's own error, relative"),
            Column("elements", "count", "values that share a mean and a variance"),
            Column("images", "count"),
        )
        worst = sorted(self.points, key=lambda point: -point.damage)
        rows = tuple(
            (p.site, p.target, p.damage, p.stderr, p.left_out, p.lost, p.taylor, p.norm_error, p.elements, p.images)
            for p in worst
        )
        known = [f"{name.replace('_', ' ')} {rho:.2f}" for name, rho in self.correlations.items() if rho is not None]
        facts = Facts(
            (
                ("measure", f"{self.measure} to the original, {self.images} images"),
                ("all sites", f"{self.all_damage:.3g} ± {self.all_stderr:.1g}; single ones add up to {self.total:.3g}"),
                ("rank correlation with the damage", ", ".join(known) or "too few sites"),
            )
        )
        bars = Bars(tuple((p.site, p.damage, p.stderr) for p in worst[:SHOWN]), f"Damage of the worst, {self.measure}")
        table = Table(columns, rows, searchable=True, noun="sites", shaded=True, terminal_rows=20)
        notes = Notes(("A site that is clearly harmless is measured on fewer images.",))
        return (Section("swap", "Swap sensitivity", (facts, bars, table, notes)),)
