"""The answer as tables of words, which the terminal, the plain text and the page all show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from normsurgeon.reporting.formatting import DASH, percent, plural, significant
from normsurgeon.study.answer import Answer
from normsurgeon.study.quantities import Comparison, Crossing
from normsurgeon.study.rates import CLOSE, RateCurve, rate_curves, unscaled
from normsurgeon.study.records import LayerSummary, Outcome
from normsurgeon.study.wording import (
    axis_title,
    effect,
    interval,
    plus_minus,
    points,
    probability,
    rate_range,
    setting_label,
    value_label,
)

LOST = ("diverged", "failed", "skipped")


@dataclass(frozen=True)
class Panel:
    """A table: the first column names the row, the most telling ones come next. ``texts``: columns of words."""

    id: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    texts: tuple[int, ...] = (0,)


def ranking_panel(answer: Answer) -> Panel:
    """The norms from the best to the worst; ties share a rank."""
    lost = [kind for kind in LOST if any(getattr(rank, kind) for rank in answer.ranking)]
    rows = tuple(
        (
            rank.norm,
            str(rank.rank) if rank.rank is not None else DASH,
            percent(rank.mean),
            plus_minus(rank.ci),
            ", ".join(rank.worse_than) or DASH,
            str(rank.n),
            *(str(getattr(rank, kind)) for kind in lost),
        )
        for rank in answer.ranking
    )
    settings = max((rank.settings for rank in answer.ranking), default=0)
    note = "A norm's rank is 1 + the number of norms that are significantly better overall, so norms may share one."
    if settings > 1:
        note += f" Means are over the {settings} settings in which every ranked norm has a result with the same seeds."
    if any(rank.diverged for rank in answer.ranking):
        note += " A diverged run counts as 0 right."
    header = ("norm", "rank", "accuracy", "95 % CI", "worse than", "seeds", *lost)
    return Panel("ranking", "Ranking", header, rows, note, (0, 4))


def comparison_panels(answer: Answer) -> Iterator[Panel]:
    """Every two norms: overall, their slopes, at the best learning rate, and setting by setting."""
    holm = "Holm p is adjusted for all comparisons in this family"
    said: tuple[tuple[str, str, str], ...] = (
        ("overall", "Norms compared, overall", "Points of accuracy, paired by seed; each seed's differences are "
         f"averaged over the settings first. {holm}, that of the batch size included."),
        ("batch size", "Norms compared, by how batch size matters", "Difference of the slopes, in points of accuracy "
         "a doubling of the batch size. Where it is negative, larger batches help the second norm more."),
        ("best lr", "Norms compared, each at its best learning rate", "The rate was chosen on the same held-out "
         f"images: no finding rests on this. {holm}."),
        ("setting", "Norms compared, setting by setting", f"{holm}."),
    )  # fmt: skip
    for scope, title, note in said:
        found = answer.scope(scope)
        if found:
            yield comparison_panel(f"compared-{scope.replace(' ', '-')}", title, note, found)


def comparison_panel(name: str, title: str, note: str, found: Sequence[Comparison]) -> Panel:
    """Differences with all that is behind them."""
    diverged = any(c.diverged_a or c.diverged_b for c in found)
    columns = ("difference", "95 % CI", "Holm p", "g", "p", "seeds", "pairs", "lost")
    header = ("norms", "setting", *columns) if found[0].scope == "setting" else ("norms", *columns)
    rows = []
    for c in found:
        row = [
            f"{c.a} − {c.b}",
            points(c.difference, signed=True) + (" *" if c.significant else ""),
            interval(c.ci).removeprefix("95 % CI ").replace("no interval", DASH),
            probability(c.p_holm).removeprefix("= "),
            effect(c.effect),
            probability(c.p).removeprefix("= "),
            str(c.n),
            str(c.pairs),
            str(c.lost),
        ]
        if c.scope == "setting":
            row.insert(1, setting_label(c.setting))
        if diverged:
            row.append(", ".join(f"{n} {norm}" for norm, n in ((c.a, c.diverged_a), (c.b, c.diverged_b)) if n) or DASH)
        rows.append(tuple(row))
    star = " * marks an adjusted p below 0.05." if any(c.significant for c in found) else ""
    texts = (0, 1) if found[0].scope == "setting" else (0,)
    return Panel(name, title, (*header, *(("diverged",) if diverged else ())), tuple(rows), note + star, texts)


def crossing_panel(crossing: Crossing, long: bool = False) -> Panel:
    """Norm × axis, in per cent: a row a level, a column a norm; ``long``: a row for each of the two together."""
    known = {(cell[0], cell[1]): cell[2:] for cell in crossing.cells if cell[2] is not None}
    norms = [norm for norm in crossing.norms if any(key[1] == norm for key in known)]
    axis = axis_title(crossing.axis)

    def text(level: Any, norm: str) -> tuple[str, str]:
        if (level, norm) not in known:
            return DASH, ""
        mean, ci, _, diverged = known[level, norm]
        return f"{points(mean, digits=1)} {plus_minus(ci)}".strip(), str(diverged) if diverged else ""

    labels = [(level, value_label(crossing.axis, level)) for level in crossing.levels]
    rows: list[tuple[str, ...]]
    if long:
        rows = [(f"{axis} {label}, {norm}", *text(level, norm)) for level, label in labels for norm in norms]
        header: tuple[str, ...] = (f"{axis}, norm", "accuracy", "diverged")
        if not any(lost for _, _, lost in rows):
            header, rows = header[:2], [row[:2] for row in rows]
    else:
        cells = [(label, [text(level, norm) for norm in norms]) for level, label in labels]
        rows = [(label, *(f"{mean} ({lost} diverged)" if lost else mean for mean, lost in row)) for label, row in cells]
        header = (axis, *norms)
    over = f"averaged over {crossing.settings} other settings" if crossing.settings > 1 else ""
    seeds = max((cell[4] for cell in crossing.cells), default=0)
    note = ", ".join(x for x in ("Accuracy in per cent ± half the 95 % interval", over, plural(seeds, "seed")) if x)
    alone = [norm for norm in crossing.norms if norm not in norms]
    said = f" No result: {', '.join(alone)}." if alone and norms else ""
    if not norms:
        note, said = "No setting has a result for every norm with the same seeds", ""
    return Panel(f"crossing-{crossing.axis}", f"{axis.capitalize()} × norm", header, tuple(rows), f"{note}.{said}")


def rate_panel(answer: Answer) -> Panel | None:
    """Accuracy against the learning rate: a row for each start and norm, a column for each rate; None for one rate."""
    results, size = unscaled(answer.results)
    curves = rate_curves(results)
    if not curves:
        return None
    rates = sorted({point.rate for curve in curves for point in curve.points})
    rows = []
    for curve in curves:
        at = {point.rate: f"{points(point.mean, digits=1)} {plus_minus(point.ci)}".strip() for point in curve.points}
        about = (f"{curve.best.rate:g}", percent(curve.best.mean), rate_range(*curve.close))
        rows.append((rate_label(curve, curves), *about, *(at.get(rate, DASH) for rate in rates)))
    alike = f"within {100 * CLOSE:g} points"
    note = f"Accuracy in per cent ± half the 95 % interval, {plural(curves[0].points[0].n, 'seed')}"
    note += f", averaged over {curves[0].settings} other settings" if curves[0].settings > 1 else ""
    note += f". Rates are for batches of {size}" if size else ""
    note += f". The range {alike} of the best rate is unbroken: every rate in it that was tried is that close."
    if any(point.diverged for curve in curves for point in curve.points):
        note += " A diverged run counts as 0 right."
    name = "norm" if rate_label(curves[0], curves) == curves[0].norm else "norm, start"
    header = (name, "best rate", "accuracy", alike, *(f"{r:g}" for r in rates))
    return Panel("rates-table", "Accuracy against learning rate", header, tuple(rows), note)


def rate_label(curve: RateCurve, curves: Sequence[RateCurve]) -> str:
    """A curve's norm, with its start where there are several."""
    return f"{curve.norm}, {curve.start}" if len({each.start for each in curves}) > 1 else curve.norm


