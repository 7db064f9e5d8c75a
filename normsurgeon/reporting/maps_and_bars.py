"""Matrices for the page's script."""

from __future__ import annotations

import base64
import math
from array import array

from normsurgeon.reporting.records import Matrix

NO_VALUE = -32768


def packed(values: Matrix) -> str:
    """A matrix as base64 of little-endian 16-bit ten-thousandths: a tenth of its size as JSON."""
    cells = array("h")
    for row in values:
        cells.extend(
            NO_VALUE if v is None or not math.isfinite(v) else max(-32767, min(32767, round(v * 10000))) for v in row
        )
    if array("H", [1]).tobytes()[0] == 0:
        cells.byteswap()
    return base64.b64encode(cells.tobytes()).decode("ascii")
