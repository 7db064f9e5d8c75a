"""A budget for the damage of a conversion: how much of the function may be lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from normsurgeon.errors import UsageError
from normsurgeon.selection.damage import Damage

Measure = Literal["kl", "top1", "error"]


@dataclass(frozen=True)
class Budget:
    """At most ``limit`` of a measure: ``kl`` in nats, ``top1`` as the share of images whose answer is lost, ``error``
    as the relative error of the outputs (root mean square).

    >>> Budget.parse("1%"), Budget.parse("kl=0.05").limit
    (Budget(measure='top1', limit=0.01), 0.05)
    """

    measure: Measure
    limit: float

    @classmethod
    def parse(cls, text: str | float) -> Budget:
        """From ``1%`` or ``0.01`` (of top-1), ``kl=0.05`` (nats) or ``error=5%``.

        :raises UsageError: another text, or a limit that is not positive and finite, or a share above 1.
        """
        name, equals, number = str(text).rpartition("=")
        measure = name.strip().lower().replace("-", "") if equals else "top1"
        number = number.strip()
        try:
            limit = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
        except ValueError:
            limit = math.nan
        if measure not in ("kl", "top1", "error") or not 0 < limit < math.inf or (measure == "top1" and limit > 1):
            raise UsageError(
                f"a budget is a share of top-1 as in 1%, or kl=0.05 (nats), or error=5% (of the outputs), not {text!r}"
            )
        return cls(measure, limit)  # type: ignore[arg-type]

    def __str__(self) -> str:
        if self.measure == "kl":
            return f"KL {self.limit:g} nats"
        return f"{100 * self.limit:g} % " + ("of top-1" if self.measure == "top1" else "error of the outputs")

    def spent(self, damage: Damage) -> tuple[float, float]:
        """How much a conversion uses of it, and the standard error, in the budget's measure.

        :raises UsageError: a measure of classifiers, for a network that is none.
        """
        if self.measure != "error" and not damage.classes:
            raise UsageError(f"a budget of {self} needs a classifier; try error=5%, of the outputs")
        if self.measure == "error":
            if damage.classes:
                raise UsageError("error=… is for networks that are no classifiers; try kl=0.05 or 1% of top-1")
            mean, error = damage.compute()
            root = math.sqrt(mean)
            return root, error / (2 * root) if root > 0 else 0.0
        if self.measure == "kl":
            return damage.compute()
        return _share_and_error(damage.lost)

    def holds(self, damage: Damage) -> bool:
        """Whether what a conversion uses, with one standard error, is within it."""
        used, error = self.spent(damage)
        return used + error <= self.limit


def _share_and_error(lost: Sequence[float]) -> tuple[float, float]:
    """The mean of values of -1, 0 and 1, and its standard error, for which half an observation of a loss is added: none
    lost of n images does not mean that none ever is.
    """
    count, mean = len(lost), sum(lost) / len(lost)
    square = (sum(v * v for v in lost) + 0.5) / (count + 1)
    return mean, math.sqrt(max(square - mean**2, 0.0) / count)
