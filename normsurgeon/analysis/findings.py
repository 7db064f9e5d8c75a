"""What stands out in a report, in words: each finding with the number behind it and what one could do about it.

Read off the records alone, by one small function a subject; the thresholds are constants.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from normsurgeon.analysis.records import Comparison, Finding, LayerStatistics, Sensitivity, Similarity
from normsurgeon.analysis.report import Report
from normsurgeon.render.document import Severity
from normsurgeon.render.formatting import exact, plural

FLUCTUATION = (0.25, 0.5)
"""Group statistics that vary by more than these between images: a notice, a warning."""
HEAVY_TAIL = 50.0
TINY, HUGE = 1e-4, 1e4
SAME = 0.995
DRIFT = (0.9, 0.5)
ENOUGH = 200
"""Images below which a silent channel may just have nothing to say about these."""
MOST = 5
"""Findings of one sort; the rest are summed up in one line. In a comparison, one finding a sort."""
GROWN = 1.25
"""Times the baseline's number, from which on a finding that the baseline shows as well is one."""

_SEVERITIES = ("problem", "warning", "notice", "good")


def find(report: Report) -> tuple[Finding, ...]:
    """The findings of a report, the gravest first. With a baseline, of its layers' statistics only what got worse.

    >>> from normsurgeon.analysis.records import Provenance
    >>> find(Report(Provenance("net", "demo", 1, 0, 1, 0, "cpu")))
    ()
    """
    statistics, before = report.statistics or (), report.baseline_statistics
    if report.comparison is not None:
        by_design = {pair.layer for pair in report.comparison.pairs if pair.rewritten}
        statistics = tuple(s for s in statistics if s.layer not in by_design)
    images = report.provenance.images
    parts: list[Iterable[Finding]] = [_nonfinite(statistics)]
    for look in (partial(_dead, images=images), _dormant, _scale, _tails):
        parts.append(_news(look(statistics), look(before), before) if before is not None else look(statistics))
    parts += (
        _fluctuation(statistics),
        _answers(report.comparison),
        _drift(report.comparison, statistics),
        _alike(report.similarity) if before is None else (),
        _sensitive(report.sensitivity or ()),
    )
    found: list[Finding] = []
    for part in parts:
        findings = list(part)
        most = MOST if before is None else 1
        rest = findings[most:]
        if rest and most == 1:
            same = f"{findings[0].text}; {plural(len(rest), 'other layer')} like it, down to {rest[-1].layer}"
            findings[0], rest = replace(findings[0], text=same), []
        found += findings[:most]
        if rest:
            text = f"{len(rest)} more layers like these: {rest[0].layer} … {rest[-1].layer}"
            advice = "the layer table lists them all"
            found.append(Finding(findings[0].kind, rest[0].severity, None, text, "layers", float(len(rest)), advice))
    return tuple(sorted(found, key=lambda finding: _SEVERITIES.index(finding.severity)))


def _news(mine: Iterable[Finding], theirs: Iterable[Finding], before: Sequence[LayerStatistics]) -> Iterator[Finding]:
    """What the baseline does not show at that layer, or by a smaller number, with the baseline's number."""
    shared = {(finding.kind, finding.layer): abs(finding.value or 0.0) for finding in theirs}
    known = {s.layer: s for s in before}
    for finding in mine:
        if abs(finding.value or 0.0) > GROWN * shared.get((finding.kind, finding.layer), -1.0):
            number = getattr(known.get(finding.layer or ""), finding.metric, None)
            yield finding if number is None else replace(finding, text=f"{finding.text}; baseline: {exact(number)}")


def _nonfinite(statistics: Sequence[LayerStatistics]) -> Iterator[Finding]:
    broken = [s for s in statistics if s.nan or s.inf]
    if broken:
        first = broken[0]
        text = (
            f"{first.layer} is the first layer with values that are not finite: {first.nan:,} nan and {first.inf:,} "
            f"inf, from image {first.first_nonfinite} on; {len(broken)} layers have some"
        )
        advice = "look at that image and at the layer's weights; half precision overflows at 65,504"
        number = float(first.nan + first.inf)
        yield Finding("nonfinite", "problem", first.layer, text, "nonfinite_values", number, advice)


