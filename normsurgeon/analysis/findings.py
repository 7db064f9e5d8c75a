"""What stands out in a report, in words: each finding with the number behind it and what one could do about it.

Read off the records alone, by one small function a subject; the thresholds are constants.
"""

from __future__ import annotations

from collections.abc import Iterator

from normsurgeon.analysis.records import Comparison, Finding, LayerStatistics, Sensitivity, Similarity
from normsurgeon.analysis.report import Report

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
    found: list[Finding] = []
    for part in (
        _nonfinite(report.statistics or ()),
        _dead(report.statistics or (), report.provenance.images),
        _dormant(report.statistics or ()),
        _scale(report.statistics or ()),
        _tails(report.statistics or ()),
        _fluctuation(report.statistics or ()),
        _compared(report.comparison),
        _alike(report.similarity),
        _sensitive(report.sensitivity or ()),
    ):
        findings = list(part)
        found += findings[:MOST]
        if len(findings) > MOST:
            first, rest = findings[0], findings[MOST:]
            found.append(
                Finding(
                    kind=first.kind,
                    severity=rest[0].severity,
                    layer=None,
                    text=f"{len(rest)} more layers like these: {rest[0].layer} … {rest[-1].layer}",
                    metric="layers",
                    value=float(len(rest)),
                    advice="the layer table lists them all",
                )
            )
    return tuple(sorted(found, key=lambda finding: _SEVERITIES.index(finding.severity)))


def _nonfinite(statistics: tuple[LayerStatistics, ...]) -> Iterator[Finding]:
    broken = [s for s in statistics if s.nan or s.inf]
    if broken:
        first = broken[0]
        yield Finding(
            "nonfinite",
            "problem",
            first.layer,
            f"{first.layer} is the first layer with values that are not finite: {first.nan:,} nan and {first.inf:,} "
            f"inf, from image {first.first_nonfinite} on; {len(broken)} layers have some",
            "nonfinite_values",
            float(first.nan + first.inf),
            "look at that image and at the layer's weights; half precision overflows at 65,504",
        )


def _dead(statistics: tuple[LayerStatistics, ...], images: int) -> Iterator[Finding]:
    for s in sorted((s for s in statistics if s.dead_channels), key=lambda s: -s.dead_channels):
        listed = ", ".join(map(str, s.dead[:6])) + (", …" if s.dead_channels > 6 else "")
        whole = s.dead_channels == s.channels
        yield Finding(
            "dead",
            "problem" if whole else "warning" if s.dead_channels >= 0.1 * s.channels else "notice",
            s.layer,
            f"{'all ' if whole else ''}{s.dead_channels} of {s.channels} channels of {s.layer} never fire on these "
            f"{images} images ({listed})",
            "dead_channels",
            float(s.dead_channels),
            "look at more images before pruning them"
            if images < ENOUGH
            else "they can be pruned; a large learning rate or a bad initialisation is the usual cause",
        )


def _dormant(statistics: tuple[LayerStatistics, ...]) -> Iterator[Finding]:
    for s in statistics:
        alive = s.dormant_channels - s.dead_channels
        if alive > 0.25 * s.channels:
            yield Finding(
                "dormant",
                "notice",
                s.layer,
                f"{alive} of {s.channels} channels of {s.layer} are dormant: on average below a fortieth of the "
                "layer's mean activation",
                "dormant_channels",
                float(alive),
                "the layer has more width than it uses on these images",
            )


def _scale(statistics: tuple[LayerStatistics, ...]) -> Iterator[Finding]:
    for s in statistics:
        if s.std is None or not s.values:
            continue
        if s.std == 0:
            yield Finding(
                "constant", "warning", s.layer, f"{s.layer} gives the same value everywhere", "std", 0.0,
                "nothing of the image gets through it",
            )  # fmt: skip
        elif not TINY < s.std < HUGE:
            word = "small" if s.std <= TINY else "large"
            yield Finding(
                "scale", "warning", s.layer, f"the output of {s.layer} is very {word}: standard deviation {s.std:.3g}",
                "std", s.std, "half precision would lose it; a norm layer after it helps",
            )  # fmt: skip


