"""Checks of arguments that many functions make."""

from __future__ import annotations

from normsurgeon.errors import UsageError


def check_at_least(least: int, **values: int | None) -> None:
    """Check whole numbers, by the names of their arguments; None stands for no limit.

    :raises UsageError: if one is smaller.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise UsageError(f"{name}={value} must be at least {least}")
