"""A study's report: everything that its results show, in one record that prints, shows and saves itself."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normsurgeon._util.estimates import Interval, effect, interval, points, probability
from normsurgeon._util.files import check_writable, write_text
from normsurgeon.errors import UsageError
from normsurgeon.render.document import (
    Block,
    Column,
    Document,
    Facts,
    Finding,
    Findings,
    Medium,
    Notes,
    Section,
    Table,
    Value,
)
from normsurgeon.render.formatting import DASH, joined, percent, plural, shown
from normsurgeon.render.presentable import Presentable
from normsurgeon.study import figures, statistics
from normsurgeon.study.findings import (
    TITLES,
    StudyFinding,
    cell_label,
    findings,
    rate_range,
    setting_label,
    value_label,
)
from normsurgeon.study.records import AXES, LOST, Results, finite
from normsurgeon.study.statistics import CLOSE, Comparison, Crossing, Rank, Row, axis_order

if TYPE_CHECKING:
    from pandas import DataFrame

METHOD = (
    "Seeds are the replicates. Two norms are compared by the paired differences of runs that share a seed and "
    "everything else; each seed's differences are averaged over the settings before they are tested, so n is the "
    "number of seeds.",
    "Intervals are of 95 %: of accuracies Wilson's, with Student's quantile over the seeds, of differences Student's. "
    "The test is the paired t test, two-sided; below 3 seeds nothing is tested. g is Hedges' g of the paired "
    "differences (Cohen's d_z with Hedges' correction). Where neither of two norms answers better than "
    "guessing may, nothing is claimed.",
    "Holm's adjustment keeps the probability of any false claim in a family of comparisons at 5 %. The overall "
    "comparisons and the slopes on the batch size are one family, the comparisons within settings another; a sentence "
    "about a setting needs a significant comparison of the same norms in the first.",
    "A diverged run counts as 0 right wherever norms are compared or averaged. The table of cells alone shows the runs "
    "that finished. Failed and skipped runs are left out, with their pairs.",
    "A comparison describes how these norms differ on these held-out images, over the randomness of training. It does "
    "not carry over to other images, models or data sets.",
)
_TERMINAL_ROWS = 40


@dataclass(frozen=True, repr=False)
class StudyReport(Presentable):
    """The results and what follows from them.

    crossings  norm × each other axis that varies (the batch size among them), everything else averaged alike
    """

    results: Results
    table: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    ranking: tuple[Rank, ...]
    crossings: tuple[Crossing, ...]
    findings: tuple[StudyFinding, ...]

    @property
    def frame(self) -> DataFrame:
        """A pandas DataFrame of one row per cell: its axes, and what came of it."""
        import pandas

        names = ("status", "reason", "correct", "images", "accuracy", "loss", "start_accuracy", "steps", "seconds")
        rows = [
            {**{axis: outcome.cell.label(axis) if axis == "regularization" else getattr(outcome.cell, axis)
                for axis in AXES},
             **{name: getattr(outcome, name) for name in names}}
            for outcome in self.results.outcomes
        ]  # fmt: skip
        return pandas.DataFrame(rows, columns=[*AXES, *names])

    def to_dict(self) -> dict[str, Any]:
        """The documented JSON (docs/study.md): plain types, every key always there, nan and infinity as None."""
        results = self.results
        axes = {axis: _values(results, axis) for axis in results.varying()}
        if "regularization" in axes:
            axes["regularization"] = list(map(dict, axes["regularization"]))
        return finite({
            "format": "normsurgeon-study",
            "version": 1,
            "study": {"name": results.name, "title": results.title, "axes": axes, "norms": _values(results, "norm"),
                      "seeds": _values(results, "seed")},
            "training": results.training,
            "counts": results.counts(),
            "table": [row.to_dict() for row in self.table],
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
            "ranking": [rank.to_dict() for rank in self.ranking],
            "crossings": [crossing.to_dict() for crossing in self.crossings],
            "findings": list(map(asdict, self.findings)),
            "cells": [outcome.to_dict() for outcome in results.outcomes],
        })  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``.html`` (one self-contained page) or ``.json``, whole or not at all; returns the path.

        :raises UsageError: if the path has another ending.
        :raises WriteError: if the file cannot be written.
        """
        path = Path(path)
        ending = path.suffix.lower()
        if ending not in (".html", ".json"):
            raise UsageError(f"cannot tell how to write {path}: a study's report ends in .html (a page) or .json")
        check_writable(path)  # before the page is made
        if ending == ".html":
            from normsurgeon.render.html import to_page

            text = to_page(self.document())
        else:
            text = json.dumps(self.to_dict(), allow_nan=False, ensure_ascii=False) + "\n"
        write_text(path, text)
        return path

    def __repr__(self) -> str:
        """One line; ``print`` shows everything."""
        counts = ", ".join(f"{number} {kind}" for kind, number in self.results.counts().items() if number)
        return f"<StudyReport of {self.results.name}: {counts or 'no runs'}, {len(self.findings)} findings>"

    def document(self) -> Document:
        """What there is to show."""
        results = self.results
        listed = Findings(tuple(Finding(f.text, f.severity, f.kind) for f in self.findings), empty="")
        others = (_crossing_table(crossing) for crossing in self.crossings if crossing.axis != "batch_size")
        settings = tuple((name.replace("_", " "), shown(value)) for name, value in results.training.items())
        parts: tuple[tuple[str, str, Iterable[Block | None], frozenset[Medium] | None], ...] = (
            ("findings", "What this study shows", (listed, _ranking_table(self.ranking)), None),
            ("batch", "Batch size", _batch_blocks(results, self.crossings), None),
            ("rates", "Learning rate", _rate_blocks(results), None),
            ("comparisons", "Comparisons", _comparison_blocks(self.comparisons), None),
            ("crossings", "Norm × everything else", others, None),
            ("curves", "Training", (figures.curve_chart(results),), None),
            ("layers", "Layers", _layer_blocks(results), None),
            ("every-layer", "Every layer", _layer_tables(results), frozenset({"page", "text", "notebook"})),
            ("cells", "Every cell", (_cell_table(results, self.table) if self.table else None,), None),
            ("lost", "Runs without a result", (_lost_table(results),), None),
            ("method", "How it was computed", (Notes(METHOD),), frozenset({"page"})),
            ("settings", "Training settings", (Facts(settings) if settings else None,), None),
        )
        sections = (
            Section(name, title, tuple(block for block in blocks if block is not None), only)
            for name, title, blocks, only in parts
        )
        return Document(
            "normsurgeon study",
            results.title or results.name,
            tuple(section for section in sections if section.blocks),
            results.name if results.title else "",
            (Facts(_facts(results)),),
        )


