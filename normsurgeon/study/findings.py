"""What a study shows, in sentences: each with the numbers behind it, and none that the numbers do not carry.

A sentence that states that norms differ (``CLAIMS``) needs an adjusted p below 0.05 in the family "overall and slope on
the batch size"; one about a single setting needs that for the same pair first. So on pure noise, at most 5 % of
studies claim anything of the sort (docs/study.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np

from normsurgeon._util.estimates import MIN_REPLICATES, Interval, effect, estimate, interval, points, probability
from normsurgeon.render.document import Severity
from normsurgeon.render.formatting import joined, percent, plural
from normsurgeon.study.records import Cell, Results
from normsurgeon.study.statistics import (
    CLOSE,
    LR_LEVEL,
    Block,
    Comparison,
    Rank,
    Setting,
    arranged,
    best_rates,
    norm_order,
    rate_curves,
    setting_axes,
    setting_of,
    unscaled,
)

CLAIMS = ("difference", "batch size", "setting")
"""The kinds of finding that state that norms differ."""
MAX_SENTENCES = 6
"""Of one kind; the rest are counted in one line."""


@dataclass(frozen=True)
class StudyFinding:
    """A sentence and the numbers behind it.

    kind      a stable word: ``difference``, ``batch size``, ``setting``, ``no difference``, ``identical``,
              ``too few seeds``, ``no pairs``, ``no results``, ``one norm``, ``chance``, ``learning rate``,
              ``sensitivity``, ``start``, ``diverged``, ``failed``, ``skipped``
    severity  how a reader should take it: ``good`` (shown), ``notice``, ``warning``, ``problem``
    """

    kind: str
    severity: Severity
    text: str
    numbers: dict[str, Any]


def findings(results: Results, compared: Sequence[Comparison], ranked: Sequence[Rank]) -> tuple[StudyFinding, ...]:
    """The sentences, the headline first, what got lost last.

    >>> [finding.text for finding in findings(Results("empty", ()), (), ())]
    ['No run has a result: there is nothing to compare.']
    """
    main = sorted((c for c in compared if c.scope == "overall"), key=_strength)
    slopes = sorted((c for c in compared if c.scope == "batch size"), key=_strength)
    claimed = {(c.a, c.b) for c in (*main, *slopes) if c.significant}
    located = [c for c in compared if c.scope == "setting" and c.significant and (c.a, c.b) in claimed]
    located.sort(key=lambda c: -abs(c.difference or 0.0))
    parts: tuple[Iterator[StudyFinding], ...] = (
        _enough(results, [c for c in compared if c.scope == "overall"], ranked),
        _chance(results),
        (_slope(c, results) for c in slopes if c.significant),
        (_difference(c) for c in main if c.significant),
        (_difference(c, f"With {setting_label(c.setting)}, ") for c in located),
        _no_difference([c for c in compared if c.scope == "overall"], slopes),
        _rates(results),
        _sensitivity(results),
        _starts(results),
        _lost(results),
    )
    found: list[StudyFinding] = []
    for part in parts:
        for kind, same in groupby(part, key=lambda finding: finding.kind):
            sentences = list(same)
            found += sentences[:MAX_SENTENCES]
            if rest := len(sentences[MAX_SENTENCES:]):
                text = f"{plural(rest, 'more sentence')} like these: the table of comparisons has the numbers."
                found.append(StudyFinding(kind, "notice", text, {"more": rest}))
    return tuple(found)


def _strength(c: Comparison) -> tuple[float, float]:
    return (c.p_holm if c.p_holm is not None else 1.0, -abs(c.difference or 0.0))


def _enough(results: Results, main: Sequence[Comparison], ranked: Sequence[Rank]) -> Iterator[StudyFinding]:
    """Whether there is anything to compare."""
    counts = results.counts()
    if not counts["done"] + counts["diverged"]:
        yield StudyFinding("no results", "problem", "No run has a result: there is nothing to compare.", {"runs": 0})
        return
    if len(ranked) < 2:
        text = f"One norm only ({ranked[0].norm}): there is nothing to compare it with."
        yield StudyFinding("one norm", "notice", text, {"norms": len(ranked)})
        return
    # Pairs of norms that both have results; the findings on failed and skipped runs are about others.
    apart = [c for c in main if c.n == 0]
    few = [c for c in main if 0 < c.n < MIN_REPLICATES]
    if apart:
        who = listed(f"{c.a} and {c.b}" for c in apart[:MAX_SENTENCES])
        text = f"No setting has a result for both {who} with the same seed: they cannot be compared."
        yield StudyFinding("no pairs", "warning", text, {"pairs": [[c.a, c.b] for c in apart]})
    if few:
        most = max(c.n for c in few)
        who = "norms" if len(few) == len(main) else listed(f"{c.a} and {c.b}" for c in few[:MAX_SENTENCES])
        all_few = len({outcome.cell.seed for outcome in results.outcomes}) < MIN_REPLICATES
        seeds = plural(most, "seed") + ("" if all_few else " that both norms finished with")
        text = (
            f"{seeds} {'is' if most == 1 else 'are'} too few to tell {who} apart: a difference is tested from "
            f"{MIN_REPLICATES} seeds on, and 5 or more find smaller ones."
        )
        numbers = {"seeds": most, "needed": MIN_REPLICATES, "pairs": [[c.a, c.b] for c in few]}
        yield StudyFinding("too few seeds", "warning", text, numbers)


def _chance(results: Results) -> Iterator[StudyFinding]:
    """Where nothing was learned: differences among such networks say nothing about norms."""
    it = arranged(results)
    seeds, lost = np.arange(len(it.seeds)), []
    for i, setting in enumerate(it.settings):
        for arm in it.scored:
            known = ~np.isnan(it.score_SAK[i, arm])
            if known.any() and not it.learned(Block(np.array([i]), seeds[known], 0), arm):
                lost.append((it.arms[arm][0], setting))
    if not lost:
        return
    tried = sum(len(it.scored) for _ in it.settings)
    chance = max(outcome.chance or 0.0 for outcome in results.outcomes)
    words = [joined((norm, setting_label(setting)), ", ") for norm, setting in lost]
    named = listed(words[:MAX_SENTENCES]) + (
        f" and {len(words) - MAX_SENTENCES} more" if len(words) > MAX_SENTENCES else ""
    )
    text = (
        f"{'Nothing was learned' if len(lost) == tried else 'Some networks learned nothing'}: with {named}, accuracies "
        f"are those of guessing (the commonest class is {percent(chance)}). They carry no claim about norms."
    )
    numbers = {"chance": chance, "of": tried, "cells": [{"norm": norm, **dict(setting)} for norm, setting in lost]}
    yield StudyFinding("chance", "warning", text, numbers)


def _difference(c: Comparison, where: str = "") -> StudyFinding:
    better, worse = (c.b, c.a) if c.better == c.b else (c.a, c.b)
    over = f" on average over {c.settings} settings" if c.settings > 1 else ""
    beats = f"{better} beats {worse} by {points(abs(c.difference or 0.0))} points{over}"
    return StudyFinding(
        "setting" if where else "difference", "good", f"{where}{beats} {_numbers(c)}.{_diverged(c)}", c.to_dict()
    )


def _slope(c: Comparison, results: Results) -> StudyFinding:
    """Which norm loses more as batches get smaller."""
    lines = [(c.a, c.mean_a or 0.0, c.ci_a), (c.b, c.mean_b or 0.0, c.ci_b)]
    worse, better = sorted(lines, key=lambda line: -line[1])
    sizes = sorted({outcome.cell.batch_size for outcome in results.outcomes})

    def change(norm: str, slope: float, ci: Interval | None) -> str:
        return f"{norm} {'loses' if slope > 0 else 'gains'} {points(abs(slope))} points ({interval(ci, slope < 0)})"

    text = (
        f"The smaller the batch, the better {better[0]} does against {worse[0]}: with each halving from {sizes[-1]} to "
        f"{sizes[0]}, on average, {change(*worse)} and {change(*better)}. The difference is "
        f"{points(abs(c.difference or 0.0))} points a halving {_numbers(c)}.{_diverged(c)}"
    )
    return StudyFinding("batch size", "good", text, {**c.to_dict(), "batch_sizes": sizes})


def _no_difference(main: Sequence[Comparison], slopes: Sequence[Comparison]) -> Iterator[StudyFinding]:
    for c in main:
        if c.p is None or c.significant or not c.learned:
            continue
        if c.sd == 0 and c.difference is not None and abs(c.difference) < 1e-12:
            same = f"{c.a} and {c.b} came to the same accuracy with each of {c.n} seeds.{_diverged(c)}"
            yield StudyFinding("identical", "notice", same, c.to_dict())
            continue
        bound = f" Up to {points(max(map(abs, c.ci)))} points are not ruled out." if c.ci else ""
        text = (
            f"No difference between {c.a} and {c.b} was shown: {c.a} minus {c.b} is "
            f"{points(c.difference, signed=True)} points {_numbers(c)}.{bound}{_diverged(c)}"
        )
        yield StudyFinding("no difference", "notice", text, c.to_dict())
    tested = [c for c in slopes if c.p is not None and c.learned]
    if tested and not any(c.significant for c in tested):
        clearest = tested[0]
        text = (
            "The batch size was not shown to matter more to one norm than to another. The clearest pair is "
            f"{clearest.a} and {clearest.b}: {points(abs(clearest.difference or 0.0))} points a halving "
            f"{_numbers(clearest)}."
        )
        yield StudyFinding("no difference", "notice", text, clearest.to_dict())


def _numbers(c: Comparison) -> str:
    """Interval, effect size, probability and n; of a claim, with the signs of the norm that does better."""
    flip = c.significant and (c.difference or 0.0) < 0
    size = "" if c.effect is None else f"g = {effect(-c.effect if flip else c.effect)}, "
    return f"({interval(c.ci, flip)}; {size}Holm p {probability(c.p_holm)}, n = {c.n} seeds)"


def _diverged(c: Comparison) -> str:
    counts = [f"{n} of {c.pairs} runs of {norm}" for norm, n in ((c.a, c.diverged_a), (c.b, c.diverged_b)) if n]
    if not counts:
        return ""
    text, left = f" Diverged, and counted as 0 right: {listed(counts)}", c.finished
    if left and left["difference"] is not None:
        text += (
            f"; where both finished, {c.a} minus {c.b} is {points(left['difference'], signed=True)} points"
            f"{' a doubling' if c.scope == 'batch size' else ''} ({interval(left['ci'])}, n = {left['n']})"
        )
    return f"{text}."


def _rates(results: Results) -> Iterator[StudyFinding]:
    """Which learning rate did best, norm by norm: a choice made on the images that judge it, so no claim is made."""
    chosen: dict[str, set[float]] = {}
    edge: dict[str, None] = {}
    axes = [axis for axis in setting_axes(results) if axis != "lr"]
    for (setting, norm), rate in sorted(best_rates(results).items(), key=lambda item: norm_order(item[0][1])):
        chosen.setdefault(norm, set()).add(rate)
        tried = [outcome.cell.lr for outcome in results.outcomes if setting_of(outcome.cell, axes) == setting]
        if rate in (min(tried), max(tried)):
            edge[norm] = None
    if not chosen:
        return
    words = [f"{norm} {listed((f'{r:g}' for r in sorted(rates)), 'or')}" for norm, rates in chosen.items()]
    text = (
        f"The learning rate that did best: {'; '.join(words)}. It was chosen on the same held-out images, so "
        "accuracies at it are a little too good."
    )
    if edge:
        text += f" For {listed(edge)} it lies at the edge of those tried: a better one may lie beyond."
    numbers = {"best": {norm: sorted(rates) for norm, rates in chosen.items()}, "edge": list(edge)}
    yield StudyFinding("learning rate", "notice", text, numbers)


def _sensitivity(results: Results) -> Iterator[StudyFinding]:
    """How much the learning rate matters: for each start, every norm's best rate and those that are about as good."""
    results, size = unscaled(results)
    curves = rate_curves(results)
    begun = {"scratch": "From random weights", "converted": "From converted networks"}
    for start in dict.fromkeys(curve.start for curve in curves):
        words, numbers = [], {}
        for curve in (curve for curve in curves if curve.start == start):
            best, (low, high) = curve.best, curve.close
            words.append(f"{curve.norm} {best.x:g} ({percent(best.mean)}), {rate_range(low, high)}")
            rates = [
                {"rate": point.x, **{k: v for k, v in asdict(point).items() if k != "x"}} for point in curve.points
            ]
            numbers[curve.norm] = {"best": best.x, "mean": best.mean, "low": low, "high": high, "rates": rates}
        scaled = f" for batches of {size}" if size else ""
        over = f", on average over {curves[0].settings} settings" if curves[0].settings > 1 else ""
        text = (
            f"{begun[start]}, the best learning rate{scaled} and the range within {100 * CLOSE:g} points of it{over}: "
            f"{'; '.join(words)}."
        )
        yield StudyFinding("sensitivity", "notice", text, {"start": start, "lr_batch_size": size, "norms": numbers})


