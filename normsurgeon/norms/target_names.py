"""The targets' names, known without importing torch."""

from __future__ import annotations

from normsurgeon._util.suggest import suggest
from normsurgeon.errors import TargetError

TARGET_NAMES = ("gn", "ln", "ln2d", "in", "rms", "rms2d", "affine", "fold")


def check_target(name: str) -> None:
    """Nothing, for the name of a target.

    :raises TargetError: for any other name.
    """
    if name not in TARGET_NAMES:
        raise TargetError(f"unknown target norm {name!r}; {suggest(name, TARGET_NAMES)}")
