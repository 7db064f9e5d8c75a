"""What counts as a batch norm, and how to read one.

The registry goes by ``isinstance``, most specific class first. In addition, any module that holds ``running_mean`` and
``running_var`` counts: projects copy such classes. A class whose ``forward`` is not known is put to the test: in eval
mode it must be the affine map that its numbers say, or it is not touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from timm.layers.inplace_abn import InplaceAbn
from timm.layers.split_batchnorm import SplitBatchNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torchvision.ops.misc import FrozenBatchNorm2d

from normsurgeon.norms.affine import Affine, Moments
from normsurgeon.norms.foreign import Foreign, own_tensor, random_copy, understood

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

    @property
    def moments(self) -> Moments:
        """The running statistics, float64."""
        assert self.mean is not None
        assert self.var is not None
        return Moments(self.mean.detach().double(), self.var.detach().double())

    @property
    def whitener(self) -> Affine:
        """The batch norm without its gamma and beta: ``xhat = (x - mean) / sqrt(var + eps)``."""
        moments = self.moments
        scale = torch.rsqrt(moments.var + self.eps)
        return Affine(scale, -moments.mean * scale)

    @property
    def gamma_beta(self) -> Affine:
        """The batch norm's own affine; ones and zeros where it has none."""
        reference = next((t for t in (self.mean, self.weight) if t is not None), torch.empty(self.channels))
        ones = torch.ones_like(reference, dtype=torch.float64)
        return Affine(
            self.weight.detach().double() if self.weight is not None else ones,
            self.bias.detach().double() if self.bias is not None else torch.zeros_like(ones),
        )

    @property
    def fixed(self) -> Affine:
        """The eval-mode function up to drop and act: one fixed map."""
        return self.gamma_beta.compose(self.whitener)

    def finished(self, y: Tensor) -> Tensor:
        """``act(drop(y))``."""
        for part in (self.drop, self.act):
            y = part(y) if part is not None else y
        return y


def is_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a batch norm of a known class, or holds running statistics as one does.

    An InstanceNorm that tracks them is none: in training it works sample by sample.

    >>> is_batch_norm(nn.SyncBatchNorm(4)), is_batch_norm(nn.GroupNorm(2, 4))
    (True, False)
    """
    if is_known(module):
        return True
    mean, var = own_tensor(module, "running_mean"), own_tensor(module, "running_var")
    return (
        mean is not None
        and var is not None
        and mean.ndim == 1
        and mean.shape == var.shape
        and not isinstance(module, _InstanceNorm)
    )


def is_known(module: Any) -> bool:
    """Whether ``module`` is of a class in ``BATCH_NORMS``, whose attributes are known by name."""
    return isinstance(module, BATCH_NORMS)


def read(module: Any) -> BatchNormReading:
    """Read a batch norm's statistics, affine, eps and fused activation. Tensors are the module's own, not copies.

    Of a class that is not known, what ``why_unreadable`` does not confirm may be missing.
    """
    if not is_known(module):
        return _read_foreign(module)
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


def _read_foreign(module: nn.Module) -> BatchNormReading:
    found = understood(module) or Foreign(0.0, None, None)
    mean = own_tensor(module, "running_mean")
    assert mean is not None
    weight, bias = (own_tensor(module, name) if name is not None else None for name in (found.weight, found.bias))
    return BatchNormReading(len(mean), found.eps, mean, own_tensor(module, "running_var"), weight, bias)


def why_unreadable(module: nn.Module) -> str | None:
    """Why a batch norm's function cannot be known from its numbers, or None when it can."""
    name = type(module).__name__
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return "lazy and not yet initialised: run the model once on an example first"
    if type(module).__module__.startswith("torch.ao."):
        return f"quantized ({name}): convert before quantizing"
    if not is_known(module):
        if understood(module) is None:
            return f"{name} holds running statistics, but in eval mode it is not the affine map of them"
    elif not _known_forward(module) and not _behaves_like_batch_norm(module):
        whose = "has a forward of its own on this instance" if "forward" in vars(module) else "overrides forward"
        return f"{name} {whose}, and in eval mode it is not the affine map of its buffers"
    reading = read(module)
    for label, tensor in (
        ("running_var", reading.var),
        ("running_mean", reading.mean),
        ("weight", reading.weight),
        ("bias", reading.bias),
    ):
        if tensor is not None and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            return f"{label} holds values that are not finite"
    if reading.var is not None and not reading.var.is_meta:
        wrong = (reading.var.double() + reading.eps <= 0).nonzero()
        if len(wrong):
            return f"running_var + eps is not positive in every channel (not in channel {int(wrong[0])})"
    return None


def overflows(reading: BatchNormReading) -> bool:
    """Whether a per-sample norm of the batch norm's own input would overflow where the batch norm does not.

    Its input reaches about ``|mean| + 10 sd``; a variance is made of squares, summed in float32 or better.
    """
    mean, var = reading.mean, reading.var
    if mean is None or var is None or mean.is_meta or not len(mean):
        return False
    largest = float((mean.double().abs() + 10 * torch.sqrt((var.double() + reading.eps).clamp_min(0))).max())
    dtype = reading.reference.dtype
    wide = torch.promote_types(dtype, torch.float32)
    return largest > torch.finfo(dtype).max or largest**2 > torch.finfo(wide).max / 1e3


def _known_forward(module: nn.Module) -> bool:
    return "forward" not in vars(module) and type(module).forward in _KNOWN_FORWARDS


def _behaves_like_batch_norm(module: nn.Module) -> bool:
    """Whether a subclass with its own forward still computes ``act(drop(affine(x)))`` in eval mode.

    The probe fills a copy with random numbers, so the answer depends on the class and its settings alone, and
    also comes for a module on the meta device.
    """
    try:
        with torch.no_grad():
            probe = random_copy(module)
            reading = read(probe)
            if reading.mean is None or reading.var is None:
                return False
            rank = 5 if isinstance(module, nn.BatchNorm3d) else 2 if isinstance(module, nn.BatchNorm1d) else 4
            shape = (3, reading.channels, *[4] * (rank - 2))
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            x[0] *= 1e3  # what is cut off is noticed
            return torch.allclose(probe(x.clone()), reading.finished(reading.fixed(x)), rtol=1e-9, atol=1e-9)
    except Exception:  # a foreign forward may raise anything; whatever it raises, it is not a batch norm we know
        return False
