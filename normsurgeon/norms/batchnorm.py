"""What counts as a batch norm, and how to read one.

The registry goes by ``isinstance``, most specific class first. Beside it, any module that holds ``running_mean`` and
``running_var`` counts: projects copy such classes. A class whose ``forward`` is not known is put to the test: in eval
mode it must be the affine map that its numbers say, or it is not touched.
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
from torch.nn.modules.instancenorm import _InstanceNorm
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


def own_tensor(module: nn.Module, name: str) -> Tensor | None:
    """A module's parameter, buffer or plain attribute of that name, where it is a tensor."""
    if isinstance(module, torch.jit.ScriptModule):
        return None  # compiled: nothing of it can be exchanged
    for place in (module._buffers, module._parameters, vars(module)):
        found = place.get(name)
        if isinstance(found, Tensor):
            return found
    return None


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
    found = _understood(module) or _Foreign(0.0, None, None)
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
        if _understood(module) is None:
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


def _known_forward(module: nn.Module) -> bool:
    return "forward" not in vars(module) and type(module).forward in _KNOWN_FORWARDS


@dataclass(frozen=True)
class _Foreign:
    """What a test found of a class that is not known: its eps, the names of its weight and bias (None: without)."""

    eps: float
    weight: str | None
    bias: str | None


_EPS_NAMES = ("eps", "epsilon", "variance_epsilon")
_UNDERSTOOD: dict[Any, _Foreign | None] = {}


def _understood(module: nn.Module) -> _Foreign | None:
    """How a module of unknown class computes ``weight * (x - mean) / sqrt(var + eps) + bias`` in eval mode, if it does.

    Found by a test of the class and its settings, once; an instance with a ``forward`` of its own is tested each time.
    """
    if "forward" in vars(module):
        return _tested(module)
    plain = (int, float, str, bool, type(None))
    settings = tuple(sorted((k, v) for k, v in vars(module).items() if isinstance(v, plain) and k != "training"))
    tensors = tuple((k, tuple(t.shape)) for k, t in [*module.named_parameters(), *module.named_buffers()])
    key = (type(module), repr(settings), tensors)
    if key not in _UNDERSTOOD:
        _UNDERSTOOD[key] = _tested(module)
    return _UNDERSTOOD[key]


def _tested(module: nn.Module) -> _Foreign | None:
    try:
        with torch.no_grad():
            probe = _random_copy(module)
            return _solved(probe)
    except Exception:  # a foreign forward may raise anything; whatever it raises, it is not a batch norm we know
        return None


def _solved(probe: nn.Module) -> _Foreign | None:
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
                return _Foreign(_nearest_eps(probe, float(eps.mean())), weight, bias)
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


def _random_copy(module: nn.Module) -> nn.Module:
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


def _behaves_like_batch_norm(module: nn.Module) -> bool:
    """Whether a subclass with its own forward still computes ``act(drop(affine(x)))`` in eval mode.

    The probe fills a copy with random numbers, so the answer depends on the class and its settings alone, and
    also comes for a module on the meta device.
    """
    try:
        with torch.no_grad():
            probe = _random_copy(module)
            reading = read(probe)
            if reading.mean is None or reading.var is None:
                return False
            rank = 5 if isinstance(module, nn.BatchNorm3d) else 2 if isinstance(module, nn.BatchNorm1d) else 4
            shape = (3, reading.channels, *[4] * (rank - 2))
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            x[0] *= 1e3  # what is cut off is noticed
            scale, shift = eval_affine(reading)
            expected = x * per_channel(scale, x) + per_channel(shift, x)
            for part in (reading.drop, reading.act):
                expected = part(expected) if part is not None else expected
            return torch.allclose(probe(x.clone()), expected, rtol=1e-9, atol=1e-9)
    except Exception:  # a foreign forward may raise anything; whatever it raises, it is not a batch norm we know
        return False