def study_report(results: Results) -> StudyReport:
    """What the results show.

    >>> study_report(Results("empty", ()))
    <StudyReport of empty: no runs, 1 findings>
    """
    compared = statistics.comparisons(results)
    ranked = statistics.ranking(results, compared)
    crossings = [statistics.crossing(results, axis) for axis in statistics.setting_axes(results)]
    return StudyReport(
        results=results,
        table=statistics.table(results),
        comparisons=compared,
        ranking=ranked,
        # Rates that are scaled by the batch size are never the same in two of them: there is nothing to cross.
        crossings=tuple(crossed for crossed in crossings if crossed.settings or crossed.axis != "lr"),
        findings=findings(results, compared, ranked),
    )


def _values(results: Results, axis: str) -> list[Any]:
    return axis_order(axis, (getattr(outcome.cell, axis) for outcome in results.outcomes))


def _facts(results: Results) -> tuple[tuple[str, str], ...]:
    """What was studied, in a few pairs of words."""
    counts = ", ".join(f"{number} {kind}" for kind, number in results.counts().items() if number)
    pairs = [("Runs", counts or "none"), ("Norms", ", ".join(_values(results, "norm"))),
             ("Seeds", str(len(_values(results, "seed"))))]  # fmt: skip
    for axis in AXES:
        labels = list(dict.fromkeys(outcome.cell.label(axis) for outcome in results.outcomes))
        if axis not in ("norm", "seed") and (axis in ("model", "dataset") or len(labels) > 1):
            pairs.append((TITLES.get(axis, axis).capitalize(), ", ".join(labels)))
    return tuple((name, words) for name, words in pairs if words)


def _plus_minus(mean: str, ci: Interval | None) -> str:
    """A mean with half its interval's width in points."""
    return mean if ci is None else f"{mean} ± {points((ci[1] - ci[0]) / 2)}"


def _counts(lost: Iterable[str], counts: dict[str, int]) -> list[Value]:
    return [counts[kind] or None for kind in lost]


