"""One training run as a record, the file of those that are done, and the table of what came out."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

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
    done = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            found = json.loads(line)
        except json.JSONDecodeError:  # half written, when a run was stopped
            continue
        done[Cell(**found["cell"])] = found["top1"]
    return done


def write(file: Path, cell: Cell, top1: float, seconds: float) -> None:
    """Append one run, on a line of its own also behind one that is half written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = not file.exists() or file.read_bytes()[-1:] in (b"", b"\n")
    with file.open("a") as stream:
        stream.write("" if whole else "\n")
        stream.write(json.dumps({"cell": asdict(cell), "top1": top1, "seconds": round(seconds, 1)}) + "\n")


def far_behind(cell: Cell, done: dict[Cell, float], margin: float) -> bool:
    """Whether the first seed found this cell's learning rate more than ``margin`` of accuracy behind the best one."""
    first = {other.lr: top1 for other, top1 in done.items() if replace(other, lr=cell.lr) == replace(cell, seed=0)}
    return cell.seed > 0 and cell.lr in first and first[cell.lr] < max(first.values()) - margin


def table(done: dict[Cell, float], reference: str) -> str:
    """Markdown: for each setting and start its best learning rate, the accuracy there, its difference from
    ``reference``'s over the same seeds, the rates that are about as good, and all of them."""
    lines = []
    groups: dict[tuple[str, ...], dict[str, dict[float, dict[int, float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(dict))
    )
    for cell, top1 in done.items():
        groups[cell.part, cell.network, cell.domain, cell.setting][cell.start][cell.lr][cell.seed] = top1
    for group, starts in groups.items():
        rates = sorted({lr for by_rate in starts.values() for lr in by_rate})
        lines += ["", f"**{', '.join(group)}**", ""]
        lines += [
            f"| start | best rate | top-1 there | against {reference} | within 2 points | {_row(map(_rate, rates))}"
        ]
        lines += ["|---|---:|---:|---:|---|" + "---:|" * len(rates)]
        best = {start: _best(by_rate) for start, by_rate in starts.items()}
        for start, by_rate in starts.items():
            means = [_mean(by_rate[lr].values()) if lr in by_rate else math.nan for lr in rates]
            close = [_rate(lr) for lr, mean in zip(rates, means, strict=True) if mean >= max(means) - CLOSE]
            lines.append(
                f"| {start} | {_rate(best[start])} | {_percent(estimate(_by_seed(by_rate, best[start])))} "
                f"| {_against(by_rate, best, start, starts, reference)} | {' '.join(close)} "
                f"| {_row('–' if math.isnan(mean) else f'{100 * mean:.1f}' for mean in means)}"
            )
    return "\n".join(lines)


def _row(texts: Iterable[str]) -> str:
    return " | ".join(texts) + " |"


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan


def _best(by_rate: dict[float, dict[int, float]]) -> float:
    return max(sorted(by_rate), key=lambda lr: _mean(by_rate[lr].values()))


def _by_seed(by_rate: dict[float, dict[int, float]], lr: float) -> list[float]:
    return [by_rate[lr][seed] for seed in sorted(by_rate[lr])]


def _against(
    by_rate: dict[float, dict[int, float]],
    best: dict[str, float],
    start: str,
    starts: dict[str, dict[float, dict[int, float]]],
    reference: str,
) -> str:
    if start == reference or reference not in starts:
        return ""
    own, other = by_rate[best[start]], starts[reference][best[reference]]
    return _percent(paired([own[seed] - other[seed] for seed in sorted(set(own) & set(other))]), sign="+")


def _rate(lr: float) -> str:
    return f"{lr:g}"


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
