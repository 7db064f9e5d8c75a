"""Small networks of every kind of step around a batch norm, and the ways in which parents call them.

A step takes (N, C, H, W) to the same shape and holds at least one batch norm. ``KINDS`` says of each what must become
of its norms: "fold", "no fold" (converted by the affine, or refused), "any", or "error" (as "no fold", or the whole
network is refused by an error). It holds in every network that the step is put into, unless the parent meddles with it
(``SPOILERS``). ``FAULTS`` names the kinds that the core gets wrong as yet.
"""

from __future__ import annotations

import copy
import functools
import random
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d, Conv2dSame, ConvNormAct, StdConv2d
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torchvision.ops.misc import Conv2dNormActivation, FrozenBatchNorm2d

C = 6

HOOK_CALLS: list[str] = []
"""One entry for each call of a hook that only reads: ``convert`` must add none."""


class Step(nn.Module):
    """A producer, a norm, and what the forward does with them."""

    def __init__(
        self, run: Callable[..., Tensor], conv: nn.Module | None = None, norm: nn.Module | None = None, **parts
    ):
        super().__init__()
        self.conv = conv or nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.norm = norm or nn.BatchNorm2d(C)
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, x: Tensor, raw: bool = False, mask: Tensor | None = None) -> Tensor:
        return self.run(self, x, raw, mask)


class Tokens(nn.Module):
    """A linear layer on tokens (N, H·W, C), and a BatchNorm1d reached by moving dimensions about."""

    def __init__(
        self,
        there: Callable[[Tensor], Tensor],
        back: Callable[[Tensor, Tensor], Tensor],
        cls: type[nn.Linear] = nn.Linear,
    ):
        super().__init__()
        self.linear, self.norm, self.there, self.back = cls(C, C), nn.BatchNorm1d(C), there, back

    def forward(self, x: Tensor, raw: bool = False, mask: Tensor | None = None) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return self.back(self.norm(self.there(self.linear(tokens))), tokens).transpose(1, 2).reshape(x.shape)


class SquareTokens(Tokens):
    """As many tokens as channels: shapes do not tell which dimension is which."""

    def forward(self, x: Tensor, raw: bool = False, mask: Tensor | None = None) -> Tensor:
        square = x.flatten(2).transpose(1, 2)[:, :C]
        return x + self.back(self.norm(self.there(self.linear(square))), square).mean((1, 2)).view(-1, 1, 1, 1)


