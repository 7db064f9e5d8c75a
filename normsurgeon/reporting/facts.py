"""What was analysed, in pairs of words: the short version for a header, the long one for the provenance."""

from __future__ import annotations

from normsurgeon.reporting.formatting import in_brief, percent, plural, significant
from normsurgeon.reporting.layers import measure_labels
from normsurgeon.reporting.records import Report

Pairs = tuple[tuple[str, str], ...]


def measured(report: Report) -> str:
    """The parts that the report has, in words; empty when it has none."""
    labels = measure_labels(report.sensitivity)
    parts = [
        "statistics" if report.statistics is not None else "",
        "similarity" if report.similarity is not None else "",
        "comparison" if report.comparison is not None else "",
        f"sensitivity ({', '.join(labels)})" if labels else "",
        "settings" if report.sweep else "",
        "history" if report.history else "",
    ]
    return ", ".join(part for part in parts if part)


def images(report: Report) -> str:
    """How many images, and how many could not be used."""
    it = report.provenance
    return plural(it.images, "image") + (f" ({it.skipped} skipped)" if it.skipped else "")


def facts(report: Report) -> Pairs:
    """The header: a handful of facts."""
    it = report.provenance
    count = len(report.statistics or ()) or (len(report.similarity.layers) if report.similarity else 0)
    pairs = [
        ("Data", it.data),
        ("Images", f"{it.images}" + (f" ({it.skipped} skipped)" if it.skipped else "")),
        ("Layers", str(count) if count else ""),
        ("Measured", measured(report)),
    ]
    return tuple((name, value) for name, value in pairs if value)


def agreement(report: Report) -> Pairs:
    """How close the model's answers are to the baseline's."""
    it = report.comparison
    if it is None:
        return ()
    pairs = (
        ("Same answer", percent(it.agreement) if it.agreement is not None else ""),
        ("KL from the baseline", f"{significant(it.kl)} nats" if it.kl is not None else ""),
    )
    return tuple((name, value) for name, value in pairs if value)


def origin(report: Report) -> Pairs:
    """Enough to make the report again."""
    it = report.provenance
    seconds = None if it.seconds is None else f"{it.seconds:.0f} s" if it.seconds >= 10 else f"{it.seconds:.1f} s"
    pairs = [
        ("Model", it.model),
        ("Baseline", it.baseline),
        ("Data", it.data + (" (with labels)" if it.labelled else " (labels not used)")),
        ("Images", images(report) + (f", at most {it.max_images} asked for" if it.max_images else "")),
        ("Batch size", str(it.batch_size)),
        ("Seed", str(it.seed)),
        ("Device", it.device),
        ("Created", it.created),
        ("Time taken", seconds),
        ("Versions", ", ".join(f"{name} {version}" for name, version in it.versions.items())),
    ]
    return tuple((name, value) for name, value in pairs if value)


_LOSSES = {"labels": "loss against the labels", "prediction": "loss against the network's own answer"}


def measures(report: Report) -> tuple[str, ...]:
    """Each sensitivity in a line: what was differentiated, from how many images, and what else it reports."""
    lines = []
    for label, measure in zip(measure_labels(report.sensitivity), report.sensitivity or (), strict=True):
        details = {str(key).replace("_", " "): in_brief(value) for key, value in measure.details.items()}
        parts = (
            measure.unit,
            _LOSSES.get(measure.loss, measure.loss),
            plural(measure.samples, "image") if measure.samples else "",
            plural(measure.probes, "probe") if measure.probes else "",
            *(f"{key} {value}" for key, value in details.items() if value),
        )
        lines.append(f"{label}: {'; '.join(part for part in parts if part)}")
    return tuple(lines)
