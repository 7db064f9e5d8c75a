"""What the study's renderers share with those of the analysis, until they go."""

from __future__ import annotations

from normsurgeon._util.plain import plain as plain

Matrix = tuple[tuple[float | None, ...], ...]
"""Rows of equal length; None where a pair has no value."""
