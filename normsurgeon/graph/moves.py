"""Operations that only move dimensions about, and where they put each of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Shape = tuple[int, ...]

_REORDERED = ("aten::permute", "aten::transpose", "aten::t")
_REGROUPED = ("aten::view", "aten::_unsafe_view", "aten::unsqueeze", "aten::squeeze", "aten::_reshape_alias")
_SAME = ("aten::alias", "aten::clone", "aten::detach", "aten::contiguous", "aten::lift_fresh")


@dataclass(frozen=True)
class Move:
    """A step that only moves dimensions about: how they are permuted, or the shape that they are regrouped to."""

    given: Shape
    made: Shape
    order: Shape | None = None

    def axis(self, axis: int) -> int | None:
        """Where a dimension of the input is in the output; None where it is split or merged.

        Regrouping keeps the order of the elements, so a dimension stays one if as many elements lie before it and its
        size is the same.

        >>> Move((2, 7, 5), (14, 5)).axis(2), Move((2, 7, 5), (2, 35)).axis(2)
        (1, None)
        """
        if self.order is not None:
            return self.order.index(axis)
        before = math.prod(self.given[:axis])
        for place, size in enumerate(self.made):
            if size == self.given[axis] and math.prod(self.made[:place]) == before:
                return place
        return None


def move_of(name: str, args: tuple[Any, ...], output: Any) -> Move | None:
    """The dimension move that an operation is, or None."""
    if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
        return None
    given, made = tuple(args[0].shape), tuple(output.shape)
    dims = len(given)
    if name in _REORDERED:
        order = list(range(dims))
        if name == "aten::permute":
            order = [d % dims for d in args[1]]
        elif dims > 1:
            first, second = (args[1] % dims, args[2] % dims) if name == "aten::transpose" else (0, 1)
            order[first], order[second] = order[second], order[first]
        return Move(given, made, tuple(order))
    if name in _REGROUPED and args[0].dtype == output.dtype:
        return Move(given, made)
    same_kind = args[0].dtype == output.dtype and args[0].device == output.device
    if name in _SAME or (name == "aten::expand" and given == made) or (name == "aten::_to_copy" and same_kind):
        return Move(given, made, tuple(range(dims)))
    return None
