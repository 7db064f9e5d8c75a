"""Small networks of every kind of step around a batch norm, and the ways in which parents call them.

A step takes (N, C, H, W) to the same shape and holds at least one batch norm. ``KINDS`` says of each what must become
of its norm: "fold", "no fold" (converted by the affine, or refused), or "any".
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d, Conv2dSame, StdConv2d
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

C = 6


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

    def __init__(self, there: Callable[[Tensor], Tensor], back: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.linear, self.norm, self.there, self.back = nn.Linear(C, C), nn.BatchNorm1d(C), there, back

    def forward(self, x: Tensor, raw: bool = False, mask: Tensor | None = None) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return self.back(self.norm(self.there(self.linear(tokens))), tokens).transpose(1, 2).reshape(x.shape)


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
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(1, 2)


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


def _both(s: Step, x: Tensor, raw: bool, mask: Tensor | None) -> Tensor:
    y = s.conv(x)
    return s.norm(y) + y if raw and mask is not None else s.norm(y)


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

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.linear, self.norm = nn.Linear(C, C, bias=False), norm

    def forward(self, x: Tensor, raw: bool = False, mask: Tensor | None = None) -> Tensor:
        return x * torch.sigmoid(self.norm(self.linear(x.mean((2, 3)))))[:, :, None, None]


def tokens(there: Callable[[Tensor], Tensor], back: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Tokens(there, back)


def _hook_that_clamps(s: Step) -> None:
    s.conv.register_forward_hook(lambda module, inputs, output: output.clamp(min=0))


def _pre_hook_on_the_norm(s: Step) -> None:
    s.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0].clamp(min=0),))


def _hook_on_the_norm(s: Step) -> None:
    s.norm.register_forward_hook(lambda module, inputs, output: output + inputs[0])


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
    "1-D": (lambda: Spatial(1, False), "fold"),
    "1-D transposed": (lambda: Spatial(1, True), "fold"),
    "3-D": (lambda: Spatial(3, False), "fold"),
    "3-D transposed": (lambda: Spatial(3, True), "fold"),
    "vector": (lambda: Vector(nn.BatchNorm1d(C)), "fold"),
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
    "subclass": (plain(lambda: conv(PlainConv)), "fold"),
    "subclass, own forward": (plain(lambda: conv(OwnForward)), "fold"),
    "subclass, weight doubled": (plain(lambda: conv(Gain)), "fold"),
    "subclass, output doubled": (plain(lambda: conv(GainAll)), "no fold"),
    "subclass, relu inside": (plain(lambda: conv(Relu)), "no fold"),
    "subclass, bias unused": (plain(lambda: conv(NoBias)), "no fold"),
    "subclass, offset": (plain(lambda: conv(Offset)), "no fold"),
    "weight standardisation": (plain(lambda: StdConv2d(C, C, 3, padding=1)), "no fold"),
    "weight norm": (plain(lambda: nn.utils.parametrizations.weight_norm(conv())), "no fold"),
    "spectral norm": (plain(lambda: nn.utils.parametrizations.spectral_norm(conv())), "no fold"),
    "old weight norm": (plain(lambda: nn.utils.weight_norm(conv())), "no fold"),
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
    "read by tolist": (second(lambda y: torch.tensor(y.tolist(), dtype=y.dtype)), "no fold"),
    "read by a scripted function": (second(scripted_sum), "no fold"),
    "read by an autograd function": (second(Double.apply), "no fold"),
    "read by indexing": (second(lambda y: y[:, :1]), "no fold"),
    "read by max": (second(lambda y: y.amax((2, 3), keepdim=True)), "no fold"),
    "kept in an attribute": (lambda: Step(_kept), "no fold"),
    "changed in place before": (lambda: Step(_in_place_before), "no fold"),
    "changed in place after": (lambda: Step(_in_place_after), "no fold"),
    "changed through a view": (lambda: Step(_through_a_view), "no fold"),
    "weight read": (altered(lambda s: None, lambda s, x, r, m: s.norm(s.conv(x)) + s.conv.weight.mean()), "no fold"),
    "weight's data read": (
        altered(lambda s: None, lambda s, x, r, m: s.norm(s.conv(x)) + s.conv.weight.data.mean()),
        "no fold",
    ),
    "shape read": (lambda: Step(_shapes), "fold"),
    "optional reader": (lambda: Step(_raw), "no fold"),
    "reader with a mask": (lambda: Step(_mask), "no fold"),
    "reader with both": (lambda: Step(_both), "no fold"),
    "number of features read": (
        lambda: Step(lambda s, x, r, m: s.norm(s.conv(x)) * (s.norm.num_features / C)),
        "no fold",
    ),
    "channels last by name": (between(lambda y: y.to(memory_format=torch.channels_last)), "fold"),
    "scripted function in a scripted module": (
        altered(
            lambda s: setattr(s, "scripted", torch.jit.script(nn.ReLU())),
            lambda s, x, r, m: s.scripted(s.norm(s.conv(x))),
        ),
        "fold",
    ),
    "reader in training": (lambda: Step(_training), "no fold"),
    "activation between": (between(F.relu), "no fold"),
    "addition between": (between(lambda y: y + 1), "no fold"),
    "pool between": (between(lambda y: F.avg_pool2d(y, 3, 1, 1)), "no fold"),
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
    "conv for itself and again": (lambda: Step(_twice_apart), "no fold"),
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
}


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
        return self.body(x, raw, mask) - self.body(x.flip(-1), raw, mask)


class Meddles(Follow):
    """A root that calls a layer inside its child itself."""

    def forward(self, x: Tensor, raw: bool = False, mask: Tensor | None = None) -> Tensor:
        inner = getattr(self.steps[0], "conv", None)
        extra = inner(x).mean() if isinstance(inner, nn.Conv2d) else 0.0
        return self.body(x, raw, mask) + extra


PARENTS: dict[str, type[nn.Module]] = {
    cls.__name__: cls for cls in (Follow, Residual, LooksAtValues, TakesADict, GivesAnObject, Nested, Twice, Meddles)
}


@dataclass(frozen=True)
class Description:
    """A network in words."""

    parent: str
    steps: tuple[str, ...]
    seed: int = 0
    training: bool = False

    def build(self) -> nn.Module:
        """In float64, with statistics and affines far from trivial; in eval mode unless ``training``."""
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
                own["running_mean"].copy_(numbers(own["running_mean"], -1, 1))
                own["running_var"].copy_(numbers(own["running_var"], 0.2, 2))
                for names, low in ((("weight", "gamma"), 0.4), (("bias", "beta"), -0.5)):
                    for name in names:
                        if own.get(name) is not None:
                            own[name].copy_(numbers(own[name], low, low + 1))
                            if low > 0:
                                own[name][::2] *= -1
        return model.train(self.training)

    def example(self, batch: int = 2, seed: int = 1) -> Any:
        """What the network takes."""
        generator = torch.Generator().manual_seed(seed)
        image = torch.randn(batch, C, 5, 7, generator=generator, dtype=torch.float64)
        return ({"image": image},) if self.parent == "TakesADict" else image

    def call(self, model: nn.Module, batch: int = 2, seed: int = 1, **kwargs: Any) -> Any:
        """The network's output for its example."""
        example = self.example(batch, seed)
        return model(*example, **kwargs) if isinstance(example, tuple) else model(example, **kwargs)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The modules that hold running statistics, found without the code under test."""
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "running_mean", None), Tensor) and not isinstance(module, nn.InstanceNorm2d)
    ]


descriptions = st.builds(
    Description,
    parent=st.sampled_from(sorted(PARENTS)),
    steps=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=4).map(tuple),
    seed=st.integers(0, 999),
    training=st.booleans(),
)