def _starts(results: Results) -> Iterator[StudyFinding]:
    """How accurate converted networks are before they train."""
    known: dict[str, list[float]] = {}
    for outcome in results.outcomes:
        if outcome.start_accuracy is not None:
            known.setdefault(outcome.cell.norm, []).append(outcome.start_accuracy)
    starts = {norm: estimate(known[norm]).mean or 0.0 for norm in sorted(known, key=norm_order)}
    if starts:
        words = listed(f"{norm} {100 * mean:.1f} %" for norm, mean in starts.items())
        text = f"Converted networks began with an accuracy of, on average: {words}."
        yield StudyFinding("start", "notice", text, {"start_accuracy": starts})


_WITHOUT_RESULT: dict[str, tuple[Severity, str, str]] = {
    "diverged": ("warning", "diverged (the loss stopped being finite); comparisons count it as 0 right",
                 "diverged (the loss stopped being finite); comparisons count them as 0 right"),
    "failed": ("problem", "failed; comparisons leave its pair out", "failed; comparisons leave their pairs out"),
    "skipped": ("notice", "was skipped as impossible; comparisons leave its pair out",
                "were skipped as impossible; comparisons leave their pairs out"),
}  # fmt: skip


def _lost(results: Results) -> Iterator[StudyFinding]:
    """Runs without a result: which, and why."""
    for status, (severity, one, several) in _WITHOUT_RESULT.items():
        runs = [outcome for outcome in results.outcomes if outcome.status == status]
        if not runs:
            continue
        norms = Counter(sorted((run.cell.norm for run in runs), key=norm_order))
        reasons = Counter(" ".join((run.reason or "").split()).rstrip(".") for run in runs)
        (only, *more) = norms
        whose = f" ({listed(f'{number} of {norm}' for norm, number in norms.items())})" if more else f" of {only}"
        top = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
        why = "; ".join(f"{reason} ({number})" if len(top) > 1 else reason for reason, number in top[:3] if reason)
        rest = f" and {len(top) - 3} more reasons" if len(top) > 3 else ""
        words = several if len(runs) > 1 else one
        text = f"{plural(len(runs), 'run')}{whose} {words}{': ' if why else ''}{why}{rest}."
        numbers = {"runs": len(runs), "of": len(results.outcomes), "norms": dict(norms), "reasons": dict(top)}
        yield StudyFinding(status, severity, text, numbers)


