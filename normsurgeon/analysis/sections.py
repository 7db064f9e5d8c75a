"""The parts of an analysis as sections of a document; each reads the records of one part and nothing of the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from normsurgeon.analysis import figures
from normsurgeon.analysis.layer_table import LayerRow, Measures, Rows, layer_table
from normsurgeon.analysis.records import Answers, Comparison, Finding, Provenance, Similarity, SweepPoint
from normsurgeon.render import document as doc
from normsurgeon.render.document import Block, Column, Facts, Line, Notes, Section, Sparklines, Table, Text
from normsurgeon.render.formatting import exact, has_value, in_brief, joined, plural, significant
from normsurgeon.surgery.history import curves, summaries

FAR = 4.0
"""Robust standard deviations (1.4826 times the median absolute deviation) from the median of its kind."""
_FEWEST = 8  # layers of one kind, below which a median means little
_OUTLYING = (("abs_mean", "mean |x|"), ("std", "std"), ("kurtosis", "kurtosis"), ("group_fluctuation", "group fluct."))
_OVER_DEPTH = (
    ("mean |x|", "statistics", "abs_mean", True),
    ("std", "statistics", "std", True),
    ("zeros", "statistics", "zero_fraction", False),
    ("effective rank", "statistics", "effective_rank", True),
    ("channel variance", "statistics", "channel_var", True),
    ("sq. channel mean", "statistics", "squared_mean", True),
    ("between images", "statistics", "between_var", True),
    ("group fluct.", "statistics", "group_fluctuation", False),
    ("CKA with baseline", "pair", "cka", False),
    ("relative error", "pair", "relative_error", False),
)
_LOSSES = {"labels": "loss against the labels", "prediction": "loss against the network's own answer"}
_PAGE = frozenset[doc.Medium]({"page"})
_WORDS = frozenset[doc.Medium]({"terminal", "text"})
_NO_NOTEBOOK = _PAGE | _WORDS


def findings_section(findings: Sequence[Finding], rows: Rows) -> Section:
    """What stands out, and the layers that stand out: those with findings, or far from the others of their kind."""
    stated = tuple(doc.Finding(f.text, f.severity, "", f.metric, f.value, f.advice, f.layer) for f in findings)
    layers = doc.Findings(standouts(findings, rows), empty="", title="Layers that stand out")
    return Section("findings", "Findings", (doc.Findings(stated), layers))


def profile_sections(rows: Rows) -> Iterator[Section]:
    """The layers' outputs over the depth of the network."""
    yield Section("profile", "Layer profile", figures.profile_charts(rows), _PAGE)
    lines = [
        Line(label, tuple(getattr(getattr(row, part), name, None) for row in rows), log)
        for label, part, name, log in _OVER_DEPTH
    ]
    drawn = tuple(line for line in lines if sum(has_value(value) for value in line.values) >= 2)
    title = f"Over the depth of the network ({len(rows)} layers)"
    yield Section("depth", title, (Sparklines(drawn),) if drawn else (), _WORDS)


def similarity_section(similarity: Similarity | None) -> Section:
    """How alike the layers of the network are."""
    blocks: tuple[Block, ...] = ()
    if it := similarity:
        note = f"Every layer with every layer, from {it.samples} images, at least {it.batch_size} at a time."
        maps = {"CKA": it.cka, "Gram cosine": it.gram_cosine, "cosine": it.cosine}
        chart = figures.heat_chart("similarity-map", "Similarity of the layers", note, it.layers, it.layers, maps)
        blocks = (*chart, *_notes(it.notes))
    return Section("similarity", "Similarity", blocks, _NO_NOTEBOOK)


def comparison_section(comparison: Comparison | None, rows: Rows) -> Section:
    """The network and its baseline: how far apart the layers are, and which are farthest."""
    blocks: tuple[Block, ...] = ()
    if it := comparison:
        note = "Rows are the model's layers, columns the baseline's. A bright diagonal: the same is computed there."
        maps = {"CKA": it.cka, "Gram cosine": it.gram_cosine}
        title = "Model against baseline, layer by layer"
        alone = [
            f"Only in the {whose}: {', '.join(names)}"
            for whose, names in (("model", it.only_model), ("baseline", it.only_baseline))
            if names
        ]
        blocks = (
            Text(f"Against {it.baseline}, from {it.samples} images."),
            *_flips(it.answers),
            *figures.comparison_charts(rows),
            *figures.heat_chart("comparison-map", title, note, it.layers, it.baseline_layers, maps),
            *farthest(rows),
            *_notes((*it.notes, *alone)),
        )
    return Section("comparison", "Comparison", blocks, _NO_NOTEBOOK)


