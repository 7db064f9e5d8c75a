"""Classes that hold running statistics and are not known: whether they are batch norms is found out by a test.

In eval mode such a module must be the affine map that its numbers say, or it is not touched.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def own_tensor(module: nn.Module, name: str) -> Tensor | None:
    """A module's parameter, buffer or plain attribute of that name, where it is a tensor."""
    if isinstance(module, torch.jit.ScriptModule):
        return None  # compiled: nothing of it can be exchanged
    for place in (module._buffers, module._parameters, vars(module)):
        found = place.get(name)
        if isinstance(found, Tensor):
            return found
    return None


@dataclass(frozen=True)
class Foreign:
    """What a test found of a class that is not known: its eps, the names of its weight and bias (None: without)."""

    eps: float
    weight: str | None
    bias: str | None


_EPS_NAMES = ("eps", "epsilon", "variance_epsilon")
_KNOWN: dict[Any, Foreign | None] = {}


def understood(module: nn.Module) -> Foreign | None:
    """How a module of unknown class computes ``weight * (x - mean) / sqrt(var + eps) + bias`` in eval mode, if it does.

    Found by a test of the class and its settings, once; an instance with a ``forward`` of its own is tested each time.
    """
    if "forward" in vars(module):
        return _tested(module)
    plain = (int, float, str, bool, type(None))
    settings = tuple(sorted((k, v) for k, v in vars(module).items() if isinstance(v, plain) and k != "training"))
    tensors = tuple((k, tuple(t.shape)) for k, t in [*module.named_parameters(), *module.named_buffers()])
    key = (type(module), repr(settings), tensors)
    if key not in _KNOWN:
        _KNOWN[key] = _tested(module)
    return _KNOWN[key]


def _tested(module: nn.Module) -> Foreign | None:
    try:
        with torch.no_grad():
            probe = random_copy(module)
            return _solved(probe)
    except Exception:  # a foreign forward may raise anything; whatever it raises, it is not a batch norm we know
        return None


def _solved(probe: nn.Module) -> Foreign | None:
    mean, var = own_tensor(probe, "running_mean"), own_tensor(probe, "running_var")
    assert mean is not None
    assert var is not None
    measured = _measured_affine(probe, len(mean))
    if measured is None:
        return None
    scale, shift = measured
    own = {**vars(probe), **probe._buffers, **probe._parameters}
    names = [
        k for k, v in own.items() if isinstance(v, Tensor) and v.shape == mean.shape and v is not mean and v is not var
    ]
    for weight in (*names, None):
        gain = own[weight] if weight is not None else torch.ones_like(mean)
        eps = (gain / scale).square() - var
        if not torch.allclose(eps, eps.mean(), rtol=0, atol=1e-10) or eps.mean() < -1e-10 or (gain * scale < 0).any():
            continue
        for bias in (*names, None):
            rest = own[bias] if bias is not None else torch.zeros_like(mean)
            if torch.allclose(shift, rest - mean * scale, rtol=1e-9, atol=1e-9):
                return Foreign(_nearest_eps(probe, float(eps.mean())), weight, bias)
    return None


def _measured_affine(probe: nn.Module, channels: int) -> tuple[Tensor, Tensor] | None:
    """The scale and shift (C,) by which a module maps each channel, if that is all it does."""
    generator = torch.Generator().manual_seed(1)
    sides = [side for side in (5, 3, 4, 2) if side != channels]
    for rank in (4, 3, 2, 5):
        shape = (3, channels, *sides[: rank - 2])
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        x[0] *= 1e3  # what is cut off is noticed
        try:
            shift = probe(torch.zeros(shape, dtype=torch.float64))
            scale = probe(torch.ones(shape, dtype=torch.float64)) - shift
            found = probe(x.clone())
        except Exception:  # another rank may do
            continue
        if shift.shape != shape or not torch.allclose(found, scale * x + shift, rtol=1e-9, atol=1e-9):
            continue
        axes = [axis for axis in range(rank) if axis != 1]
        if all(
            (each == each.mean(axes, keepdim=True)).all()
            or torch.allclose(each, each.mean(axes, keepdim=True), rtol=1e-12)
            for each in (scale, shift)
        ):
            return scale.mean(axes), shift.mean(axes)
    return None


def _nearest_eps(module: nn.Module, measured: float) -> float:
    """The module's own number where it is what was measured, else the nearest short decimal."""
    for name in _EPS_NAMES:
        own = getattr(module, name, None)
        if isinstance(own, float) and abs(own - measured) < 1e-10:
            return own
    short = float(f"{measured:.0e}") if measured > 0 else 0.0
    return short if abs(short - measured) < 1e-10 else max(measured, 0.0)


def random_copy(module: nn.Module) -> nn.Module:
    """A float64 copy on the CPU, in eval mode, with random numbers; variances are positive."""
    probe = copy.deepcopy(module).to_empty(device="cpu").double().eval()
    generator = torch.Generator().manual_seed(0)
    for key, value in list(vars(probe).items()):
        if isinstance(value, Tensor):
            setattr(
                probe, key, torch.zeros(value.shape, dtype=torch.float64 if value.is_floating_point() else value.dtype)
            )
    plain = [value for value in vars(probe).values() if isinstance(value, Tensor)]
    for tensor in [*probe.parameters(), *probe.buffers(), *plain]:
        tensor.zero_()
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    for each in probe.modules():
        var = own_tensor(each, "running_var")
        if var is not None:
            var.copy_(torch.rand(var.shape, generator=generator, dtype=torch.float64) + 0.5)
    return probe