def table_panel(answer: Answer, joined: bool = False) -> Panel:
    """Every cell, its seeds pooled; ``joined`` puts all that names a cell into the first column."""
    axes = [axis for axis in answer.results.varying() if axis != "norm"]
    lost = [kind for kind in LOST if any(getattr(row, kind) for row in answer.table)]
    rows = []
    for row in answer.table:
        setting = tuple((axis, getattr(row.cell, axis)) for axis in axes)
        names = [row.cell.norm, *(row.cell.label(axis) for axis in axes)]
        if joined:
            names = [", ".join(x for x in (row.cell.norm, setting_label(setting)) if x)]
        numbers = [percent(row.mean), plus_minus(row.ci), str(row.n), points(row.sd)]
        rows.append((*names, *numbers, *(str(getattr(row, kind)) for kind in lost)))
    header = ("cell",) if joined else ("norm", *map(axis_title, axes))
    note = "Means over the seeds that finished, and Student's 95 % interval. sd is in points."
    titles = (*header, "accuracy", "95 % CI", "n", "sd", *lost)
    return Panel("cells", "Every cell", titles, tuple(rows), note, tuple(range(len(header))))


def lost_panel(answer: Answer) -> Panel | None:
    """Runs without a result, and why."""
    runs = [outcome for outcome in answer.results.outcomes if outcome.status != "done"]
    if not runs:
        return None
    seeds: dict[tuple[str, str, str], list[int]] = {}
    for run in runs:
        seeds.setdefault((run_label(answer, run), run.status, run.reason or DASH), []).append(run.cell.seed)
    rows = tuple((label, status, ", ".join(map(str, sorted(at))), why) for (label, status, why), at in seeds.items())
    return Panel("lost", "Runs without a result", ("runs", "status", "seeds", "reason"), rows, texts=(0, 1, 2, 3))