def _ranking_table(ranking: tuple[Rank, ...]) -> Table | None:
    """The norms from the best on; ties share a rank."""
    if len(ranking) < 2:
        return None
    lost = [kind for kind in LOST if any(rank.lost[kind] for rank in ranking)]
    rows = [
        (rank.norm, str(rank.rank or DASH), _plus_minus(percent(rank.estimate.mean), rank.estimate.ci),
         ", ".join(rank.worse_than) or DASH, rank.estimate.n, *_counts(lost, rank.lost))
        for rank in ranking
    ]  # fmt: skip
    settings = max(rank.settings for rank in ranking)
    note = "A norm's rank is 1 + the number of norms that are significantly better overall, so norms may share one."
    if settings > 1:
        note += f" Means are over the {settings} settings in which every ranked norm has a result with the same seeds."
    note += " A diverged run counts as 0 right." if "diverged" in lost else ""
    columns = [Column("norm"), Column("rank", "count"), Column("accuracy", "number"), Column("worse than"),
               Column("seeds", "count"), *(Column(kind, "count") for kind in lost)]  # fmt: skip
    return Table(tuple(columns), tuple(rows), "Ranking", note)


def _comparison_blocks(compared: tuple[Comparison, ...]) -> Iterator[Block | None]:
    """Every two norms: overall, their slopes, at the best learning rate, and setting by setting."""
    yield figures.difference_chart(compared)
    holm = "Holm p is adjusted for all comparisons in this family"
    kinds: tuple[tuple[str, str, str], ...] = (
        ("overall", "Norms compared, overall", "Points of accuracy, paired by seed; each seed's differences are "
         f"averaged over the settings first. {holm}, that of the batch size included."),
        ("batch size", "Norms compared, by how batch size matters", "Difference of the slopes, in points of accuracy "
         "a doubling of the batch size. If it is negative, larger batches help the second norm more."),
        ("best lr", "Norms compared, each at its best learning rate", "The rate was chosen on the same held-out "
         f"images: no finding rests on this. {holm}."),
        ("setting", "Norms compared, setting by setting", f"{holm}."),
    )  # fmt: skip
    numbers = [Column(title, "number") for title in ("difference", "95 % CI", "Holm p", "g", "p")]
    columns = (*numbers, *(Column(title, "count") for title in ("seeds", "pairs", "lost", "diverged")))
    for scope, title, note in kinds:
        found = [c for c in compared if c.scope == scope]
        rows = []
        for c in found:
            diverged = ", ".join(f"{n} {norm}" for norm, n in ((c.a, c.diverged_a), (c.b, c.diverged_b)) if n)
            rows.append((
                f"{c.a} − {c.b}" + (f": {setting_label(c.setting)}" if c.setting else ""),
                points(c.difference, signed=True) + (" *" if c.significant else ""),
                interval(c.ci).removeprefix("95 % CI ").replace("no interval", DASH),
                probability(c.p_holm).removeprefix("= "), effect(c.effect), probability(c.p).removeprefix("= "),
                c.n, c.pairs, c.lost, diverged or None,
            ))  # fmt: skip
        if found:
            star = " * marks an adjusted p below 0.05." if any(c.significant for c in found) else ""
            head = Column("norms: setting" if scope == "setting" else "norms")
            yield Table((head, *columns), tuple(rows), title, note + star, terminal_rows=_TERMINAL_ROWS)


def _batch_blocks(results: Results, crossings: tuple[Crossing, ...]) -> Iterator[Block]:
    for crossing in crossings:
        if crossing.axis == "batch_size":
            if any(it.mean is not None for it, _ in crossing.cells.values()):
                yield figures.batch_chart(results, crossing)
            yield _crossing_table(crossing)


def _crossing_table(crossing: Crossing) -> Table:
    """Norm × axis, in per cent: a row for each level, a column for each norm."""
    known = {key: cell for key, cell in crossing.cells.items() if cell[0].mean is not None}
    norms, axis = axis_order("norm", (norm for _, norm in known)), TITLES.get(crossing.axis, crossing.axis)
    levels = axis_order(crossing.axis, (level for level, _ in crossing.cells))

    def text(level: Any, norm: str) -> str:
        if (level, norm) not in known:
            return DASH
        it, diverged = known[level, norm]
        lost = f" ({diverged} diverged)" if diverged else ""
        return _plus_minus(points(it.mean, digits=1), it.ci) + lost

    rows = tuple((value_label(crossing.axis, level), *(text(level, norm) for norm in norms)) for level in levels)
    over = f"averaged over {crossing.settings} other settings" if crossing.settings > 1 else ""
    seeds = max((it.n for it, _ in crossing.cells.values()), default=0)
    note = joined(("Accuracy in per cent ± half the 95 % interval", over, plural(seeds, "seed")), ", ") + "."
    alone = [norm for norm in axis_order("norm", (norm for _, norm in crossing.cells)) if norm not in norms]
    if not norms:
        note = "No setting has a result for every norm with the same seeds."
    elif alone:
        note += f" No result: {', '.join(alone)}."
    columns = (Column(axis), *(Column(norm, "number") for norm in norms))
    return Table(columns, rows, f"{axis.capitalize()} × norm", note, shaded=True, terminal_rows=_TERMINAL_ROWS)


