"""The ways in which the classes of a data set get their numbers, known without torch."""

from __future__ import annotations

from typing import Literal, cast, get_args

from normsurgeon.errors import UsageError

Labels = Literal["by-name", "by-position", "none"]
"""By the network's names for its classes; by the order of the data's; or there are no labels."""


def check_way(labels: str) -> Labels:
    """The way, if it is one.

    :raises UsageError: if it is not.

    >>> check_way("by-position")
    'by-position'
    """
    if labels not in get_args(Labels):
        raise UsageError(f"labels={labels!r} is unknown; it is one of {', '.join(get_args(Labels))}")
    return cast(Labels, labels)