def _dead(statistics: Sequence[LayerStatistics], images: int) -> Iterator[Finding]:
    advice = "they can be pruned; a large learning rate or a bad initialisation is the usual cause"
    if images < ENOUGH:
        advice = "look at more images before pruning them"
    for s in sorted((s for s in statistics if s.dead_channels), key=lambda s: -s.dead_channels):
        listed = ", ".join(map(str, s.dead[:6])) + (", …" if s.dead_channels > 6 else "")
        whole = s.dead_channels == s.channels
        severity: Severity = "problem" if whole else "warning" if s.dead_channels >= 0.1 * s.channels else "notice"
        count = f"{'all ' if whole else ''}{s.dead_channels} of {s.channels}"
        text = f"{count} channels of {s.layer} never fire on these {images} images ({listed})"
        yield Finding("dead", severity, s.layer, text, "dead_channels", float(s.dead_channels), advice)


def _dormant(statistics: Sequence[LayerStatistics]) -> Iterator[Finding]:
    advice = "the layer has more width than it uses on these images"
    for s in statistics:
        alive = s.dormant_channels - s.dead_channels
        if alive > 0.25 * s.channels:
            text = (
                f"{alive} of {s.channels} channels of {s.layer} are dormant: on average below a fortieth of the "
                "layer's mean activation"
            )
            yield Finding("dormant", "notice", s.layer, text, "dormant_channels", float(alive), advice)


def _scale(statistics: Sequence[LayerStatistics]) -> Iterator[Finding]:
    for s in statistics:
        if s.std is None or not s.values:
            continue
        if s.std == 0:
            text, advice = f"{s.layer} gives the same value everywhere", "nothing of the image gets through it"
            yield Finding("constant", "warning", s.layer, text, "std", 0.0, advice)
        elif not TINY < s.std < HUGE:
            word = "small" if s.std <= TINY else "large"
            text = f"the output of {s.layer} is very {word}: standard deviation {s.std:.3g}"
            advice = "half precision would lose it; a norm layer after it helps"
            yield Finding("scale", "warning", s.layer, text, "std", s.std, advice)


def _tails(statistics: Sequence[LayerStatistics]) -> Iterator[Finding]:
    advice = "per-sample norms and low-bit quantisation suffer from such outliers"
    heavy = [s for s in statistics if s.kurtosis is not None and s.kurtosis > HEAVY_TAIL and s.kind != "linear"]
    for s in sorted(heavy, key=lambda s: -(s.kurtosis or 0)):
        text = f"a few values of {s.layer} are far out: excess kurtosis {s.kurtosis:.0f}"
        yield Finding("tails", "notice", s.layer, text, "kurtosis", s.kurtosis, advice)


def _fluctuation(statistics: Sequence[LayerStatistics]) -> Iterator[Finding]:
    advice = (
        "a per-sample norm departs from the batch norm most here: keep it (--keep), use fewer groups, or recover it "
        "with data"
    )
    for s in sorted(statistics, key=lambda s: -(s.group_fluctuation or 0)):
        size = s.group_fluctuation or 0
        if size > FLUCTUATION[0]:
            severity: Severity = "warning" if size > FLUCTUATION[1] else "notice"
            groups = f"{s.groups} group{'s' if s.groups != 1 else ''}"
            text = f"what a norm in {groups} divides by at {s.layer} varies by {size:.0%} from image to image"
            yield Finding("fluctuation", severity, s.layer, text, "group_fluctuation", size, advice)


def _answers(comparison: Comparison | None) -> Iterator[Finding]:
    if comparison is None or (share := comparison.agreement) is None:
        return
    answers, error = comparison.answers, ""
    if answers is not None and answers.agreement_stderr is not None:
        error = f" ± {100 * answers.agreement_stderr:.1f}"
    text = (
        f"the network gives {comparison.baseline}'s answer on {100 * share:.1f}{error} % of {comparison.samples} images"
    )
    if answers is not None and answers.accuracy is not None and answers.baseline_accuracy is not None:
        text += (
            f"; {100 * answers.accuracy:.1f} % are right against {100 * answers.baseline_accuracy:.1f} %: "
            f"{answers.lost} right answers were lost, {answers.gained} gained"
        )
    good = share >= DRIFT[0]
    advice = "" if good else "recover it with data (calibrate, reconstruct), or convert fewer layers"
    yield Finding("agreement", "good" if good else "warning", None, text, "agreement", share, advice)