# Words


TITLES = {
    "batch_size": "batch size", "lr": "learning rate", "preprocessing": "pre-processing", "dataset": "data set",
    LR_LEVEL: "learning rate",
}  # fmt: skip
"""An axis' name as a reader sees it, if it is another one."""


def value_label(axis: str, value: Any) -> str:
    """One value as a reader sees it.

    >>> value_label("regularization", (("weight_decay", 0.0005),)), value_label("batch_size", 8)
    ('weight_decay=0.0005', '8')
    """
    if axis == LR_LEVEL:
        return f"no. {value + 1}"
    return Cell(**{"model": "", "dataset": "", axis: value}).label(axis)


def setting_label(setting: Setting) -> str:
    """A setting in words: values that explain themselves bare, others with their axis.

    >>> setting_label((("model", "resnet8"), ("batch_size", 2), ("preprocessing", "none")))
    'resnet8, batch size 2, pre-processing none'
    """
    words = []
    for axis, value in setting:
        label = value_label(axis, value)
        bare = axis in ("model", "dataset") or label in ("scratch", "converted") or "=" in label
        words.append(label if bare else f"{TITLES.get(axis, axis)} {label}")
    return ", ".join(words)


def cell_label(cell: Cell, axes: Iterable[str], norm: bool = True) -> str:
    """A cell's norm, and its values of these axes."""
    return joined((cell.norm if norm else "", setting_label(setting_of(cell, axes))), ", ")


def rate_range(low: float, high: float) -> str:
    """Learning rates from one to another, both of them tried."""
    return f"{low:g} alone" if low == high else f"{low:g} to {high:g}"


def listed(words: Iterable[str], last: str = "and") -> str:
    """Words in a row.

    >>> listed(["bn"]), listed(["bn", "gn", "ln"])
    ('bn', 'bn, gn and ln')
    """
    *first, end = list(words)
    return f"{', '.join(first)} {last} {end}" if first else end
