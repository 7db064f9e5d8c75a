"""What stands out in a report, in words: each finding with the number behind it and what one could do about it.

Read off the records alone, by one small function a subject; the thresholds are constants.
"""

from __future__ import annotations

from collections.abc import Iterator

from normsurgeon.analysis.records import Comparison, Finding, LayerStatistics, Sensitivity, Similarity
from normsurgeon.analysis.report import Report
from normsurgeon.render.document import Severity

FLUCTUATION = (0.25, 0.5)
"""Group statistics that vary by more than these between images: a notice, a warning."""
HEAVY_TAIL = 50.0
TINY, HUGE = 1e-4, 1e4
SAME = 0.995
DRIFT = (0.9, 0.5)
ENOUGH = 200
"""Images below which a silent channel may just have nothing to say about these."""
MOST = 5
"""Findings of one sort; the rest are summed up in one line."""

_SEVERITIES = ("problem", "warning", "notice", "good")


def find(report: Report) -> tuple[Finding, ...]:
    """The findings of a report, the gravest first.

    >>> from normsurgeon.analysis.records import Provenance
    >>> find(Report(Provenance("net", "demo", 1, 0, 1, 0, "cpu")))
    ()
    """
    statistics = report.statistics or ()
    found: list[Finding] = []
    for part in (
        _nonfinite(statistics),
        _dead(statistics, report.provenance.images),
        _dormant(statistics),
        _scale(statistics),
        _tails(statistics),
        _fluctuation(statistics),
        _compared(report.comparison),
        _alike(report.similarity),
        _sensitive(report.sensitivity or ()),
    ):
        findings = list(part)
        found += findings[:MOST]
        if rest := findings[MOST:]:
            text = f"{len(rest)} more layers like these: {rest[0].layer} … {rest[-1].layer}"
            advice = "the layer table lists them all"
            found.append(Finding(findings[0].kind, rest[0].severity, None, text, "layers", float(len(rest)), advice))
    return tuple(sorted(found, key=lambda finding: _SEVERITIES.index(finding.severity)))


def _nonfinite(statistics: tuple[LayerStatistics, ...]) -> Iterator[Finding]:
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


def _dead(statistics: tuple[LayerStatistics, ...], images: int) -> Iterator[Finding]:
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


def _dormant(statistics: tuple[LayerStatistics, ...]) -> Iterator[Finding]:
    advice = "the layer has more width than it uses on these images"
    for s in statistics:
        alive = s.dormant_channels - s.dead_channels
        if alive > 0.25 * s.channels:
            text = (
                f"{alive} of {s.channels} channels of {s.layer} are dormant: on average below a fortieth of the "
                "layer's mean activation"
            )
            yield Finding("dormant", "notice", s.layer, text, "dormant_channels", float(alive), advice)


def _scale(statistics: tuple[LayerStatistics, ...]) -> Iterator[Finding]:
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


def _tails(statistics: tuple[LayerStatistics, ...]) -> Iterator[Finding]:
    advice = "per-sample norms and low-bit quantisation suffer from such outliers"
    heavy = [s for s in statistics if s.kurtosis is not None and s.kurtosis > HEAVY_TAIL and s.kind != "linear"]
    for s in sorted(heavy, key=lambda s: -(s.kurtosis or 0)):
        text = f"a few values of {s.layer} are far out: excess kurtosis {s.kurtosis:.0f}"
        yield Finding("tails", "notice", s.layer, text, "kurtosis", s.kurtosis, advice)


def _fluctuation(statistics: tuple[LayerStatistics, ...]) -> Iterator[Finding]:
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


def _compared(comparison: Comparison | None) -> Iterator[Finding]:
    if comparison is None:
        return
    if (share := comparison.agreement) is not None:
        text = f"the network gives {comparison.baseline}'s answer on {share:.1%} of {comparison.samples} images"
        good = share >= DRIFT[0]
        advice = "" if good else "convert fewer layers, choose rms or ln, or recover it with data"
        yield Finding("agreement", "good" if good else "warning", None, text, "agreement", share, advice)
    pairs = [pair for pair in comparison.pairs if not pair.rewritten]
    errors = [pair.relative_error for pair in pairs if pair.relative_error is not None]
    if errors and max(errors) < 1e-4:
        text = f"all {len(errors)} layers give what the baseline's give"
        yield Finding("same", "good", None, text, "relative_error", max(errors))
    advice = "the damage is concentrated: --keep or another target for the norms before it"
    drifted = [(pair.cosine, pair.layer) for pair in pairs if pair.cosine is not None and pair.cosine < DRIFT[0]]
    for cosine, layer in sorted(drifted, key=lambda pair: pair[0]):
        severity: Severity = "warning" if cosine < DRIFT[1] else "notice"
        text = f"{layer} no longer gives what the baseline's gives: cosine {cosine:.2f}"
        yield Finding("drift", severity, layer, text, "cosine", cosine, advice)


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
        scores = [(score.score, score.name) for score in entry.layers if score.score is not None and score.score > 0]
        total = sum(score for score, _ in scores)
        if len(scores) < 4 or not total:
            continue
        score, name = max(scores)
        if score > 0.25 * total:
            text = f"{name} holds {score / total:.0%} of the loss's sensitivity by {entry.method.replace('_', ' ')}"
            advice = "leave it in full precision, and train it with care"
            yield Finding("sensitive", "notice", name, text, entry.method, score, advice)
