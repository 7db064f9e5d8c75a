"""Whether two networks did the same in one call: sums over what each layer was given and gave, and the outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Run:
    """What one network did in one call: sums over what each layer was given and gave, call by call; its outputs."""

    layers: list[tuple[str, Sums | None, Sums | None]]
    outputs: list[Tensor]


@dataclass(frozen=True)
class Sums:
    """For each index of dimension 1, a weighted sum over all others (C,), and the largest value among them all.

    The weights are irregular and add up to 1, so that a sum commutes with an affine map of its channel, and what
    differs anywhere differs in it.
    """

    sums: Tensor
    largest: float


def noted(name: str, forward: Callable[..., Any], run: Run) -> Callable[..., Any]:
    """A layer's ``forward`` that notes each call, by sums over what it is given and what it gives."""

    def noting(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():  # in float64 already; seen by the mode, each step takes ten times as long
            given = _weighted_sums(next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None))
        output = forward(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            run.layers.append((name, given, _weighted_sums(output)))
        return output

    return noting


def reached(runs: Sequence[Run]) -> set[str]:
    """The layers that were called."""
    return {name for run in runs for name, *_ in run.layers}


def outputs_differ(before: Run, after: Run) -> float:
    """The largest difference in any output, relative to its largest value; infinite where shapes are not the same."""
    if [tuple(t.shape) for t in before.outputs] != [tuple(t.shape) for t in after.outputs]:
        return math.inf
    return max((_relative(a, b) for a, b in zip(before.outputs, after.outputs, strict=True)), default=0.0)


def _weighted_sums(x: Any) -> Sums | None:
    """Those of the first tensor of a layer; None for a scalar, a vector, and what is no tensor."""
    if not isinstance(x, Tensor) or x.ndim < 2 or not x.numel():
        return None
    x_NCP = (x.flatten(2) if x.ndim > 2 else x[:, :, None]).detach().double()
    samples, _, positions = x_NCP.shape
    weights = torch.arange(1, samples * positions + 1, dtype=torch.float64, device=x.device)
    weights = torch.frac(weights * 0.6180339887498949) + 0.5
    sums = torch.matmul(x_NCP, (weights / weights.sum()).view(samples, positions, 1)).sum((0, 2))
    return Sums(sums, float(x_NCP.abs().max()))


def sums_differ(a: Sums, b: Sums) -> float:
    """The largest difference, relative to the largest value that was summed; infinite where one is not finite."""
    finite = a.sums.isfinite()
    if not torch.equal(finite, b.sums.isfinite()):
        return math.inf
    if not finite.all() or not math.isfinite(a.largest):
        return 0.0 if a.sums.shape == b.sums.shape else math.inf
    return float((a.sums - b.sums).abs().max()) / max(a.largest, 1e-30)


def _relative(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value; values that are not finite must be the same."""
    a, b = a.detach(), b.detach()
    if not (a.is_floating_point() or a.is_complex()):
        return 0.0 if torch.equal(a, b) else math.inf
    a, b = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (a, b))
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return math.inf
    a, b = a[finite], b[finite]
    if not a.numel():
        return 0.0
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