def _drift(comparison: Comparison | None, statistics: Sequence[LayerStatistics]) -> Iterator[Finding]:
    """How far the layers are from the baseline's, and whether that comes from one place or from everywhere."""
    pairs = [pair for pair in comparison.pairs if not pair.rewritten] if comparison else []
    known = [pair for pair in pairs if pair.relative_error is not None and pair.cosine is not None]
    if not known:
        return
    if max(pair.relative_error or 0.0 for pair in known) < 1e-4:
        text = f"all {len(known)} layers give what the baseline's give"
        yield Finding("same", "good", None, text, "relative_error", max(pair.relative_error or 0.0 for pair in known))
        return
    drifted = [pair for pair in known if (pair.cosine or 0.0) < DRIFT[0]]
    if not drifted:
        return
    worst = min(drifted, key=lambda pair: pair.cosine or 0.0)
    text = (
        f"{len(drifted)} of {len(known)} layers no longer give what the baseline's give, {worst.layer} least (cosine "
        f"{worst.cosine:.2f})"
    )
    kinds = {s.layer: s.kind for s in statistics}
    trunk = [p for p in known if kinds.get(p.layer) == "block"] or [p for p in known if kinds.get(p.layer) == "norm"]
    gains = _gains([(pair.layer, pair.relative_error or 0.0) for pair in trunk])
    advice = "the layer table says where; recover it with data, or convert fewer layers"
    if gains:
        place, share = max(gains.items(), key=lambda gain: gain[1])
        text += f"; of what the squared error of the {len(trunk)} {kinds[place]}s gains, {share:.0%} is at {place}"
        advice = (
            f"concentrated: keep the batch norms there (--keep '{place}*') or give them another target"
            if share >= 0.5
            else "it grows along the network: recovery with data, or a target that costs less, helps more than --keep"
        )
    severity: Severity = "warning" if (worst.cosine or 0.0) < DRIFT[1] else "notice"
    yield Finding("drift", severity, worst.layer, text, "cosine", worst.cosine, advice)


def _gains(errors: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Of the growth of the squared error along the network, each layer's share.

    >>> _gains([("a", 1.0), ("b", 1.0), ("c", 2.0)])
    {'a': 0.25, 'b': 0.0, 'c': 0.75}
    """
    squares = [0.0, *(error * error for _, error in errors)]
    gains = {name: max(0.0, squares[i + 1] - squares[i]) for i, (name, _) in enumerate(errors)}
    total = sum(gains.values())
    return {name: gain / total for name, gain in gains.items()} if total else {}


def _alike(similarity: Similarity | None) -> Iterator[Finding]:
    """Runs of neighbouring layers that say nearly the same."""
    if similarity is None:
        return
    layers, run = similarity.layers, 0
    for place in range(len(layers)):
        value = similarity.cka[place][place + 1] if place + 1 < len(layers) else None
        if value is not None and value > SAME:
            run += 1
            continue
        if run >= 5:
            text = (
                f"{run + 1} layers in a row, {layers[place - run]} to {layers[place]}, carry nearly the same "
                f"information (CKA above {SAME} from one to the next)"
            )
            advice = "the network may be deeper there than the images need"
            yield Finding("redundant", "notice", layers[place], text, "layers", float(run + 1), advice)
        run = 0


def _sensitive(sensitivity: tuple[Sensitivity, ...]) -> Iterator[Finding]:
    for entry in sensitivity:
        # A block holds its children's sensitivity: it is none of its own.
        inner = {
            name[:i] for name in (score.name for score in entry.layers) for i, sign in enumerate(name) if sign == "."
        }
        known = [score for score in entry.layers if score.name not in inner]
        scores = [(score.score, score.name) for score in known if score.score is not None and score.score > 0]
        total = sum(score for score, _ in scores)
        if len(scores) < 4 or not total:
            continue
        score, name = max(scores)
        if score > 0.25 * total:
            text = f"{name} holds {score / total:.0%} of the loss's sensitivity by {entry.method.replace('_', ' ')}"
            advice = "leave it in full precision, and train it with care"
            yield Finding("sensitive", "notice", name, text, entry.method, score, advice)