def _rate_blocks(results: Results) -> Iterator[Block]:
    """Accuracy against the learning rate: a row for each start and norm, a column for each rate; none for one rate."""
    unscaled, size = statistics.unscaled(results)
    curves = statistics.rate_curves(unscaled)
    if not curves:
        return
    yield figures.rate_chart(results)
    rates = sorted({point.x for curve in curves for point in curve.points})
    rows = []
    for curve in curves:
        at = {point.x: _plus_minus(points(point.mean, digits=1), point.ci) for point in curve.points}
        about = (f"{curve.best.x:g}", percent(curve.best.mean), rate_range(*curve.close))
        rows.append((figures.rate_label(curve, curves), *about, *(at.get(rate, DASH) for rate in rates)))
    alike = f"within {100 * CLOSE:g} points"
    note = f"Accuracy in per cent ± half the 95 % interval, {plural(curves[0].points[0].n, 'seed')}"
    note += f", averaged over {curves[0].settings} other settings" if curves[0].settings > 1 else ""
    note += f". Rates are for batches of {size}" if size else ""
    note += f". The range {alike} of the best rate is unbroken: every rate in it that was tried is that close."
    if any(point.diverged for curve in curves for point in curve.points):
        note += " A diverged run counts as 0 right."
    name = "norm" if rows[0][0] == curves[0].norm else "norm, start"
    columns = [Column(name), Column("best rate", "number"), Column("accuracy", "number"), Column(alike)]
    columns += [Column(f"{rate:g}", "number") for rate in rates]
    yield Table(tuple(columns), tuple(rows), "Accuracy against learning rate", note)


def _layer_blocks(results: Results) -> Iterator[Block]:
    """The networks that were analysed: statistics over the depth, and the similarity of the layers."""
    if any(run.analysis and run.analysis.layers for run in results.outcomes):
        yield figures.layer_chart(results)
    yield from figures.similarity_charts(results)


def _layer_tables(results: Results) -> Iterator[Table]:
    """The statistics of every layer, a table for each network that was analysed."""
    columns = (
        Column("layer"), Column("kind"), Column("mean", "number"), Column("std", "number"),
        Column("sensitivity", "number"), Column("eff. rank", "number"), Column("zeros", "percent"),
        Column("dead", "percent"), Column("group fluct.", "number"), Column("channels", "count"),
    )  # fmt: skip
    for run in results.outcomes:
        rows = tuple(
            (it.layer, it.kind, it.mean, it.std, it.sensitivity, it.effective_rank, it.zero_fraction, it.dead_fraction,
             it.group_fluctuation, it.channels)
            for it in (run.analysis.layers if run.analysis else ())
        )  # fmt: skip
        if rows:
            yield Table(columns, rows, figures.run_label(results, run), folded=True)


def _cell_table(results: Results, table: tuple[Row, ...]) -> Table:
    """Every cell, its seeds pooled."""
    axes = [axis for axis in results.varying() if axis != "norm"]
    lost = [kind for kind in LOST if any(row.lost[kind] for row in table)]
    rows = []
    for row in table:
        it = row.estimate
        rows.append((cell_label(row.cell, axes), percent(it.mean), _plus_minus("", it.ci) or DASH, it.n, points(it.sd),
                     *_counts(lost, row.lost)))  # fmt: skip
    note = "Means over the seeds that finished, and a 95 % interval. sd is in points."
    columns = [Column("cell"), Column("accuracy", "number"), Column("95 % CI", "number"), Column("n", "count"),
               Column("sd", "number"), *(Column(kind, "count") for kind in lost)]  # fmt: skip
    return Table(tuple(columns), tuple(rows), "", note, searchable=True, noun="cells", terminal_rows=_TERMINAL_ROWS)


def _lost_table(results: Results) -> Table | None:
    """Runs without a result, and why."""
    axes = [axis for axis in results.varying() if axis != "norm"]
    seeds: dict[tuple[str, str, str], list[int]] = {}
    for run in results.outcomes:
        if run.status != "done":
            key = cell_label(run.cell, axes), run.status, run.reason or DASH
            seeds.setdefault(key, []).append(run.cell.seed)
    if not seeds:
        return None
    rows = tuple((label, status, ", ".join(map(str, sorted(at))), why) for (label, status, why), at in seeds.items())
    columns = (Column("runs"), Column("status"), Column("seeds"), Column("reason"))
    return Table(columns, rows, terminal_rows=_TERMINAL_ROWS)
