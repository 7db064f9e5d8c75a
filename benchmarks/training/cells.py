"""One training run as a record, the file of those that are done, and the table of what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

from measuring import append, records
from measuring import table as markdown

from normsurgeon._util.estimates import Estimate, estimate, paired

CLOSE = 0.02
"""A learning rate is as good as the best where its mean accuracy is at most this much lower."""


@dataclass(frozen=True, order=True)
class Cell:
    """One run: ``setting`` is what its part varies ("sgd 2", "epsilon 3"), ``lr`` the learning rate."""

    part: str
    network: str
    domain: str
    setting: str
    lr: float
    start: str
    seed: int


def read(file: Path) -> dict[Cell, float]:
    """The accuracies of the runs that are done."""
    return {Cell(**record["cell"]): record["top1"] for record in records(file)}


def write(file: Path, cell: Cell, top1: float, seconds: float) -> None:
    """Append one run."""
    append(file, {"cell": asdict(cell), "top1": top1, "seconds": round(seconds, 1)})


def far_behind(cell: Cell, done: dict[Cell, float], margin: float) -> bool:
    """Whether the first seed found this cell's learning rate more than ``margin`` of accuracy behind the best one."""
    first = {other.lr: top1 for other, top1 in done.items() if replace(other, lr=cell.lr) == replace(cell, seed=0)}
    return cell.seed > 0 and cell.lr in first and first[cell.lr] < max(first.values()) - margin


Runs = dict[float, dict[int, float]]
"""The accuracies of one start, by learning rate and seed."""


def table(done: dict[Cell, float], reference: str) -> str:
    """Markdown: for each setting and start its best learning rate, the accuracy there, its difference from
    ``reference``'s over the same seeds, the rates that are about as good, and all of them."""
    groups: dict[tuple[str, ...], dict[str, Runs]] = {}
    for cell, top1 in done.items():
        starts = groups.setdefault((cell.part, cell.network, cell.domain, cell.setting), {})
        starts.setdefault(cell.start, {}).setdefault(cell.lr, {})[cell.seed] = top1
    return "\n".join(f"\n**{', '.join(group)}**\n\n{_table(starts, reference)}" for group, starts in groups.items())


def _table(starts: dict[str, Runs], reference: str) -> str:
    rates = sorted({lr for runs in starts.values() for lr in runs})
    means = {start: {lr: fmean(runs[lr].values()) for lr in sorted(runs)} for start, runs in starts.items()}
    best = {start: max(of, key=of.__getitem__) for start, of in means.items()}
    rows = []
    for start, runs in starts.items():
        own, against = runs[best[start]], ""
        if start != reference and reference in starts:
            other = starts[reference][best[reference]]
            against = _percent(paired([own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]), "+")
        close = [f"{lr:g}" for lr, mean in means[start].items() if mean >= means[start][best[start]] - CLOSE]
        there = _percent(estimate([own[seed] for seed in sorted(own)]))
        all_rates = (f"{100 * means[start][lr]:.1f}" if lr in runs else "–" for lr in rates)
        rows.append((start, f"{best[start]:g}", there, against, " ".join(close), *all_rates))
    columns = ("start", "best rate", "top-1 there", f"against {reference}", "within 2 points")
    return markdown((*columns, *(f"{lr:g}" for lr in rates)), rows, texts=(0, 4))


def _percent(it: Estimate | object, sign: str = "") -> str:
    mean, ci = getattr(it, "mean", None), getattr(it, "ci", None)
    if mean is None:
        return "–"
    interval = f" ± {100 * (ci[1] - ci[0]) / 2:.1f}" if ci is not None else ""
    return f"{100 * mean:{sign}.1f}{interval}"


def product(
    part: str,
    network: str,
    domains: Sequence[str],
    settings: Sequence[str],
    rates: Sequence[float],
    starts: Sequence[str],
    seeds: int,
) -> list[Cell]:
    """Every combination, one seed after the other, so that a run that is cut short has whole tables."""
    return [
        Cell(part, network, domain, setting, lr, start, seed)
        for seed in range(seeds)
        for domain in domains
        for setting in settings
        for lr in rates
        for start in starts
    ]
