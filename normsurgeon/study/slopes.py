"""Accuracy's slope on the logarithm of the batch size, as a weighted sum of accuracies."""

from __future__ import annotations

import math
from collections.abc import Iterable

from normsurgeon.study.pairing import LR_LEVEL, Setting


def slope_weights(settings: Iterable[Setting], tried: Iterable[Setting]) -> dict[Setting, float]:
    """What each setting's accuracy counts in the mean slope: (x − x̄) / Σ(x − x̄)², x = log2(batch size).

    Learning rates are matched between batch sizes by their place among those ``tried`` there.

    >>> sizes = [(("batch_size", n),) for n in (2, 4, 8)]
    >>> {dict(setting)["batch_size"]: weight for setting, weight in slope_weights(sizes, sizes).items()}
    {2: -0.5, 4: 0.0, 8: 0.5}
    """
    rates: dict[Setting, list[float]] = {}
    for setting in tried:
        rates.setdefault(_all_but(setting, "lr"), []).append(dict(setting).get("lr", 0.0))
    contexts: dict[Setting, dict[Setting, float]] = {}
    for setting in settings:
        values = dict(setting)
        if "batch_size" in values:
            level = sorted(rates[_all_but(setting, "lr")]).index(values.get("lr", 0.0))
            context = (*_all_but(setting, "lr", "batch_size"), (LR_LEVEL, level))
            contexts.setdefault(context, {})[setting] = math.log2(values["batch_size"])
    contexts = {context: sizes for context, sizes in contexts.items() if len(sizes) > 1}
    weights: dict[Setting, float] = {}
    for sizes in contexts.values():
        middle = math.fsum(sizes.values()) / len(sizes)
        spread = math.fsum((x - middle) ** 2 for x in sizes.values())
        weights |= {setting: (x - middle) / spread / len(contexts) for setting, x in sizes.items()}
    return weights


def _all_but(setting: Setting, *axes: str) -> Setting:
    return tuple(pair for pair in setting if pair[0] not in axes)
