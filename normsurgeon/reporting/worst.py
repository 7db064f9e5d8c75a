"""The pairs that differ most from the baseline, worst first."""

from __future__ import annotations

import math
from collections.abc import Sequence

from normsurgeon.reporting.formatting import significant
from normsurgeon.reporting.layers import LayerRow

Table = tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]


def worst_pairs(rows: Sequence[LayerRow], most: int = 15) -> Table:
    """Header and cells: how far apart, and both networks' standard deviation and effective rank.

    Layers that a surgery rewrote are left out: they differ by design.

    Both are empty when nothing is known of any pair.
    """
    ordered = sorted((row for row in rows if row.pair and not row.pair.rewritten), key=_badness, reverse=True)[:most]
    body = [_cells(row) for row in ordered]
    header: tuple[str, ...] = ("layer", "rel. error", "CKA", "cosine", "mean shift", "std ratio")
    header += ("std before", "after", "eff. rank before", "after")
    used = [i for i in range(len(header)) if i == 0 or any(cells[i] != "–" for cells in body)]
    if len(used) == 1:
        return (), ()
    return tuple(header[i] for i in used), tuple(tuple(cells[i] for i in used) for cells in body)


def _badness(row: LayerRow) -> tuple[float, float]:
    assert row.pair is not None
    error, cka = row.pair.relative_error, row.pair.cka
    return (
        -math.inf if error is None or math.isnan(error) else error,
        -math.inf if cka is None or math.isnan(cka) else -cka,
    )


def _cells(row: LayerRow) -> tuple[str, ...]:
    pair, now, before = row.pair, row.statistics, row.baseline
    assert pair is not None
    numbers = (
        pair.relative_error,
        pair.cka,
        pair.cosine,
        pair.mean_shift,
        pair.std_ratio,
        before.std if before else None,
        now.std if now else None,
        before.effective_rank if before else None,
        now.effective_rank if now else None,
    )
    return (row.layer, *(significant(value) for value in numbers))