def _tails(statistics: tuple[LayerStatistics, ...]) -> Iterator[Finding]:
    heavy = [s for s in statistics if s.kurtosis is not None and s.kurtosis > HEAVY_TAIL and s.kind != "linear"]
    for s in sorted(heavy, key=lambda s: -(s.kurtosis or 0)):
        yield Finding(
            "tails",
            "notice",
            s.layer,
            f"a few values of {s.layer} are far out: excess kurtosis {s.kurtosis:.0f}",
            "kurtosis",
            s.kurtosis,
            "per-sample norms and low-bit quantisation suffer from such outliers",
        )


def _fluctuation(statistics: tuple[LayerStatistics, ...]) -> Iterator[Finding]:
    sites = [s for s in statistics if s.group_fluctuation is not None]
    for s in sorted(sites, key=lambda s: -(s.group_fluctuation or 0)):
        size = s.group_fluctuation or 0
        if size > FLUCTUATION[0]:
            yield Finding(
                "fluctuation",
                "warning" if size > FLUCTUATION[1] else "notice",
                s.layer,
                f"what a norm in {s.groups} group{'s' if s.groups != 1 else ''} divides by at {s.layer} varies by "
                f"{size:.0%} from image to image",
                "group_fluctuation",
                size,
                "a per-sample norm departs from the batch norm most here: keep it (--keep), use fewer groups, or "
                "recover it with data",
            )


def _compared(comparison: Comparison | None) -> Iterator[Finding]:
    if comparison is None:
        return
    if comparison.agreement is not None:
        good = comparison.agreement >= DRIFT[0]
        yield Finding(
            "agreement",
            "good" if good else "warning",
            None,
            f"the network gives {comparison.baseline}'s answer on {comparison.agreement:.1%} of {comparison.samples} "
            "images",
            "agreement",
            comparison.agreement,
            "" if good else "convert fewer layers, choose rms or ln, or recover it with data",
        )
    pairs = [pair for pair in comparison.pairs if not pair.rewritten]
    known = [pair for pair in pairs if pair.relative_error is not None]
    if known and all((pair.relative_error or 0) < 1e-4 for pair in known):
        yield Finding(
            "same", "good", None, f"all {len(known)} layers give what the baseline's give", "relative_error",
            max(pair.relative_error or 0 for pair in known),
        )  # fmt: skip
    drifted = [pair for pair in pairs if pair.cosine is not None and pair.cosine < DRIFT[0]]
    for pair in sorted(drifted, key=lambda pair: pair.cosine or 0):
        yield Finding(
            "drift",
            "warning" if (pair.cosine or 0) < DRIFT[1] else "notice",
            pair.layer,
            f"{pair.layer} no longer gives what the baseline's gives: cosine {pair.cosine:.2f}",
            "cosine",
            pair.cosine,
            "the damage is concentrated: --keep or another target for the norms before it",
        )


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
            first, last = layers[place - run], layers[place]
            yield Finding(
                "redundant",
                "notice",
                last,
                f"{run + 1} layers in a row, {first} to {last}, carry nearly the same information (CKA above {SAME} "
                "from one to the next)",
                "layers",
                float(run + 1),
                "the network may be deeper there than the images need",
            )
        run = 0


def _sensitive(sensitivity: tuple[Sensitivity, ...]) -> Iterator[Finding]:
    for entry in sensitivity:
        scores = [(score.score, score.name) for score in entry.layers if score.score is not None and score.score > 0]
        total = sum(score for score, _ in scores)
        if len(scores) < 4 or not total:
            continue
        score, name = max(scores)
        if score > 0.25 * total:
            yield Finding(
                "sensitive",
                "notice",
                name,
                f"{name} holds {score / total:.0%} of the loss's sensitivity by {entry.method.replace('_', ' ')}",
                entry.method,
                score,
                "leave it in full precision, and train it with care",
            )
