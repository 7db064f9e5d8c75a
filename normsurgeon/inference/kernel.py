"""The compiled loop of ``fused``: one read of (N, C, P) float32 into a table of channel moments. Needs numba.

Blocks of values are summed in float32, in which the machine adds eight or sixteen at once, about a shift near the
channel's mean; blocks, images and channels are put together in float64. A row of values that overflows, underflows or
holds nan or inf is gone over once more, value by value, in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

# No nnan/ninf: a sum that is not finite is how nan and inf are noticed.
_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
}
_EXACT: dict[str, Any] = {**_OPTIONS, "fastmath": False}

_f32 = np.float32
_i32 = np.int32

BLOCK = 1024  # float32 values that are added before float64 takes over
TINY = 1e-30  # fourth powers below this lose digits in float32
FLAT = 1e-3  # share of the variance about the shift that the variance about the mean may fall to


@njit(**_OPTIONS)
def _sums(block, bits, shift):
    """Sums over one block, and its extremes: finite floats seen as integers (``bits``) have the same order, and
    of integers, unlike floats, compilers know how to take eight minima at once."""
    s1, s2, s3, s4, absolute, zeros = _f32(0), _f32(0), _f32(0), _f32(0), _f32(0), _f32(0)
    low, high = _i32(2147483647), _i32(-2147483648)
    for i in range(block.size):
        value = block[i]
        d = value - shift
        q = d * d
        s1 += d
        s2 += q
        s3 += q * d
        s4 += q * q
        absolute += abs(value)
        zeros += _f32(1) if value == _f32(0) else _f32(0)
        key = _i32(bits[i] ^ ((bits[i] >> _i32(31)) & _i32(0x7FFFFFFF)))
        low = min(low, key)
        high = max(high, key)
    return s1, s2, s3, s4, absolute, zeros, low, high


@njit(**_OPTIONS)
def _float_of(key, scratch):
    scratch[0] = _i32(key ^ ((key >> _i32(31)) & _i32(0x7FFFFFFF)))
    return np.float64(scratch.view(np.float32)[0])


@njit(**_EXACT)
def _row_exactly(row):
    """n, mean, m2, m3, m4, Σ|x|, zeros, low, high, nan, inf of one row, non-finite values left out."""
    n, total, absolute, zeros, nan, inf = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    low, high = np.inf, -np.inf
    for i in range(row.size):
        value = np.float64(row[i])
        if np.isnan(value):
            nan += 1
        elif np.isinf(value):
            inf += 1
        else:
            n += 1
            total += value
            absolute += abs(value)
            zeros += 1.0 if value == 0 else 0.0
            low = min(low, value)
            high = max(high, value)
    mean = total / max(n, 1.0)
    m2, m3, m4 = 0.0, 0.0, 0.0
    for i in range(row.size):
        value = np.float64(row[i])
        if np.isfinite(value):
            d = value - mean
            m2 += d * d
            m3 += d * d * d
            m4 += d * d * d * d
    return n, mean, m2, m3, m4, absolute, zeros, low, high, nan, inf


@njit(**_EXACT)
def _merge(t, n, mean, m2, m3, m4):
    """Pébay's update of one channel's row ``t`` by a part of ``n`` values (the formulas of ``moments.merge``)."""
    a = t[0]
    total = a + n
    delta = mean - t[1]
    t[4] += (
        m4
        + delta**4 * a * n * (a * a - a * n + n * n) / total**3
        + 6 * delta**2 * (a * a * m2 + n * n * t[2]) / total**2
        + 4 * delta * (a * m3 - n * t[3]) / total
    )
    t[3] += m3 + delta**3 * a * n * (a - n) / total**2 + 3 * delta * (a * m2 - n * t[2]) / total
    t[2] += m2 + delta**2 * a * n / total
    t[1] += delta * n / total
    t[0] = total


@njit(**_OPTIONS)
def take_in(table, x, rows, starts, places, picked, first, last):
    """Update ``table`` (C, 15) with channels ``first`` to ``last`` of ``x`` (N, C, P); ``rows`` (N, C, 2) gets each
    image's channel means and variances, ``picked`` (M, C) the values at ``places[starts[n]:starts[n + 1]]`` of image n.
    """
    images, _, positions = x.shape
    scratch = np.empty(1, np.int32)
    for c in range(first, last):
        t = table[c]
        for image in range(images):
            row = x[image, c]
            bits = row.view(np.int32)
            shift = _f32(t[1])
            if t[0] == 0:
                some = min(positions, BLOCK)
                guess = _sums(row[:some], bits[:some], _f32(0))[0] / _f32(some)
                shift = guess if np.isfinite(guess) else _f32(0)
            s1, s2, s3, s4, absolute, zeros = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
            low_key, high_key = _i32(2147483647), _i32(-2147483648)
            for begin in range(0, positions, BLOCK):
                end = min(begin + BLOCK, positions)
                b1, b2, b3, b4, ba, bz, low_here, high_here = _sums(row[begin:end], bits[begin:end], shift)
                s1 += b1
                s2 += b2
                s3 += b3
                s4 += b4
                absolute += ba
                zeros += bz
                low_key = min(low_key, low_here)
                high_key = max(high_key, high_here)
            for pick in range(starts[image], starts[image + 1]):  # the row is in the cache now
                picked[pick, c] = row[places[pick]]
            n = float(positions)
            m = s1 / n
            # The last condition: a row so far from the shift that its own variance would drown in the difference.
            if np.isfinite(s4) and (s4 > TINY or s2 == 0) and (s2 - n * m * m >= FLAT * s2 or positions == 1):
                mean = m + np.float64(shift)
                m2 = max(s2 - n * m * m, 0.0)
                m3 = s3 - 3 * m * s2 + 2 * n * m * m * m
                m4 = s4 - 4 * m * s3 + 6 * m * m * s2 - 3 * n * m * m * m * m
                if positions == 1:  # what is left is rounding
                    m2, m3, m4 = 0.0, 0.0, 0.0
                low, high = _float_of(low_key, scratch), _float_of(high_key, scratch)
            else:
                n, mean, m2, m3, m4, absolute, zeros, low, high, nan, inf = _row_exactly(row)
                t[9] += nan
                t[10] += inf
            if n > 0:
                _merge(t, n, mean, m2, m3, m4)
                t[5] += absolute
                t[6] += zeros
                t[7] = min(t[7], low)
                t[8] = max(t[8], high)
                variance = m2 / n
                t[11] += 1
                apart = mean - t[12]
                t[12] += apart / t[11]
                t[13] += apart * (mean - t[12])
                t[14] += variance
                rows[image, c, 0] = mean
                rows[image, c, 1] = variance