def sensitivity_section(measures: Measures, rows: Rows) -> Section:
    """How much the loss cares for each layer; below it what each measure is, and what else it reports."""
    lines = []
    for label, measure in measures.items():
        details = {str(key).replace("_", " "): in_brief(value) for key, value in measure.details.items()}
        parts = (
            measure.unit,
            _LOSSES.get(measure.loss, measure.loss),
            plural(measure.samples, "image") if measure.samples else "",
            plural(measure.probes, "probe") if measure.probes else "",
            *(f"{key} {value}" for key, value in details.items() if value),
        )
        lines.append(f"{label}: {joined(parts, '; ')}")
    charts = figures.sensitivity_charts(measures, rows)
    return Section("sensitivity", "Sensitivity", (*charts, *_notes(lines)), _NO_NOTEBOOK)


def sweep_sections(points: Sequence[SweepPoint]) -> Iterator[Section]:
    """What other settings of the norm layers do; plain text has every point."""
    yield Section("sweep", "Settings", figures.sweep_charts(points), _PAGE | {"terminal"})
    titles = ("layer", "setting", "value", "KL", "loss change")
    table = Table(
        tuple(Column(title, "text" if i < 2 else "number") for i, title in enumerate(titles)),
        tuple((p.layer, p.setting, p.value, p.kl, p.loss_change) for p in points),
    )
    yield Section("settings", "Settings of the norm layers", (table,) if points else (), frozenset({"text"}))


def history_sections(history: Sequence[Mapping[str, Any]]) -> Iterator[Section]:
    """What was done to the network, and its training curves."""
    done, logged = _notes(summaries(history)), curves(history)
    lines = tuple(Line(curve.title, curve.y) for curve in logged)
    yield Section("history", "History", (*done, *figures.history_charts(logged)), _PAGE)
    yield Section("history", "History", (*done, *((Sparklines(lines, ends=True),) if lines else ())), _WORDS)


def layers_section(rows: Rows, measures: Measures, important: frozenset[str]) -> Section:
    """The layer table."""
    return Section("layers", "Layers", (layer_table(rows, measures, important),) if rows else ())


def provenance_section(it: Provenance) -> Section:
    """Enough to make the report again."""
    seconds = None if it.seconds is None else f"{it.seconds:.0f} s" if it.seconds >= 10 else f"{it.seconds:.1f} s"
    pairs = (
        ("Model", it.model),
        ("Baseline", it.baseline),
        ("Data", it.data + (" (with labels)" if it.labelled else " (labels not used)")),
        ("Images", _images(it, "images") + (f", at most {it.max_images} wanted" if it.max_images else "")),
        ("Batch size", str(it.batch_size)),
        ("Seed", str(it.seed)),
        ("Device", it.device),
        ("Created", it.created),
        ("Time taken", seconds),
        ("Versions", ", ".join(f"{name} {version}" for name, version in it.versions.items())),
    )
    origin = Facts(tuple((name, value) for name, value in pairs if value))
    command = (doc.Code(it.command),) if it.command else ()
    return Section("provenance", "Provenance", (*command, origin, *_notes(it.notes)))


def header(it: Provenance, comparison: Comparison | None, layers: int, measured: Sequence[str]) -> tuple[Facts, ...]:
    """How close the network's answers are to the baseline's; and what was analysed, in a handful of facts."""
    agreement = comparison.agreement if comparison else None
    kl = comparison.kl if comparison else None
    answers = comparison.answers if comparison else None
    key = (
        ("Same answer", _share(agreement, answers.agreement_stderr if answers else None)),
        ("Right", _share(answers.accuracy, answers.accuracy_stderr) if answers else ""),
        ("Right before", _share(answers.baseline_accuracy, answers.baseline_accuracy_stderr) if answers else ""),
        ("KL from the baseline", f"{significant(kl)} nats" if kl is not None else ""),
    )
    pairs = (
        ("Data", it.data),
        ("Images", _images(it, "")),
        ("Layers", str(layers) if layers else ""),
        ("Measured", ", ".join(measured)),
    )
    facts = (Facts(key, key=True), Facts(pairs))
    return tuple(Facts(tuple(pair for pair in each.pairs if pair[1]), each.key) for each in facts)


def _share(share: float | None, stderr: float | None) -> str:
    """A share of the images, and its standard error."""
    error = f" ± {100 * stderr:.1f}" if stderr else ""
    return "" if share is None else f"{100 * share:.1f}{error} %"