class OwnFrozen(nn.Module):
    """torchvision's FrozenBatchNorm2d, copied into a project; ``eps`` may be written into the forward."""

    def __init__(self, eps_attribute: bool, names: tuple[str, str] = ("weight", "bias")):
        super().__init__()
        self.names = names
        if eps_attribute:
            self.eps = 1e-3
        for name in (*names, "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        w, b = (getattr(self, name).view(1, -1, 1, 1) for name in self.names)
        m, v = self.running_mean.view(1, -1, 1, 1), self.running_var.view(1, -1, 1, 1)
        scale = w * (v + getattr(self, "eps", 1e-5)).rsqrt()
        return x * scale + (b - m * scale)


class Clamped(OwnFrozen):
    """Holds statistics, and cuts its output off: no batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-5, 5)


class PlainConv(nn.Conv2d):
    """A subclass that changes nothing."""


class OwnForward(nn.Conv2d):
    """A subclass that calls the function itself."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=self.padding)


class Relu(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class NoBias(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, None, padding=self.padding)


class Offset(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Gain(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, 2 * self.weight, self.bias, padding=self.padding)


class GainAll(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Transposing(nn.Conv2d):
    """Its output has the rows in front: a norm sees its channels in dimension 1 after another transpose only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(1, 2)


class TransposingSquare(nn.Conv2d):
    """As above, on as many rows as channels: shapes do not tell."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.repeat(1, 1, 2, 1)[:, :, :C]).transpose(1, 2)


class OwnCall(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return F.relu(super().__call__(x))


class Gated(nn.Conv2d):
    """Scaled by something that depends on the input: a shift of the output would be scaled, too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.sigmoid(x.mean((1, 2, 3), keepdim=True))


class RowsMixed(nn.Conv2d):
    """Centres its weight over the output channels: no channel has a weight of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(0, keepdim=True), self.bias, padding=self.padding)


class RowsCentred(nn.Conv2d):
    """Centres its weight within each output channel: linear."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class Adapted(nn.Conv2d):
    """A second weight is added, as LoRA does it."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.delta = nn.Parameter(torch.randn_like(self.weight) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight + self.delta, self.bias, padding=self.padding)


class MaskedInPlace(nn.Conv2d):
    """Half of the weight is set to zero at each call, as PixelCNN does it; it is zero from the start."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.register_buffer("mask", torch.ones_like(self.weight))
        self.mask[:, :, 1:, 1:] = 0
        self.weight.data *= self.mask

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return super().forward(x)


class GivesADict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = conv()

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"out": self.inner(x), "also": (x,)}


class PlainLinear(nn.Linear):
    """A subclass that changes nothing."""


class OwnForwardLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class MatmulLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.bias


class ReluLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class DoublingNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return 2 * y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


@torch.jit.script
def scripted_sum(y: Tensor) -> Tensor:
    return torch.tanh(y).sum(1, keepdim=True)


def conv(cls: type[nn.Module] = nn.Conv2d, **options: Any) -> nn.Module:
    return cls(C, C, 3, **{"padding": 1, **options})


def varied(low: float, high: float, eps: float = 1e-5) -> Callable[[], nn.Module]:
    """A norm whose running variances lie between ``low`` and ``high``."""

    def make() -> nn.Module:
        norm = nn.BatchNorm2d(C, eps=eps)
        norm.variances = (low, high)
        return norm

    return make


def second(reader: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    """The producer's output is also read by ``reader``, whose result is added to the norm's output."""

    def run(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
        y = s.conv(x)
        return s.norm(y) + reader(y)

    return lambda: Step(run)


def between(change: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Step(lambda s, x, raw, mask: s.norm(change(s.conv(x))))


def plain(make: Callable[[], nn.Module] = conv, norm: Callable[[], nn.Module] | None = None) -> Callable[[], nn.Module]:
    return lambda: Step(lambda s, x, raw, mask: F.silu(s.norm(s.conv(x))), make(), norm() if norm else None)


def steps(run: Callable[..., Tensor], **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    """A step with a forward and parts of its own; ``conv`` and ``norm`` are there already."""
    return lambda: Step(run, **{name: part() for name, part in parts.items()})


def altered(change: Callable[[Step], Any], run: Callable[..., Tensor] | None = None) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        step = Step(run or (lambda s, x, raw, mask: s.norm(s.conv(x))))
        change(step)
        return step

    return make


def _kept(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    s.kept = s.conv(x)
    return s.norm(s.kept)


def _in_place_before(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    y = s.conv(x)
    y.add_(1)
    return s.norm(y)


def _in_place_after(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    y = s.conv(x)
    z = s.norm(y)
    return z + y.relu_()


def _through_a_view(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    y = s.conv(x)
    y.flatten()[::2].mul_(3)
    return s.norm(y)


def _patched(s: Step) -> None:
    s.conv.forward = types.MethodType(lambda self, x: F.relu(F.conv2d(x, self.weight, self.bias, padding=1)), s.conv)


def _patched_norm(s: Step) -> None:
    s.norm.forward = types.MethodType(lambda self, x: 2 * nn.BatchNorm2d.forward(self, x), s.norm)


def _tied(s: Step) -> None:
    s.other = conv(bias=False)
    s.other.weight = s.conv.weight


def _tied_storage(s: Step) -> None:
    s.other = conv(bias=False)
    s.other.weight.data = s.conv.weight.data


def _listed(s: Step) -> None:
    s.listed = [s.conv, s.norm]


def _border(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    n = s.norm
    zero = n.bias - n.running_mean * n.weight / torch.sqrt(n.running_var + n.eps)
    return n(s.conv(x)) + zero.view(1, -1, 1, 1)


def _functional(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    n = s.norm
    return F.batch_norm(s.conv(x), n.running_mean, n.running_var, n.weight, n.bias, False, 0.1, n.eps)


def _training(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    y = s.conv(x)
    return s.norm(y) + y if s.training else s.norm(y)


def _raw(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    y = s.conv(x)
    return s.norm(y) + y if raw else s.norm(y)


def _mask(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    y = s.conv(x)
    return s.norm(y) if mask is None else s.norm(y) + y * mask.sum()


def _shapes(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    y = s.conv(x)
    assert y.dtype == x.dtype
    return s.norm(y) + torch.zeros_like(y) + y.new_ones(y.shape) * y.size(1) + y.shape[-1]


def _branches(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    if float(x.abs().mean()) > 1e6:
        raise ValueError
    return s.norm(s.conv(x))


def _twice_apart(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    return s.norm(s.conv(x)) + s.conv(0.5 * x)


def _again_without_grad(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    with torch.no_grad():
        seen = s.conv(x)
    return s.norm(s.conv(x)) + seen.mean()


def _one_norm_for_two(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    return s.norm(s.conv(x)) + s.norm(s.other(x))


def _one_conv_for_two(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    y = s.conv(x)
    return s.norm(y) + s.norm2(y)


def _chunks(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    a, b = s.conv(x).chunk(2, 1)
    return s.norm(torch.cat([b, a], 1))


def _numpy(y: Tensor) -> Tensor:
    return torch.from_numpy(y.detach().numpy().copy())


def _numpy_without_grad(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    with torch.no_grad():
        y = s.conv(x)
        return s.norm(y) + torch.from_numpy(y.numpy().copy())


def _in_a_thread(y: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.sin, y.detach()).result()


def _out(y: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.mul(y, 2, out=torch.empty_like(y))


def _copied_into(y: Tensor) -> Tensor:
    buffer = y.new_zeros(y.shape)
    buffer[:, ::2] = y[:, ::2]
    return buffer


def _kept_and_used_later(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    s.kept = s.conv(x)
    z = s.norm(s.kept)
    return z + s.kept.mean()


def _loss_kept(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    y = s.conv(x)
    s.loss = y.abs().mean()
    return s.norm(y)


def _loss_kept_and_used(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    z = _loss_kept(s, x, raw, mask)
    return z * s.loss


def _more_shapes(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    y = s.conv(x)
    assert isinstance(y, Tensor)
    assert y.is_contiguous() or y.stride()
    zeros = y.new_zeros(y.size(0), 1, 1, 1) + torch.ones_like(y) * y.numel() + y.dim() + len(y) + y.ndim
    return s.norm(y) + zeros.to(y.device) + x.expand_as(y) + F.interpolate(x, size=y.shape[2:]) + x.view_as(y)


def _sizes_of_layers(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    z = s.norm(s.conv(x.to(s.conv.weight.dtype)))
    return z + s.conv.weight.shape[0] + s.conv.weight.device.type.count("u")


def _weights_in_all(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    return s.norm(s.conv(x)) + sum(p.mean() for p in s.conv.parameters())


def _functional_conv(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    return s.norm(F.conv2d(x, s.conv.weight, s.conv.bias, padding=1))


def _functional_call(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    return s.norm(torch.func.functional_call(s.conv, dict(s.conv.named_parameters()), (x,)))


def _raw_and_mask(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    y = s.conv(x)
    return s.norm(y) + y if raw and mask is not None else s.norm(y)


def _not_raw(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    """The norm is left out in one way of calling."""
    y = s.conv(x)
    return y if raw else s.norm(y)


def _only_raw(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    """A norm that is called in one way of calling only."""
    z = s.norm(s.conv(x))
    return s.norm2(s.conv2(z)) if raw else z


def _image_by_image(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    return torch.stack([s.norm(s.conv(image[None]))[0] for image in x])


def _counts(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    s.count += 1
    return s.norm(s.conv(x))


def _counter() -> Tensor:
    return nn.Buffer(torch.zeros(()))


def _keeps_a_graph_tensor(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    s.cache["shift"] = s.shift * 2
    return s.norm(s.conv(x)) + s.cache["shift"]


def _input_changed(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    return s.norm(s.conv(x.clone().mul_(0.5).relu_()))


def _strided(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    return F.interpolate(s.norm(s.conv(x)), size=x.shape[2:])


def _output_size(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    return s.norm(s.conv(x, output_size=x.shape[2:]))


def _first_channels(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    return s.norm(s.conv(x))[:, :C]


def _transposed_back(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    return s.norm(s.conv(x).transpose(1, 2))


def _square_transposed(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    return x + s.norm(s.conv(x)).mean((2, 3), keepdim=True)


def _gives_a_dict(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    given = s.conv(x)
    return s.norm(given["out"]) + given["also"][0]


def _closed_over(s: Step) -> None:
    """A function that holds the layer itself: a copy of the network goes on calling the original's."""
    s.call = lambda x, layer=[s.conv]: layer[0](x)


def _in_a_partial(s: Step) -> None:
    s.call = functools.partial(s.conv)
    s.normed = s.norm.forward


def _bound(s: Step) -> None:
    s.call = s.conv.forward


def _buffer_of_the_weight(s: Step) -> None:
    s.register_buffer("mirror", s.conv.weight.data)


def _overlapping(s: Step) -> None:
    """Two weights in one piece of memory, the second a part of the first that does not begin where it begins."""
    s.other = nn.Conv2d(C, 1, 3, padding=1, bias=False)
    s.other.weight.data = s.conv.weight.data[2:3]


def _pruned(s: Step) -> None:
    prune.l1_unstructured(s.conv, "weight", 0.3)


SPATIAL = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d),
}


class Spatial(nn.Module):
    """A convolution over one or three dimensions."""

    def __init__(self, dims: int, transposed: bool):
        super().__init__()
        convolution, transposed_convolution, norm = SPATIAL[dims]
        cls = transposed_convolution if transposed else convolution
        self.conv, self.norm, self.dims = cls(C, C, 3, padding=1, groups=2), norm(C), dims

    def forward(self, x: Tensor, raw: bool = False, mask: Tensor | None = None) -> Tensor:
        moved = x.flatten(2) if self.dims == 1 else x.unsqueeze(2)
        return self.norm(self.conv(moved)).reshape(x.shape)


class Vector(nn.Module):
    """A linear layer on the means of the channels."""

    def __init__(self, norm: nn.Module, linear: nn.Module | None = None):
        super().__init__()
        self.linear, self.norm = linear or nn.Linear(C, C, bias=False), norm

    def forward(self, x: Tensor, raw: bool = False, mask: Tensor | None = None) -> Tensor:
        return x * torch.sigmoid(self.norm(self.linear(x.mean((2, 3)))))[:, :, None, None]


class Halves(nn.Module):
    """A norm for each half of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm1, self.norm2 = conv(), nn.BatchNorm2d(C // 2), nn.BatchNorm2d(C // 2)

    def forward(self, x: Tensor, raw: bool = False, mask: Tensor | None = None) -> Tensor:
        a, b = self.conv(x).split(C // 2, 1)
        return torch.cat([self.norm1(a), self.norm2(b)], 1)


class ChannelsLast(nn.Module):
    """A linear layer on (N, H, W, C), and a BatchNorm2d."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(C, C), nn.BatchNorm2d(C)

    def forward(self, x: Tensor, raw: bool = False, mask: Tensor | None = None) -> Tensor:
        return self.norm(self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class OtherRank(nn.Module):
    """A convolution over images, and a norm for another number of dimensions."""

    def __init__(self, norm: nn.Module, there: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.there = conv(), norm, there

    def forward(self, x: Tensor, raw: bool = False, mask: Tensor | None = None) -> Tensor:
        return x + self.norm(self.there(self.conv(x))).sigmoid().mean()


class Pooled(nn.Module):
    """A 1x1 convolution on the means of the channels, and a BatchNorm1d."""

    def __init__(self, there: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.there = nn.Conv2d(C, C, 1), nn.BatchNorm1d(C), there

    def forward(self, x: Tensor, raw: bool = False, mask: Tensor | None = None) -> Tensor:
        return x * self.norm(self.there(self.conv(x.mean((2, 3), keepdim=True)))).view(-1, C, 1, 1)


class Block(nn.Module):
    """A container, and how it is called."""

    def __init__(self, body: nn.Module, run: Callable[[Any, Tensor], Tensor] | None = None):
        super().__init__()
        self.body, self.run = body, run

    def forward(self, x: Tensor, raw: bool = False, mask: Tensor | None = None) -> Tensor:
        return self.body(x) if self.run is None else self.run(self.body, x)


def _sliced(body: nn.Sequential, x: Tensor) -> Tensor:
    return body[:2](x)


def _children(body: nn.Sequential, x: Tensor) -> Tensor:
    return functools.reduce(lambda made, layer: layer(made), body.children(), x)


def _by_key(body: nn.ModuleDict, x: Tensor) -> Tensor:
    return body["b"](body["a"](x))


def _in_order(body: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in body:
        x = layer(x)
    return x


def tokens(
    there: Callable[[Tensor], Tensor], back: Callable[[Tensor, Tensor], Tensor], cls: type[nn.Linear] = nn.Linear
) -> Callable[[], nn.Module]:
    return lambda: Tokens(there, back, cls)


def _hook_that_clamps(s: Step) -> None:
    s.conv.register_forward_hook(lambda module, inputs, output: output.clamp(min=0))


def _pre_hook_on_the_norm(s: Step) -> None:
    s.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0].clamp(min=0),))


def _hook_on_the_norm(s: Step) -> None:
    s.norm.register_forward_hook(lambda module, inputs, output: output + inputs[0])


def _hook_that_reads(s: Step) -> None:
    s.conv.register_forward_hook(lambda module, inputs, output: HOOK_CALLS.append("conv"))


def _hooks_that_count(s: Step) -> None:
    for module in (s, s.conv, s.norm):
        module.register_forward_pre_hook(lambda module, inputs: HOOK_CALLS.append("before"))
    s.register_forward_hook(lambda module, inputs, output: HOOK_CALLS.append("after"))


def _hook_that_keeps(s: Step) -> None:
    s.kept = {}
    s.conv.register_forward_hook(functools.partial(_keep, s.kept))


def _keep(kept: dict[str, Tensor], module: nn.Module, inputs: Any, output: Tensor) -> None:
    kept["y"] = output


def _backward_hook(s: Step) -> None:
    s.conv.register_full_backward_hook(lambda module, grads, made: HOOK_CALLS.append("backward"))


def _pre_hook_on_the_conv(s: Step) -> None:
    s.conv.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


KINDS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "conv": (plain(), "fold"),
    "conv without bias": (plain(lambda: conv(bias=False)), "fold"),
    "grouped": (plain(lambda: conv(groups=3)), "fold"),
    "depthwise": (plain(lambda: conv(groups=C)), "fold"),
    "transposed": (plain(lambda: conv(nn.ConvTranspose2d)), "fold"),
    "transposed grouped": (plain(lambda: conv(nn.ConvTranspose2d, groups=2)), "fold"),
    "dilated": (plain(lambda: conv(dilation=2, padding=2)), "fold"),
    "circular": (plain(lambda: conv(padding_mode="circular")), "fold"),
    "reflect": (plain(lambda: conv(padding_mode="reflect")), "fold"),
    "Conv2dSame": (plain(lambda: Conv2dSame(C, C, 3)), "fold"),
    "replicate": (plain(lambda: conv(padding_mode="replicate")), "fold"),
    "padding same": (plain(lambda: conv(padding="same", dilation=2)), "fold"),
    "strided": (lambda: Step(_strided, conv(stride=2)), "fold"),
    "strided transposed": (
        lambda: Step(_strided, conv(nn.ConvTranspose2d, stride=2, output_padding=1, groups=3, bias=False)),
        "fold",
    ),
    "given an output size": (lambda: Step(_output_size, conv(nn.ConvTranspose2d)), "fold"),
    "more channels": (lambda: Step(_first_channels, nn.Conv2d(C, 8, 1), nn.BatchNorm2d(8)), "fold"),
    "several channels of each": (
        lambda: Step(_first_channels, nn.Conv2d(C, 2 * C, 3, padding=1, groups=C), nn.BatchNorm2d(2 * C)),
        "fold",
    ),
    "three channels": (
        lambda: Step(lambda s, x, r, m: s.norm(s.conv(x)).repeat(1, 2, 1, 1), nn.Conv2d(C, 3, 1), nn.BatchNorm2d(3)),
        "fold",
    ),
    "one channel": (
        lambda: Step(lambda s, x, r, m: x * s.norm(s.conv(x)), nn.Conv2d(C, 1, 3, padding=1), nn.BatchNorm2d(1)),
        "fold",
    ),
    "1-D": (lambda: Spatial(1, False), "fold"),
    "1-D transposed": (lambda: Spatial(1, True), "fold"),
    "3-D": (lambda: Spatial(3, False), "fold"),
    "3-D transposed": (lambda: Spatial(3, True), "fold"),
    "vector": (lambda: Vector(nn.BatchNorm1d(C)), "fold"),
    "vector, bias": (lambda: Vector(nn.BatchNorm1d(C), nn.Linear(C, C)), "fold"),
    "vector, subclass": (lambda: Vector(nn.BatchNorm1d(C), PlainLinear(C, C)), "fold"),
    "vector, relu inside": (lambda: Vector(nn.BatchNorm1d(C), ReluLinear(C, C)), "no fold"),
    "norm + act": (plain(norm=lambda: BatchNormAct2d(C, act_layer=nn.SiLU)), "fold"),
    "norm + act in place": (plain(norm=lambda: BatchNormAct2d(C, inplace=True)), "fold"),
    "frozen": (plain(norm=lambda: FrozenBatchNorm2d(C)), "fold"),
    "own frozen": (plain(norm=lambda: OwnFrozen(True)), "fold"),
    "own frozen without eps": (plain(norm=lambda: OwnFrozen(False)), "fold"),
    "own frozen, gamma and beta": (plain(norm=lambda: OwnFrozen(False, ("gamma", "beta"))), "fold"),
    "holds statistics and clamps": (plain(norm=lambda: Clamped(True)), "no fold"),
    "synchronised": (plain(norm=lambda: nn.SyncBatchNorm(C)), "fold"),
    "without affine": (plain(norm=lambda: nn.BatchNorm2d(C, affine=False)), "fold"),
    "norm that doubles": (plain(norm=lambda: DoublingNorm(C)), "no fold"),
    "tiny variances": (plain(norm=varied(1e-12, 1e-9)), "fold"),
    "tiny variances and eps": (plain(norm=varied(1e-8, 1e-6, eps=1e-12)), "fold"),
    "huge variances": (plain(norm=varied(1e6, 1e10)), "fold"),
    "without statistics": (plain(norm=lambda: nn.BatchNorm2d(C, track_running_stats=False)), "no fold"),
    "timm's block": (lambda: Block(ConvNormAct(C, C, 3)), "fold"),
    "torchvision's block": (lambda: Block(Conv2dNormActivation(C, C, 3, inplace=True)), "fold"),
    "Sequential": (lambda: Block(nn.Sequential(conv(), nn.Identity(), nn.BatchNorm2d(C), nn.SiLU())), "fold"),
    "Sequential in Sequentials": (
        lambda: Block(nn.Sequential(nn.Sequential(nn.Sequential(conv())), nn.Sequential(nn.BatchNorm2d(C)))),
        "fold",
    ),
    "Sequential, dropout between": (
        lambda: Block(nn.Sequential(conv(), nn.Dropout2d(0.5), nn.BatchNorm2d(C))),
        "any",
    ),
    "slice of a Sequential": (lambda: Block(nn.Sequential(conv(), nn.BatchNorm2d(C), nn.ReLU()), _sliced), "fold"),
    "children in a loop": (lambda: Block(nn.Sequential(conv(), nn.BatchNorm2d(C)), _children), "fold"),
    "ModuleDict": (lambda: Block(nn.ModuleDict({"a": conv(), "b": nn.BatchNorm2d(C)}), _by_key), "fold"),
    "ModuleList": (lambda: Block(nn.ModuleList([conv(), nn.BatchNorm2d(C)]), _in_order), "fold"),
    "scripted layer behind": (
        steps(lambda s, x, r, m: s.scripted(s.norm(s.conv(x))), scripted=lambda: torch.jit.script(nn.ReLU())),
        "fold",
    ),
    "scripted convolution": (plain(lambda: torch.jit.script(conv())), "any"),
    "subclass": (plain(lambda: conv(PlainConv)), "fold"),
    "subclass, own forward": (plain(lambda: conv(OwnForward)), "fold"),
    "subclass, weight doubled": (plain(lambda: conv(Gain)), "fold"),
    "subclass, output doubled": (plain(lambda: conv(GainAll)), "no fold"),
    "subclass, relu inside": (plain(lambda: conv(Relu)), "no fold"),
    "subclass, bias unused": (plain(lambda: conv(NoBias)), "no fold"),
    "subclass, offset": (plain(lambda: conv(Offset)), "no fold"),
    "subclass, transposing": (lambda: Step(_transposed_back, conv(Transposing)), "any"),
    "subclass, transposing a square": (lambda: Step(_square_transposed, conv(TransposingSquare)), "no fold"),
    "subclass, own call": (plain(lambda: conv(OwnCall)), "no fold"),
    "subclass, gated": (plain(lambda: conv(Gated)), "no fold"),
    "subclass, rows mixed": (plain(lambda: conv(RowsMixed)), "no fold"),
    "subclass, rows centred": (plain(lambda: conv(RowsCentred)), "any"),
    "subclass, second weight": (plain(lambda: conv(Adapted)), "no fold"),
    "subclass, masked in place": (plain(lambda: conv(MaskedInPlace)), "any"),
    "layer that gives a dict": (lambda: Step(_gives_a_dict, GivesADict()), "fold"),
    "weight standardisation": (plain(lambda: StdConv2d(C, C, 3, padding=1)), "no fold"),
    "weight norm": (plain(lambda: nn.utils.parametrizations.weight_norm(conv())), "no fold"),
    "spectral norm": (plain(lambda: nn.utils.parametrizations.spectral_norm(conv())), "no fold"),
    "old weight norm": (plain(lambda: nn.utils.weight_norm(conv())), "no fold"),
    "old spectral norm": (plain(lambda: nn.utils.spectral_norm(conv())), "no fold"),
    "weight norm of a transposed one": (
        plain(lambda: nn.utils.parametrizations.weight_norm(conv(nn.ConvTranspose2d))),
        "no fold",
    ),
    "orthogonal": (plain(lambda: nn.utils.parametrizations.orthogonal(conv())), "no fold"),
    "pruned": (altered(_pruned), "no fold"),
    "read by +": (second(lambda y: y), "no fold"),
    "read by type()": (second(lambda y: y.type(torch.float64)), "no fold"),
    "read by ==": (second(lambda y: (y == 0).double()), "no fold"),
    "read by >": (second(lambda y: (y > 0).double()), "no fold"),
    "read by sum": (second(lambda y: y.sum()), "no fold"),
    "read by where": (second(lambda y: torch.where(y > 0, 1.0, 2.0)), "no fold"),
    "read by detach": (second(lambda y: y.detach()), "no fold"),
    "read by .data": (second(lambda y: y.data * 2), "no fold"),
    "read by a view of .data": (second(lambda y: y.data.transpose(2, 3).sum()), "no fold"),
    "read by numpy": (second(_numpy), "no fold"),
    "read by numpy without grad": (lambda: Step(_numpy_without_grad), "no fold"),
    "read by tolist": (second(lambda y: torch.tensor(y.tolist(), dtype=y.dtype)), "no fold"),
    "read by a scripted function": (second(scripted_sum), "no fold"),
    "read by an autograd function": (second(Double.apply), "no fold"),
    "read by indexing": (second(lambda y: y[:, :1]), "no fold"),
    "read by max": (second(lambda y: y.amax((2, 3), keepdim=True)), "no fold"),
    "read by item": (second(lambda y: y.sum().item()), "no fold"),
    "read by float": (second(lambda y: float(y.mean())), "no fold"),
    "read by clone": (second(lambda y: y.clone()), "no fold"),
    "read by a copy": (second(lambda y: copy.deepcopy(y.detach())), "no fold"),
    "read by to()": (second(lambda y: y.to(torch.float32).to(torch.float64)), "no fold"),
    "read by unbind": (second(lambda y: y.unbind(1)[0][:, None]), "no fold"),
    "read by masked_fill": (second(lambda y: torch.zeros_like(y).masked_fill(y > 0, 3.0)), "no fold"),
    "read by out=": (second(_out), "no fold"),
    "copied into a buffer": (second(_copied_into), "no fold"),
    "read by copy_": (second(lambda y: torch.empty_like(y).copy_(y)), "no fold"),
    "read by as_strided": (second(lambda y: y.as_strided((1,), (1,), 3)), "no fold"),
    "read by dlpack": (second(lambda y: torch.from_dlpack(y.detach()).sum()), "no fold"),
    "read by vmap": (second(lambda y: torch.vmap(torch.sin)(y)), "no fold"),
    "read by einsum": (second(lambda y: torch.einsum("nchw,nc->nhw", y, y.mean((2, 3)))[:, None]), "no fold"),
    "read by an operator": (second(lambda y: torch.ops.aten.neg.default(y)), "no fold"),
    "read in a thread": (second(_in_a_thread), "no fold"),
    "read in a layer": (second(nn.Softmax(1)), "no fold"),
    "kept in an attribute": (lambda: Step(_kept), "no fold"),
    "kept and used later": (lambda: Step(_kept_and_used_later), "no fold"),
    "loss kept": (lambda: Step(_loss_kept), "no fold"),
    "loss kept and used": (lambda: Step(_loss_kept_and_used), "no fold"),
    "changed in place before": (lambda: Step(_in_place_before), "no fold"),
    "changed in place after": (lambda: Step(_in_place_after), "no fold"),
    "changed through a view": (lambda: Step(_through_a_view), "no fold"),
    "weight read": (altered(lambda s: None, lambda s, x, r, m: s.norm(s.conv(x)) + s.conv.weight.mean()), "no fold"),
    "weight's data read": (
        altered(lambda s: None, lambda s, x, r, m: s.norm(s.conv(x)) + s.conv.weight.data.mean()),
        "no fold",
    ),
    "bias read": (
        lambda: Step(lambda s, x, r, m: s.norm(s.conv(x)) + s.conv.bias.view(1, -1, 1, 1), conv()),
        "no fold",
    ),
    "bias detached": (
        lambda: Step(lambda s, x, r, m: s.norm(s.conv(x)) + s.conv.bias.detach().sum(), conv()),
        "no fold",
    ),
    "parameters read in a loop": (lambda: Step(_weights_in_all, conv()), "no fold"),
    "weight read by state_dict": (
        lambda: Step(lambda s, x, r, m: s.norm(s.conv(x)) + s.conv.state_dict()["weight"].sum()),
        "no fold",
    ),
    "weight in a functional convolution": (lambda: Step(_functional_conv), "no fold"),
    "functional call of the layer": (lambda: Step(_functional_call), "any"),
    "weight in a buffer": (
        altered(_buffer_of_the_weight, lambda s, x, r, m: s.norm(s.conv(x)) + s.mirror.mean()),
        "any",
    ),
    "weights overlap": (altered(_overlapping, lambda s, x, r, m: s.norm(s.conv(x)) + s.other(x)), "any"),
    "size of the weight read": (lambda: Step(_sizes_of_layers), "fold"),
    "more of the shape read": (lambda: Step(_more_shapes), "fold"),
    "input moved to its type": (
        lambda: Step(lambda s, x, r, m: s.norm(y := s.conv(x)) + x.to(y.dtype) + x.to(y.device)),
        "fold",
    ),
    "input moved to it": (lambda: Step(lambda s, x, r, m: s.norm(y := s.conv(x)) + x.type_as(y) + x.to(y)), "any"),
    "number of features read": (
        lambda: Step(lambda s, x, r, m: s.norm(s.conv(x)) + s.norm.num_features + s.norm.eps),
        "no fold",
    ),
    "called with keywords": (lambda: Step(lambda s, x, r, m: s.norm(input=s.conv(input=x))), "fold"),
    "norm's output changed in place": (lambda: Step(lambda s, x, r, m: s.norm(s.conv(x)).relu_().add_(1)), "fold"),
    "input changed in place": (lambda: Step(_input_changed), "fold"),
    "counts its calls": (steps(_counts, count=_counter), "fold"),
    "keeps a graph tensor": (
        steps(_keeps_a_graph_tensor, shift=lambda: nn.Parameter(torch.ones(1)), cache=dict),
        "fold",
    ),
    "shape read": (lambda: Step(_shapes), "fold"),
    "optional reader": (lambda: Step(_raw), "no fold"),
    "reader with a mask": (lambda: Step(_mask), "no fold"),
    "reader with both": (lambda: Step(_raw_and_mask), "no fold"),
    "left out where asked": (lambda: Step(_not_raw), "no fold"),
    "called where asked only": (steps(_only_raw, conv2=conv, norm2=lambda: nn.BatchNorm2d(C)), "any"),
    "reader in training": (lambda: Step(_training), "no fold"),
    "activation between": (between(F.relu), "no fold"),
    "addition between": (between(lambda y: y + 1), "no fold"),
    "pool between": (between(lambda y: F.avg_pool2d(y, 3, 1, 1)), "no fold"),
    "padding between": (between(lambda y: F.pad(y[:, :, 1:], (0, 0, 1, 0))), "no fold"),
    "channels flipped": (between(lambda y: y.flip(1)), "no fold"),
    "channels rolled": (between(lambda y: y.roll(1, 1)), "no fold"),
    "channels indexed": (between(lambda y: y[:, [1, 0, 3, 2, 5, 4]]), "no fold"),
    "channels shuffled": (between(lambda y: F.channel_shuffle(y, 2)), "no fold"),
    "width flipped": (between(lambda y: y.flip(-1)), "any"),
    "upsampled": (between(lambda y: F.interpolate(y, scale_factor=2)[:, :, ::2, ::2]), "any"),
    "masked between": (between(lambda y: y * (torch.arange(y.shape[-1]) > 2)), "no fold"),
    "rounded between": (between(lambda y: y.float().double()), "no fold"),
    "clone between": (between(lambda y: y.clone()), "any"),
    "same type between": (between(lambda y: y.to(torch.float64)), "fold"),
    "concatenated before": (
        steps(lambda s, x, r, m: s.norm(torch.cat([s.conv(x), x], 1)[:, 3:9]), other=conv),
        "no fold",
    ),
    "added before": (steps(lambda s, x, r, m: s.norm(s.conv(x) + s.other(x)), other=conv), "no fold"),
    "norm first": (lambda: Step(lambda s, x, r, m: s.conv(s.norm(x))), "no fold"),
    "norm behind a norm": (
        steps(lambda s, x, r, m: s.norm2(s.norm(s.conv(x))), norm2=lambda: nn.BatchNorm2d(C)),
        "any",
    ),
    "norm never called": (steps(lambda s, x, r, m: s.norm(s.conv(x)), norm2=lambda: nn.BatchNorm2d(C)), "any"),
    "norm for each half": (
        lambda: Halves(),
        "no fold",
    ),
    "checkpointed": (
        lambda: Step(lambda s, x, r, m: checkpoint(lambda x: s.norm(s.conv(x)), x, use_reentrant=False)),
        "fold",
    ),
    "chunks between": (lambda: Step(_chunks), "no fold"),
    "dropout between": (between(lambda y: F.dropout(y, 0.5, training=False)), "fold"),
    "contiguous between": (between(lambda y: y.contiguous(memory_format=torch.channels_last)), "fold"),
    "there and back": (between(lambda y: y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)), "fold"),
    "swapped there and back": (between(lambda y: y.swapaxes(1, 3).swapaxes(1, 3)), "fold"),
    "height and width swapped": (between(lambda y: y.mT.mT), "fold"),
    "flattened and back": (between(lambda y: y.flatten(2).unflatten(2, y.shape[2:])), "fold"),
    "channels regrouped": (
        between(lambda y: y.view(len(y), C // 2, 2, -1).transpose(1, 2).reshape(y.shape)),
        "no fold",
    ),
    "batch and channels merged": (between(lambda y: y.reshape(-1, *y.shape[2:]).view(y.shape)), "any"),
    "unsqueezed": (between(lambda y: y.unsqueeze(0).squeeze(0)), "fold"),
    "transposed with keywords": (between(lambda y: y.transpose(dim0=2, dim1=3).transpose(dim0=2, dim1=3)), "fold"),
    "moved there and back": (between(lambda y: torch.movedim(y, (1, 2), (3, 1)).movedim((3, 1), (1, 2))), "fold"),
    "channels last by name": (between(lambda y: y.to(memory_format=torch.channels_last)), "fold"),
    "einops' chain": (
        between(lambda y: y.permute(0, 2, 3, 1).reshape(-1, C).view(len(y), *y.shape[2:], C).permute(0, 3, 1, 2)),
        "fold",
    ),
    "split and put together": (
        between(lambda y: y.unflatten(1, (2, C // 2)).flatten(1, 2)),
        "any",
    ),
    "image as a signal": (lambda: OtherRank(nn.BatchNorm1d(C), lambda y: y.flatten(2)), "fold"),
    "image as a volume": (lambda: OtherRank(nn.BatchNorm3d(C), lambda y: y.unsqueeze(2)), "fold"),
    "image as rows": (
        lambda: OtherRank(nn.BatchNorm1d(C), lambda y: y.permute(0, 2, 3, 1).reshape(-1, C)),
        "fold",
    ),
    "pooled, flatten": (lambda: Pooled(lambda y: y.flatten(1)), "fold"),
    "pooled, squeeze": (lambda: Pooled(lambda y: y.squeeze(-1).squeeze(-1)), "fold"),
    "pooled, squeeze all": (lambda: Pooled(lambda y: y.squeeze()), "fold"),
    "pooled, view": (lambda: Pooled(lambda y: y.view(-1, C)), "fold"),
    "pooled, indexed": (lambda: Pooled(lambda y: y[:, :, 0, 0]), "any"),
    "linear, channels last": (ChannelsLast, "fold"),
    "conv for itself and again": (lambda: Step(_twice_apart), "no fold"),
    "conv again without grad": (lambda: Step(_again_without_grad), "no fold"),
    "both called twice": (
        lambda: Step(lambda s, x, r, m: s.norm(s.conv(x)) - 0.5 * s.norm(s.conv(x.flip(-1)))),
        "fold",
    ),
    "norm twice on one": (lambda: Step(lambda s, x, r, m: s.norm(y := s.conv(x)) * s.norm(y)), "any"),
    "norm under two names": (
        altered(lambda s: setattr(s, "again", s.norm), lambda s, x, r, m: s.again(s.conv(x))),
        "fold",
    ),
    "conv under two names": (
        altered(lambda s: setattr(s, "again", s.conv), lambda s, x, r, m: s.norm(s.again(x))),
        "fold",
    ),
    "image by image": (lambda: Step(_image_by_image), "fold"),
    "one norm for two convolutions": (altered(lambda s: setattr(s, "other", conv()), _one_norm_for_two), "no fold"),
    "two norms for one convolution": (
        altered(lambda s: setattr(s, "norm2", nn.BatchNorm2d(C)), _one_conv_for_two),
        "no fold",
    ),
    "twice through both": (lambda: Step(lambda s, x, r, m: s.norm(s.conv(s.norm(s.conv(x))))), "fold"),
    "patched forward": (altered(_patched), "no fold"),
    "patched norm": (altered(_patched_norm), "no fold"),
    "hook that clamps": (altered(_hook_that_clamps), "no fold"),
    "hook before the norm": (altered(_pre_hook_on_the_norm), "no fold"),
    "hook behind the norm": (altered(_hook_on_the_norm), "no fold"),
    "hook before the convolution": (altered(_pre_hook_on_the_conv), "any"),
    "hook that reads": (altered(_hook_that_reads), "any"),
    "hooks that count": (altered(_hooks_that_count), "any"),
    "hook that keeps": (altered(_hook_that_keeps, lambda s, x, r, m: s.norm(s.conv(x)) + s.kept["y"]), "error"),
    "backward hook": (altered(_backward_hook), "any"),
    "called through a closure": (altered(_closed_over, lambda s, x, r, m: s.norm(s.call(x))), "no fold"),
    "called through a partial": (altered(_in_a_partial, lambda s, x, r, m: s.norm(s.call(x))), "any"),
    "norm's method kept": (altered(_in_a_partial, lambda s, x, r, m: s.normed(s.conv(x))), "no fold"),
    "conv's method kept": (altered(_bound, lambda s, x, r, m: s.norm(s.call(x))), "any"),
    "tied weights": (altered(_tied, lambda s, x, r, m: s.norm(s.conv(x)) + s.other(x)), "no fold"),
    "tied storage": (altered(_tied_storage, lambda s, x, r, m: s.norm(s.conv(x)) + s.other(x)), "no fold"),
    "reached through a list": (altered(_listed, lambda s, x, r, m: s.listed[1](s.listed[0](x))), "no fold"),
    "numbers read": (lambda: Step(_border), "no fold"),
    "functional call of its numbers": (lambda: Step(_functional), "no fold"),
    "called past hooks": (lambda: Step(lambda s, x, r, m: s.norm.forward(s.conv.forward(x))), "any"),
    "value looked at": (lambda: Step(_branches), "fold"),
    "tokens, transpose": (tokens(lambda y: y.transpose(1, 2), lambda z, t: z.transpose(1, 2)), "fold"),
    "tokens, permute": (tokens(lambda y: y.permute(0, 2, 1), lambda z, t: z.permute((0, 2, 1))), "fold"),
    "tokens, permute(dims=)": (tokens(lambda y: y.permute(dims=(0, 2, 1)), lambda z, t: z.mT), "fold"),
    "tokens, torch.permute": (tokens(lambda y: torch.permute(y, (0, 2, 1)), lambda z, t: z.mT), "fold"),
    "tokens, movedim": (tokens(lambda y: y.movedim(-1, 1), lambda z, t: z.movedim(1, -1)), "fold"),
    "tokens, swapaxes": (tokens(lambda y: y.swapaxes(1, 2), lambda z, t: torch.swapaxes(z, 1, 2)), "fold"),
    "tokens, mT": (tokens(lambda y: y.mT, lambda z, t: z.mT), "fold"),
    "tokens, flatten": (tokens(lambda y: y.flatten(0, 1), lambda z, t: z.view(t.shape)), "fold"),
    "tokens, view": (tokens(lambda y: y.view(-1, C), lambda z, t: z.view(t.shape)), "fold"),
    "tokens, reshape": (tokens(lambda y: y.reshape(-1, C), lambda z, t: z.reshape_as(t)), "fold"),
    "tokens, misread": (
        tokens(lambda y: y.reshape(len(y), C, -1), lambda z, t: z.reshape(t.shape)),
        "no fold",
    ),
    "tokens, permute by name": (tokens(lambda y: torch.permute(input=y, dims=(0, 2, 1)), lambda z, t: z.mT), "fold"),
    "tokens, permute with negatives": (
        tokens(lambda y: y.permute(0, -1, -2), lambda z, t: z.permute([0, 2, 1])),
        "fold",
    ),
    "tokens, transpose by name": (tokens(lambda y: y.transpose(dim0=-1, dim1=-2), lambda z, t: z.mT), "fold"),
    "tokens, moveaxis": (tokens(lambda y: torch.moveaxis(y, (2,), (1,)), lambda z, t: z.moveaxis(1, 2)), "fold"),
    "tokens, adjoint": (tokens(lambda y: y.adjoint(), lambda z, t: z.adjoint()), "fold"),
    "tokens, einsum": (tokens(lambda y: torch.einsum("ntc->nct", y), lambda z, t: z.mT), "fold"),
    "tokens, contiguous": (tokens(lambda y: y.transpose(1, 2).contiguous(), lambda z, t: z.mT), "fold"),
    "tokens, subclass": (tokens(lambda y: y.mT, lambda z, t: z.mT, PlainLinear), "fold"),
    "tokens, own forward": (tokens(lambda y: y.mT, lambda z, t: z.mT, OwnForwardLinear), "fold"),
    "tokens, matmul": (tokens(lambda y: y.mT, lambda z, t: z.mT, MatmulLinear), "fold"),
    "tokens, relu inside": (tokens(lambda y: y.mT, lambda z, t: z.mT, ReluLinear), "no fold"),
    "square tokens, moved": (lambda: SquareTokens(lambda y: y.mT, lambda z, t: z.mT), "fold"),
    "square tokens, not moved": (lambda: SquareTokens(lambda y: y, lambda z, t: z), "no fold"),
    "square tokens, rows": (lambda: SquareTokens(lambda y: y.reshape(-1, C), lambda z, t: z.view(t.shape)), "fold"),
}


LAYOUT = {"changed through a view", "read by as_strided"}
"""Steps that compute something else where their input lies in memory in another way; a norm that is gone lays out
nothing."""

FAULTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "called with keywords": ("a lost fold: what takes the norm's place has no argument named input", ("fold",)),
}
"""Kinds that the core gets wrong: how, and for which targets. Not drawn; an entry goes when its test passes."""

OPTIONAL = ("optional reader", "reader with a mask", "left out where asked")
"""Kinds that depend on an optional argument, which ``PassesOn`` does not name: the core does not know of it as yet."""


class Follow(nn.Module):
    """The steps one after the other."""

    def __init__(self, steps: list[nn.Module]):
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def body(self, x: Tensor, raw: bool = False, mask: Tensor | None = None) -> Tensor:
        for step in self.steps:
            x = step(x, raw=raw, mask=mask)
        return x

    def forward(self, x: Tensor, raw: bool = False, mask: Tensor | None = None) -> Any:
        return self.body(x, raw, mask)


class Residual(Follow):
    def forward(self, x: Tensor, raw: bool = False, mask: Tensor | None = None) -> Tensor:
        for step in self.steps:
            x = x + step(x, raw=raw, mask=mask)
        return x


class LooksAtValues(Follow):
    def forward(self, x: Tensor, raw: bool = False, mask: Tensor | None = None) -> Tensor:
        if float(x.mean()) > 1e6:
            raise ValueError
        return self.body(torch.stack([image * 1 for image in x]), raw, mask)


class TakesADict(Follow):
    def forward(self, x: dict[str, Tensor], raw: bool = False, mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"out": self.body(x["image"], raw, mask), "also": x["image"].mean()}


@dataclass
class Output:
    out: Tensor
    names: tuple[str, ...] = ("a",)


class GivesAnObject(Follow):
    def forward(self, x: Tensor, raw: bool = False, mask: Tensor | None = None) -> Output:
        try:
            return Output(self.body(x, raw, mask))
        except ZeroDivisionError:
            raise ValueError from None


class Nested(nn.Module):
    def __init__(self, steps: list[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleDict({"trunk": nn.Sequential(), "body": Follow(steps)})

    def forward(self, x: Tensor, *, raw: bool = False, mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        y = self.parts["body"](self.parts["trunk"](x), raw=raw, mask=mask)
        return y, [y.mean(1)]


class Twice(Follow):
    """A siamese network: every layer is called twice."""

    def forward(self, x: Tensor, raw: bool = False, mask: Tensor | None = None) -> Tensor:
        return self.body(x, raw, mask) - 0.5 * self.body(x.flip(-1), raw, mask)


class Meddles(Follow):
    """A root that calls a layer inside its child itself."""

    def forward(self, x: Tensor, raw: bool = False, mask: Tensor | None = None) -> Tensor:
        inner = getattr(self.steps[0], "conv", None)
        extra = inner(x).mean() if isinstance(inner, nn.Conv2d) else 0.0
        return self.body(x, raw, mask) + extra


class ReadsNumbers(Follow):
    """A root that reads the numbers of a norm inside its child."""

    def forward(self, x: Tensor, raw: bool = False, mask: Tensor | None = None) -> Tensor:
        norm = next((m for m in self.steps[0].modules() if isinstance(m, nn.BatchNorm2d)), None)
        extra = 0.0 if norm is None or norm.running_mean is None else norm.running_mean.sum()
        return self.body(x, raw, mask) + extra


class TakesAList(Follow):
    def forward(self, images: list[Tensor], raw: bool = False, mask: Tensor | None = None) -> list[Tensor]:
        return list(self.body(torch.stack(images), raw, mask))


class TakesKeywords(Follow):
    def forward(self, *, image: Tensor, raw: bool = False, mask: Tensor | None = None) -> Tensor:
        return self.body(image, raw, mask)


class TakesTwo(Follow):
    def forward(
        self, left: Tensor, right: Tensor, scale: float = 1.0, raw: bool = False, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.body(left, raw, mask), scale * self.body(right, raw, mask)


class Branches(Follow):
    """Each step sees the input; their outputs are put side by side."""

    def forward(self, x: Tensor, raw: bool = False, mask: Tensor | None = None) -> Tensor:
        return torch.cat([step(x, raw=raw, mask=mask) for step in self.steps], 1)


class InTraining(Follow):
    """Gives what lies between the steps, too, in training mode."""

    def forward(self, x: Tensor, raw: bool = False, mask: Tensor | None = None) -> Any:
        made = []
        for step in self.steps:
            x = step(x, raw=raw, mask=mask)
            made.append(x)
        return made if self.training else x


class Repeats(Follow):
    """The first step comes again at the end, under another name."""

    def __init__(self, steps: list[nn.Module]):
        super().__init__(steps)
        self.last = self.steps[0]

    def forward(self, x: Tensor, raw: bool = False, mask: Tensor | None = None) -> Tensor:
        return self.last(self.body(x, raw, mask), raw=raw, mask=mask)


class PastItsForward(nn.Module):
    """Calls a method of its child that is not ``forward``."""

    def __init__(self, steps: list[nn.Module]):
        super().__init__()
        self.child = LooksAtValues(steps)

    def forward(self, x: Tensor, raw: bool = False, mask: Tensor | None = None) -> Tensor:
        return self.child.body(x, raw, mask) - 0.5 * self.child.forward(x.flip(-1), raw=raw)


class PassesOn(nn.Module):
    """A wrapper that does not say what it takes."""

    def __init__(self, steps: list[nn.Module]):
        super().__init__()
        self.module = Follow(steps)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


PARENTS: dict[str, type[nn.Module]] = {
    cls.__name__: cls
    for cls in (
        *(Follow, Residual, Branches, LooksAtValues, TakesADict, TakesAList, TakesKeywords, TakesTwo, GivesAnObject),
        *(Nested, Twice, Repeats, InTraining, PastItsForward, PassesOn, Meddles, ReadsNumbers),
    )
}

SPOILERS = ("Meddles", "ReadsNumbers")
"""Parents that read something of their first step, which may cost its fold."""


@dataclass(frozen=True)
class Description:
    """A network in words."""

    parent: str
    steps: tuple[str, ...]
    seed: int = 0
    training: Literal["nowhere", "somewhere", "everywhere"] = "nowhere"

    def build(self) -> nn.Module:
        """In float64, with statistics and affines far from trivial, and ``training`` flags as asked."""
        torch.manual_seed(self.seed)
        torch.set_default_dtype(torch.float64)  # from the start: .double() would untie what shares its memory
        try:
            model = PARENTS[self.parent]([KINDS[step][0]() for step in self.steps])
        finally:
            torch.set_default_dtype(torch.float32)
        generator = torch.Generator().manual_seed(self.seed)

        def numbers(like: Tensor, low: float, high: float) -> Tensor:
            return torch.rand(like.shape, generator=generator, dtype=torch.float64) * (high - low) + low

        with torch.no_grad():
            for norm in batch_norms(model):
                own = {**norm._parameters, **norm._buffers}
                if own["running_mean"] is not None:
                    own["running_mean"].copy_(numbers(own["running_mean"], -1, 1))
                    own["running_var"].copy_(numbers(own["running_var"], *getattr(norm, "variances", (0.2, 2))))
                for names, low in ((("weight", "gamma"), 0.4), (("bias", "beta"), -0.5)):
                    for name in names:
                        if own.get(name) is not None:
                            own[name].copy_(numbers(own[name], low, low + 1))
                            if low > 0:
                                own[name][::2] *= -1
        model.train(self.training == "everywhere")
        if self.training == "somewhere":
            flags = random.Random(self.seed)
            for module in model.modules():
                module.training = flags.random() < 0.5
        return model

    def example(self, batch: int = 2, seed: int = 1) -> Any:
        """What ``example_inputs`` may be: a tensor, a tuple, a list, keyword arguments, or a tuple and such."""
        generator = torch.Generator().manual_seed(seed)
        image, other = torch.randn(2, batch, C, 5, 7, generator=generator, dtype=torch.float64)
        forms = {
            "TakesADict": ({"image": image},),
            "TakesAList": list(image),
            "TakesKeywords": {"image": image},
            "TakesTwo": ((image, other), {"scale": 0.5}),
        }
        return forms.get(self.parent, image)

    def call(self, model: nn.Module, batch: int = 2, seed: int = 1, **kwargs: Any) -> Any:
        """The network's output for its example."""
        example = self.example(batch, seed)
        if self.parent == "TakesTwo":
            example, kwargs = example[0], {**example[1], **kwargs}
        if isinstance(example, dict):
            return model(**example, **kwargs)
        return model(*example, **kwargs) if isinstance(example, tuple) else model(example, **kwargs)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The batch norms, and whatever else holds running statistics, found without the code under test."""
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "running_mean", None), Tensor) or isinstance(module, nn.BatchNorm2d)
    ]


def step_of(name: str) -> int:
    """The number of the step that a module belongs to, by its path."""
    parts = name.split(".")
    return int(parts[parts.index("steps") + 1])


def some(names: list[str]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(names), min_size=1, max_size=4).map(tuple)


def networks(steps: st.SearchStrategy[tuple[str, ...]], parents: list[str]) -> st.SearchStrategy[Description]:
    return st.builds(
        Description,
        parent=st.sampled_from(parents),
        steps=steps,
        seed=st.integers(0, 999),
        training=st.sampled_from(["nowhere", "somewhere", "everywhere"]),
    )


DRAWN = [kind for kind in KINDS if kind not in FAULTS]

descriptions = networks(some(DRAWN), list(PARENTS)).filter(
    lambda description: description.parent != "PassesOn" or not set(OPTIONAL) & set(description.steps)
)

PLAIN = [kind for kind in DRAWN if KINDS[kind][1] == "fold"]

plain_descriptions = networks(some(PLAIN), [parent for parent in PARENTS if parent not in SPOILERS])
