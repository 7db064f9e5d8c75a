"""What counts as a batch norm, and how to read one.

The registry goes by ``isinstance``, most specific class first. A subclass that brings its own ``forward`` is put
to the test: in eval mode it must be the affine map that its buffers say, or it is not touched.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from timm.layers.inplace_abn import InplaceAbn
from timm.layers.split_batchnorm import SplitBatchNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torchvision.ops.misc import FrozenBatchNorm2d

from normsurgeon.norms.layers import per_channel

BATCH_NORMS: tuple[type[nn.Module], ...] = (
    _BatchNorm,
    FrozenBatchNormAct2d,
    FrozenBatchNorm2d,
    InplaceAbn,
)

_KNOWN_FORWARDS = {
    cls.forward
    for cls in (
        _BatchNorm,
        nn.SyncBatchNorm,
        BatchNormAct2d,
        SyncBatchNormAct,
        SplitBatchNorm2d,
        FrozenBatchNormAct2d,
        FrozenBatchNorm2d,
        InplaceAbn,
    )
}


@dataclass(frozen=True)
class BatchNormReading:
    """A batch norm's numbers and parts; every vector has shape (C,), and is None where the module has none.

    ``act`` and ``drop`` are the module's own; they are None for a plain norm.
    """

    channels: int
    eps: float
    mean: Tensor | None
    var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    drop: nn.Module | None = None
    act: nn.Module | None = None

    @property
    def reference(self) -> Tensor:
        """A tensor that has the layer's device and dtype."""
        for tensor in (self.weight, self.mean):
            if tensor is not None:
                return tensor
        return torch.empty(0)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a batch norm of any known kind.

    >>> is_batch_norm(nn.SyncBatchNorm(4)), is_batch_norm(nn.GroupNorm(2, 4))
    (True, False)
    """
    return isinstance(module, BATCH_NORMS)


def read(module: Any) -> BatchNormReading:
    """Read a batch norm's statistics, affine, eps and fused activation. Tensors are the module's own, not copies."""
    weight, bias = module.weight, module.bias
    mean, var = module.running_mean, module.running_var
    drop, act = getattr(module, "drop", None), getattr(module, "act", None)
    if isinstance(module, InplaceAbn):
        act = {
            "leaky_relu": lambda: nn.LeakyReLU(module.act_param),
            "elu": lambda: nn.ELU(module.act_param),
            "identity": nn.Identity,
        }[module.act_name]()
    channels = getattr(module, "num_features", None)
    if channels is None:
        channels = len(weight)
    return BatchNormReading(
        channels=int(channels),
        eps=float(module.eps),
        mean=mean,
        var=var,
        weight=weight,
        bias=bias,
        drop=drop if isinstance(drop, nn.Module) else None,
        act=act if isinstance(act, nn.Module) else None,
    )


def why_unreadable(module: nn.Module) -> str | None:
    """Why a batch norm's function cannot be known from its buffers, or None when it can."""
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return "lazy and not yet initialised: run the model once on an example first"
    if type(module).__module__.startswith("torch.ao."):
        return f"quantized ({type(module).__name__}): convert before quantizing"
    if type(module).forward not in _KNOWN_FORWARDS and not _behaves_like_batch_norm(module):
        return f"{type(module).__name__} overrides forward, and in eval mode it is not the affine map of its buffers"
    reading = read(module)
    for label, tensor in (("running_var", reading.var), ("running_mean", reading.mean)):
        if tensor is not None and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            return f"{label} holds values that are not finite"
    if reading.var is not None and not reading.var.is_meta and bool((reading.var + reading.eps <= 0).any()):
        return "running_var + eps is not positive in every channel"
    return None


def eval_affine(reading: BatchNormReading) -> tuple[Tensor, Tensor]:
    """The eval-mode function as float64 ``(scale, shift)``, each of shape (C,): ``y = scale * x + shift``."""
    assert reading.mean is not None
    assert reading.var is not None
    scale = torch.rsqrt(reading.var.double() + reading.eps)
    if reading.weight is not None:
        scale = scale * reading.weight.double()
    shift = -reading.mean.double() * scale
    if reading.bias is not None:
        shift = shift + reading.bias.double()
    return scale, shift


def _behaves_like_batch_norm(module: nn.Module) -> bool:
    """Whether a subclass with its own forward still computes ``act(drop(affine(x)))`` in eval mode.

    The probe fills a copy with random numbers, so the answer depends on the class and its settings alone, and
    also comes for a module on the meta device.
    """
    try:
        probe = copy.deepcopy(module).to_empty(device="cpu").double().eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in [*probe.parameters(), *probe.buffers()]:
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + 0.5)
            reading = read(probe)
            if reading.mean is None or reading.var is None:
                return False
            rank = 5 if isinstance(module, nn.BatchNorm3d) else 2 if isinstance(module, nn.BatchNorm1d) else 4
            x = torch.randn(3, reading.channels, *[4] * (rank - 2), generator=generator, dtype=torch.float64)
            scale, shift = eval_affine(reading)
            expected = x * per_channel(scale, x) + per_channel(shift, x)
            for part in (reading.drop, reading.act):
                expected = part(expected) if part is not None else expected
            return torch.allclose(probe(x), expected, rtol=1e-9, atol=1e-9)
    except Exception:  # a foreign forward may raise anything; whatever it raises, it is not a batch norm we know
        return False