def _flips(answers: Answers | None) -> Iterator[Block]:
    """The images with another answer."""
    if answers is None or not answers.flips:
        return
    entries = []
    for flip in answers.flips:
        right = f", labelled {flip.label}" if flip.label is not None else ""
        tables = [
            (title, tuple((guess.name, guess.probability) for guess in guesses))
            for title, guesses in (("before", flip.before), ("after", flip.after))
        ]
        entries.append(doc.Picture(flip.picture, f"image {flip.image}{right}", tuple(tables)))
    count = f"{answers.flipped} of {answers.images} images get another answer"
    note = f"{count}; {'these are' if len(entries) < answers.flipped else 'in order of'} the farthest apart (KL)."
    yield doc.Pictures(tuple(entries), "Images with another answer", note, terminal_rows=4)


def standouts(findings: Sequence[Finding], rows: Rows, most: int = 12) -> tuple[doc.Finding, ...]:
    """At most ``most`` layers and the reasons to look at them: those with findings, then the farthest from their kind.

    A finding's reason is its metric and number, as the words stand in the findings already; its severity counts too.
    """
    found: dict[str, tuple[doc.Severity, list[str], list[float]]] = {}

    def add(layer: str, severity: doc.Severity, reason: str, strength: float) -> None:
        _, reasons, strengths = found.setdefault(layer, (severity, [], []))
        reasons.append(reason)
        strengths.append(strength)

    for finding in findings:
        if finding.layer is not None and finding.severity != "good":
            name = finding.metric.replace("_", " ")
            reason = f"{name} {exact(finding.value)}" if has_value(finding.value) else name
            add(finding.layer, finding.severity, reason, math.inf)
    for name, title in _OUTLYING:
        for layer, distance, value, typical in _outliers(rows, name):
            way = "high" if value > typical else "low"
            text = f"{title} {significant(value)} is {way} (its kind's median: {significant(typical)})"
            add(layer, "notice", text, distance)
    ordered = sorted(found.items(), key=lambda entry: -max(entry[1][2]))[:most]
    return tuple(doc.Finding("; ".join(reasons), severity, anchor=layer) for layer, (severity, reasons, _) in ordered)


def farthest(rows: Rows, most: int = 15) -> tuple[Table, ...]:
    """The pairs of layers that differ most, with both networks' standard deviation and effective rank.

    Layers that a surgery rewrote are left out: they differ by design.
    """
    ordered = sorted((row for row in rows if row.pair and not row.pair.rewritten), key=_distance, reverse=True)[:most]
    titles = (
        "layer", "rel. error", "CKA", "cosine", "mean shift", "std ratio", "std before", "after", "eff. rank before",
        "after",
    )  # fmt: skip
    body = tuple(_pair_cells(row) for row in ordered)
    columns = tuple(Column(title, "number" if i else "text") for i, title in enumerate(titles))
    if not any(has_value(value) for cells in body for value in cells[1:]):
        return ()
    return (Table(columns, body, "Farthest from the baseline", terminal_rows=8),)


def _distance(row: LayerRow) -> tuple[float, float]:
    assert row.pair is not None
    error, cka = row.pair.relative_error, row.pair.cka
    return (
        -math.inf if error is None or math.isnan(error) else error,
        -math.inf if cka is None or math.isnan(cka) else -cka,
    )


def _pair_cells(row: LayerRow) -> tuple[Any, ...]:
    pair, now, before = row.pair, row.statistics, row.baseline
    assert pair is not None
    both = [getattr(entry, key, None) for key in ("std", "effective_rank") for entry in (before, now)]
    return (row.layer, pair.relative_error, pair.cka, pair.cosine, pair.mean_shift, pair.std_ratio, *both)


def _outliers(rows: Rows, name: str) -> Iterator[tuple[str, float, float, float]]:
    """Layers whose logarithm lies far from its kind's median: (layer, distance, value, typical value)."""
    kinds: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        value = getattr(row.statistics, name, None)
        if value is not None and math.isfinite(value) and value > 0:
            kinds.setdefault(row.kind, []).append((row.layer, value))
    for entries in kinds.values():
        if len(entries) < _FEWEST:
            continue
        logs = [math.log(value) for _, value in entries]
        middle = median(logs)
        spread = max(1.4826 * median(abs(x - middle) for x in logs), 0.05)
        for (layer, value), log in zip(entries, logs, strict=True):
            if (distance := abs(log - middle) / spread) > FAR:
                yield layer, distance, value, math.exp(middle)


def _images(it: Provenance, noun: str) -> str:
    count = plural(it.images, "image") if noun else str(it.images)
    return count + (f" ({it.skipped} skipped)" if it.skipped else "")


def _notes(lines: Sequence[str]) -> tuple[Notes, ...]:
    return (Notes(tuple(lines)),) if lines else ()
