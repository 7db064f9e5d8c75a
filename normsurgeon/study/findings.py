"""What a study shows, in sentences: each with the numbers behind it, and none that the numbers do not carry.

A sentence that says that norms differ (``CLAIMS``) needs an adjusted p below 0.05 in the family "overall and slope on
the batch size"; one about a single setting needs that for the same pair first. So on pure noise, at most 5 % of
studies say anything of the sort (docs/study.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from normsurgeon.reporting.formatting import percent, plural
from normsurgeon.study.estimates import FEWEST, estimate
from normsurgeon.study.pairing import arranged, norm_order
from normsurgeon.study.quantities import Comparison, Rank
from normsurgeon.study.rates import CLOSE, best_rates, rate_curves, unscaled
from normsurgeon.study.records import Outcome, Results
from normsurgeon.study.wording import effect, interval, listed, points, probability, rate_range, setting_label

CLAIMS = ("difference", "batch size", "setting")
"""The kinds of finding that say that norms differ."""
MOST = 6
"""Sentences of one kind; the rest are counted in one line."""


@dataclass(frozen=True)
class Finding:
    """A sentence and the numbers behind it.

    kind      a stable word: ``difference``, ``batch size``, ``setting``, ``no difference``, ``identical``,
              ``too few seeds``, ``no pairs``, ``no results``, ``one norm``, ``learning rate``, ``sensitivity``,
              ``start``, ``diverged``, ``failed``, ``skipped``
    severity  how a reader should take it: ``good`` (shown), ``notice``, ``warning``, ``problem``
    """

    kind: str
    severity: str
    text: str
    numbers: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return asdict(self)


def findings(results: Results, compared: Sequence[Comparison], ranked: Sequence[Rank]) -> tuple[Finding, ...]:
    """The sentences, the headline first, what got lost last.

    >>> [finding.text for finding in findings(Results("empty", ()), (), ())]
    ['No run has a result: there is nothing to compare.']
    """
    main = [c for c in compared if c.scope == "overall"]
    slopes = [c for c in compared if c.scope == "batch size"]
    claimed = {(c.a, c.b) for c in (*main, *slopes) if c.significant}
    located = [c for c in compared if c.scope == "setting" and c.significant and (c.a, c.b) in claimed]
    located.sort(key=lambda c: -abs(c.difference or 0.0))
    parts: tuple[Iterator[Finding], ...] = (
        _enough(results, main, ranked),
        (_slope(c, results) for c in sorted(slopes, key=_strength) if c.significant),
        (_difference(c) for c in sorted(main, key=_strength) if c.significant),
        (_in_setting(c) for c in located),
        _no_difference(main, slopes),
        _rates(results),
        _sensitivity(results),
        _starts(results),
        _lost(results),
    )
    found: list[Finding] = []
    for part in parts:
        for kind, same in groupby(part, key=lambda finding: finding.kind):
            sentences = list(same)
            found += sentences[:MOST]
            if rest := sentences[MOST:]:
                text = f"{plural(len(rest), 'more sentence')} like these: the table of comparisons has the numbers."
                found.append(Finding(kind, "notice", text, {"more": len(rest)}))
    return tuple(found)


def _strength(c: Comparison) -> tuple[float, float]:
    return (c.p_holm if c.p_holm is not None else 1.0, -abs(c.difference or 0.0))


def _enough(results: Results, main: Sequence[Comparison], ranked: Sequence[Rank]) -> Iterator[Finding]:
    """Whether there is anything to be said at all."""
    done = sum(outcome.status in ("done", "diverged") for outcome in results.outcomes)
    if not done:
        yield Finding("no results", "problem", "No run has a result: there is nothing to compare.", {"runs": 0})
        return
    if len(ranked) < 2:
        yield Finding("one norm", "notice", f"One norm only ({ranked[0].norm}): there is nothing to compare it with.",
                      {"norms": len(ranked)})  # fmt: skip
        return
    # Pairs of norms that both have results; others are told of as failed or skipped.
    apart = [c for c in main if c.n == 0]
    few = [c for c in main if 0 < c.n < FEWEST]
    if apart:
        who = listed(f"{c.a} and {c.b}" for c in apart[:MOST])
        text = f"No setting has a result for both {who} with the same seed: they cannot be compared."
        yield Finding("no pairs", "warning", text, {"pairs": [[c.a, c.b] for c in apart]})
    if few:
        most = max(c.n for c in few)
        who = "norms" if len(few) == len(main) else listed(f"{c.a} and {c.b}" for c in few[:MOST])
        shared = len({outcome.cell.seed for outcome in results.outcomes}) < FEWEST
        seeds = plural(most, "seed") + ("" if shared else " that both norms finished with")
        text = (
            f"{seeds} {'is' if most == 1 else 'are'} too few to tell {who} apart: a difference is tested from {FEWEST} "
            "seeds on, and 5 or more find smaller ones."
        )
        numbers = {"seeds": most, "needed": FEWEST, "pairs": [[c.a, c.b] for c in few]}
        yield Finding("too few seeds", "warning", text, numbers)


def _difference(c: Comparison) -> Finding:
    where = f"points on average over {c.settings} settings" if c.settings > 1 else "points"
    return Finding("difference", "good", f"{_beats(c)} {where} {_numbers(c)}.{_diverged(c)}", c.to_dict())


def _in_setting(c: Comparison) -> Finding:
    text = f"With {setting_label(c.setting)}, {_beats(c)} points {_numbers(c)}.{_diverged(c)}"
    return Finding("setting", "good", text, c.to_dict())


def _beats(c: Comparison) -> str:
    better, worse = (c.b, c.a) if c.better == c.b else (c.a, c.b)
    return f"{better} beats {worse} by {points(abs(c.difference or 0.0))}"


def _slope(c: Comparison, results: Results) -> Finding:
    """Which norm loses more where batches get smaller."""
    lines = [(c.a, c.mean_a or 0.0, c.ci_a), (c.b, c.mean_b or 0.0, c.ci_b)]
    worse, better = sorted(lines, key=lambda line: -line[1])
    sizes = sorted({outcome.cell.batch_size for outcome in results.outcomes})

    def change(norm: str, slope: float, ci: tuple[float, float] | None) -> str:
        return f"{norm} {'loses' if slope > 0 else 'gains'} {points(abs(slope))} points ({interval(ci, slope < 0)})"

    text = (
        f"The smaller the batch, the better {better[0]} does against {worse[0]}: with each halving from {sizes[-1]} to "
        f"{sizes[0]}, on average, {change(*worse)} and {change(*better)}. The difference is "
        f"{points(abs(c.difference or 0.0))} points a halving {_numbers(c)}.{_diverged(c)}"
    )
    return Finding("batch size", "good", text, {**c.to_dict(), "batch_sizes": sizes})


def _no_difference(main: Sequence[Comparison], slopes: Sequence[Comparison]) -> Iterator[Finding]:
    for c in main:
        if c.p is None or c.significant:
            continue
        if c.sd == 0 and c.difference is not None and abs(c.difference) < 1e-12:
            same = f"{c.a} and {c.b} came to the same accuracy with each of {c.n} seeds.{_diverged(c)}"
            yield Finding("identical", "notice", same, c.to_dict())
            continue
        bound = f" Up to {points(max(map(abs, c.ci)))} points are not ruled out." if c.ci else ""
        text = (
            f"No difference between {c.a} and {c.b} was shown: {c.a} minus {c.b} is "
            f"{points(c.difference, signed=True)} points {_numbers(c)}.{bound}{_diverged(c)}"
        )
        yield Finding("no difference", "notice", text, c.to_dict())
    tested = [c for c in slopes if c.p is not None]
    if tested and not any(c.significant for c in tested):
        least = min(tested, key=_strength)
        text = (
            "The batch size was not shown to matter more to one norm than to another. The clearest pair is "
            f"{least.a} and {least.b}: {points(abs(least.difference or 0.0))} points a halving {_numbers(least)}."
        )
        yield Finding("no difference", "notice", text, least.to_dict())


def _numbers(c: Comparison) -> str:
    """Interval, effect size, probability and n; of a claim, with the signs of the norm that does better."""
    flip = c.significant and (c.difference or 0.0) < 0
    size = "" if c.effect is None else f"g = {effect(-c.effect if flip else c.effect)}, "
    return f"({interval(c.ci, flip)}; {size}Holm p {probability(c.p_holm)}, n = {c.n} seeds)"


def _diverged(c: Comparison) -> str:
    lost = [(c.a, c.diverged_a), (c.b, c.diverged_b)]
    said = [f"{number} of {c.pairs} runs of {norm}" for norm, number in lost if number]
    if not said:
        return ""
    text = f" Diverged, and counted as 0 right: {listed(said)}"
    if c.finished and c.finished.difference is not None:
        text += (
            f"; where both finished, {c.a} minus {c.b} is {points(c.finished.difference, signed=True)} points"
            f"{' a doubling' if c.scope == 'batch size' else ''} ({interval(c.finished.ci)}, n = {c.finished.n})"
        )
    return f"{text}."


def _rates(results: Results) -> Iterator[Finding]:
    """Which learning rate did best, norm by norm: a choice made on the images that judge it, so no claim is made."""
    best = best_rates(results)
    if not best:
        return
    chosen: dict[str, set[float]] = {}
    edge: dict[str, None] = {}
    for (setting, norm), rate in sorted(best.items(), key=lambda item: norm_order(item[0][1])):
        chosen.setdefault(norm, set()).add(rate)
        tried = [o.cell.lr for o in results.outcomes if all(getattr(o.cell, axis) == value for axis, value in setting)]
        if rate in (min(tried), max(tried)):
            edge[norm] = None
    words = [f"{norm} {listed((f'{r:g}' for r in sorted(rates)), 'or')}" for norm, rates in chosen.items()]
    text = (
        f"The learning rate that did best: {'; '.join(words)}. It was chosen on the same held-out images, so "
        "accuracies at it are a little too good."
    )
    if edge:
        text += f" For {listed(edge)} it lies at the edge of those tried: a better one may lie beyond."
    numbers = {"best": {norm: sorted(rates) for norm, rates in chosen.items()}, "edge": list(edge)}
    yield Finding("learning rate", "notice", text, numbers)


def _sensitivity(results: Results) -> Iterator[Finding]:
    """How much the learning rate matters: for each start, every norm's best rate and those that are about as good."""
    results, size = unscaled(results)
    curves = rate_curves(results)
    begun = {"scratch": "From random weights", "converted": "From converted networks"}
    for start in dict.fromkeys(curve.start for curve in curves):
        words, numbers = [], {}
        for curve in (curve for curve in curves if curve.start == start):
            best, (low, high) = curve.best, curve.close
            words.append(f"{curve.norm} {best.rate:g} ({percent(best.mean)}), {rate_range(low, high)}")
            rates = [asdict(point) for point in curve.points]
            numbers[curve.norm] = {"best": best.rate, "mean": best.mean, "low": low, "high": high, "rates": rates}
        scaled = f" for batches of {size}" if size else ""
        over = f", on average over {curves[0].settings} settings" if curves[0].settings > 1 else ""
        text = (
            f"{begun[start]}, the best learning rate{scaled} and the range within {100 * CLOSE:g} points of it{over}: "
            f"{'; '.join(words)}."
        )
        yield Finding("sensitivity", "notice", text, {"start": start, "lr_batch_size": size, "norms": numbers})