def run_label(answer: Answer, run: Outcome) -> str:
    """A run's norm and setting in words."""
    axes = [axis for axis in answer.results.varying() if axis != "norm"]
    said = setting_label(tuple((axis, getattr(run.cell, axis)) for axis in axes))
    return f"{run.cell.norm}, {said}" if said else run.cell.norm


def layer_panel(name: str, title: str, layers: Sequence[LayerSummary]) -> Panel:
    """The layers of one network that was looked at."""
    columns: tuple[tuple[str, str, Any], ...] = (
        ("mean", "mean", significant), ("std", "std", significant), ("sensitivity", "sensitivity", significant),
        ("effective_rank", "eff. rank", significant), ("zero_fraction", "zeros", percent),
        ("dead_fraction", "dead", percent), ("group_fluctuation", "group fluct.", significant),
    )  # fmt: skip
    used = [c for c in columns if any(getattr(layer, c[0]) is not None for layer in layers)]
    rows = tuple(
        (layer.layer, layer.kind, *(form(getattr(layer, key)) for key, _, form in used), str(layer.channels))
        for layer in layers
    )
    header = ("layer", "kind", *(label for _, label, _ in used), "channels")
    return Panel(name, title, header, rows, texts=(0, 1))


def facts(answer: Answer) -> tuple[tuple[str, str], ...]:
    """What was studied, in a few pairs of words."""
    results = answer.results
    counts = ", ".join(f"{number} {kind}" for kind, number in results.counts().items() if number)
    cells = [outcome.cell for outcome in results.outcomes]
    told = [("Runs", counts or "none"), ("Norms", ", ".join(answer.norms)), ("Seeds", str(len(answer.seeds)))]
    for axis in ("model", "dataset", "start", "batch_size", "activation", "preprocessing", "regularization", "lr"):
        labels = list(dict.fromkeys(cell.label(axis) for cell in cells))
        if axis in ("model", "dataset") or len(labels) > 1:
            told.append((axis_title(axis).capitalize(), ", ".join(labels)))
    return tuple((name, words) for name, words in told if words)