def _starts(results: Results) -> Iterator[Finding]:
    """What converted networks know before they train."""
    it = arranged(results)
    starts = {}
    for arm in it.arms:
        known = [o.start_accuracy for key, o in it.runs.items() if key[1] == arm and o.start_accuracy is not None]
        if known:
            starts[arm[0]] = estimate(known).mean or 0.0
    if starts:
        words = listed(f"{norm} {100 * mean:.1f} %" for norm, mean in starts.items())
        yield Finding("start", "notice", f"Converted networks began with an accuracy of, on average: {words}.",
                      {"start_accuracy": starts})  # fmt: skip


def _lost(results: Results) -> Iterator[Finding]:
    """Runs without a result: which, and why."""
    said = {
        "diverged": ("warning", "diverged (the loss stopped being finite); comparisons count them as 0 right"),
        "failed": ("problem", "failed; comparisons leave their pairs out"),
        "skipped": ("notice", "were skipped as impossible; comparisons leave their pairs out"),
    }
    for status, (severity, words) in said.items():
        runs = [outcome for outcome in results.outcomes if outcome.status == status]
        if not runs:
            continue
        norms: dict[str, int] = {}
        reasons: dict[str, int] = {}
        for run in sorted(runs, key=lambda run: norm_order(run.cell.norm)):
            norms[run.cell.norm] = norms.get(run.cell.norm, 0) + 1
            reasons[_reason(run)] = reasons.get(_reason(run), 0) + 1
        (only, *more) = norms
        whose = f" ({listed(f'{number} of {norm}' for norm, number in norms.items())})" if more else f" of {only}"
        top = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
        why = "; ".join(f"{reason} ({number})" if len(top) > 1 else reason for reason, number in top[:3] if reason)
        rest = f" and {len(top) - 3} more reasons" if len(top) > 3 else ""
        were = (
            words.replace("were skipped", "was skipped").replace("them as", "it as").replace("their pairs", "its pair")
        )
        text = f"{plural(len(runs), 'run')}{whose} {words if len(runs) > 1 else were}{': ' if why else ''}{why}{rest}."
        numbers = {"runs": len(runs), "of": len(results.outcomes), "norms": norms, "reasons": dict(top)}
        yield Finding(status, severity, text, numbers)


def _reason(run: Outcome) -> str:
    return " ".join((run.reason or "").split()).rstrip(".")
