"""How much of the function is left with the norms that were asked for: the original against the converted network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normsurgeon.agreement import compare_logits
from normsurgeon.graph.following import Followed, filled
from normsurgeon.graph.inputs import Call
from normsurgeon.graph.skeleton import shadow_of, tensors_in
from normsurgeon.norms.layers import per_channel
from normsurgeon.surgery.probing import synthetic_images
from normsurgeon.surgery.whitening import Affine

IMAGES, SIDE = 32, 64
"""Size of the synthetic input: two such passes cost as much as one of 64 small images."""


@dataclass(frozen=True)
class Verdict:
    """What is left of the function after a conversion.

    images       that both networks saw; ``source`` says which they were
    error        of the outputs, relative to the original's: the root of the summed squares of the difference over that
                 of the original's deviations from its mean over the images
    agreement    for a classifier, the share of images to which both give the same answer, with its standard error
    kl           for a classifier, the mean KL divergence from the original's answers, in nats
    worst_site   the norm whose own output is furthest from the fixed affine that it stands in for, and by how much,
                 relative to that output's deviations; None where no norm approximates
    """

    images: int
    source: str
    error: float
    agreement: float | None = None
    agreement_stderr: float | None = None
    kl: float | None = None
    worst_site: str | None = None
    worst_error: float | None = None

    @property
    def kept(self) -> str:
        """In one word: exactly, closely, largely, partly, hardly."""
        share = self.agreement if self.agreement is not None else 1 - self.error
        if self.error < 1e-3:
            return "exactly"
        for word, least in (("closely", 0.9), ("largely", 0.7), ("partly", 0.3)):
            if share >= least:
                return word
        return "hardly"

    @property
    def advice(self) -> str:
        """What to do next, in words."""
        return {
            "exactly": "nothing is lost: use it as it is",
            "closely": "use it as it is; --calibrate DATA (unlabelled images) wins back a little more",
            "largely": "next: --calibrate DATA (unlabelled images)",
            "partly": "next: --calibrate DATA and --reconstruct DATA (unlabelled images), or try --to ln or rms",
            "hardly": "of no use before it is trained: try --to ln or rms, or finetune",
        }[self.kept]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        numbers = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}
        return {**numbers, "kept": self.kept, "advice": self.advice}

    def __str__(self) -> str:
        parts = [f"function {self.kept} kept on {self.images} {self.source}: output error {_share(self.error)}"]
        if self.agreement is not None:
            parts.append(f"same answer {100 * self.agreement:.0f} % ± {100 * (self.agreement_stderr or 0):.0f}")
            parts.append(
                f"KL {self.kl:.3g} nats" if self.kl is not None and math.isfinite(self.kl) else "KL not finite"
            )
        if self.worst_site is not None and self.kept != "exactly":
            parts.append(f"most is lost at {self.worst_site} ({_share(self.worst_error or 0)})")
        return f"{', '.join(parts)}; {self.advice}"


def _share(error: float) -> str:
    if not math.isfinite(error):
        return "not finite"
    return f"{100 * error:.0f} %" if error >= 0.01 else f"{error:.0e}"


@dataclass(frozen=True)
class Reference:
    """The original's outputs, kept for the comparison: it may be gone by then."""

    call: Call
    source: str
    outputs: tuple[Tensor, ...]


def reference(model: nn.Module, followed: Followed, probe: Call | None) -> Reference | None:
    """The original's outputs on ``probe``, synthetic images, or its owner's example; None where it does not run."""
    for call, source in _inputs(model, followed, probe):
        try:
            return Reference(call, source, _outputs(model, call))
        except Exception:  # a foreign forward may refuse an input in any way
            if probe is not None:
                raise
    return None


def judge(before: Reference, model: nn.Module, fixed: Mapping[str, Affine]) -> Verdict:
    """Compare the converted ``model`` with the original; its new norms stand in for the ``fixed`` maps."""
    losses: dict[str, float] = {}
    outputs = _outputs(model, before.call, lambda shadow: _measuring(shadow, fixed, losses))
    worst = max(losses, key=losses.__getitem__, default=None)
    agreement, stderr, kl = _as_classifiers(before.outputs, outputs)
    return Verdict(
        images=_samples(before.call),
        source=before.source,
        error=_error(before.outputs, outputs),
        agreement=agreement,
        agreement_stderr=stderr,
        kl=kl,
        worst_site=worst,
        worst_error=losses[worst] if worst is not None else None,
    )


def _inputs(model: nn.Module, followed: Followed, probe: Call | None) -> Iterator[tuple[Call, str]]:
    if probe is not None:
        yield probe, "images"
        return
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    shape = followed.call.shape if followed.call is not None else None
    if followed.call is not None and shape is not None and len(shape) == 4:
        full = (shape[2], shape[3])
        fewer = max(4, IMAGES * SIDE * SIDE // (full[0] * full[1]))
        for count, size in ((IMAGES, (min(SIDE, full[0]), min(SIDE, full[1]))), (fewer, full)):
            images = synthetic_images(count, shape[1], size)
            yield followed.call.map(lambda t, images=images: images.to(device, t.dtype)), "synthetic images"
    if followed.example is not None:
        yield followed.example.map(lambda t: filled(t, device)), "example inputs"
    elif followed.call is not None:
        if shape is not None and len(shape) > 1:
            yield followed.call.map(lambda t: filled(t.new_empty((IMAGES, *shape[1:])), device)), "random inputs"
        yield followed.call.map(lambda t: filled(t, device)), "random inputs"


@torch.no_grad()
def _outputs(model: nn.Module, call: Call, around: Callable[[nn.Module], Any] | None = None) -> tuple[Tensor, ...]:
    shadow = shadow_of(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        call = call.map(lambda t: t.to(device, copy=True))
        if around is None:
            output = call(shadow)
        else:
            with around(shadow):
                output = call(shadow)
    return tuple(t.detach() for t in tensors_in(output) if t.numel() and t.is_floating_point())


@contextmanager
def _measuring(shadow: nn.Module, fixed: Mapping[str, Affine], losses: dict[str, float]) -> Iterator[None]:
    """At each new norm, how far its output is from that of the fixed affine map on the same input."""

    def measuring(name: str, affine: Affine) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            x = inputs[0].detach()
            scale, shift = (per_channel(v.to(x.device, x.dtype), x) for v in (affine.scale, affine.shift))
            wanted = x * scale + shift
            for part in (getattr(module, "drop", None), getattr(module, "act", None)):
                wanted = part(wanted) if isinstance(part, nn.Module) else wanted
            losses[name] = max(losses.get(name, 0.0), _error((wanted,), (output,)))

        return hook

    modules = dict(shadow.named_modules())
    handles = [modules[name].register_forward_hook(measuring(name, affine)) for name, affine in fixed.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _error(before: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> float:
    if [t.shape for t in before] != [t.shape for t in after]:
        return math.inf  # a detector that finds other boxes
    squares = whole = 0.0
    for a, b in zip(before, after, strict=True):
        a, b = a.double(), b.double()
        spread = (a - a.mean(0, keepdim=True)).square().sum() if a.ndim and len(a) > 1 else a.square().sum()
        squares += float((a - b).square().sum())
        whole += float(spread)
    return math.sqrt(squares / max(whole, 1e-30)) if math.isfinite(squares + whole) else math.inf


def _as_classifiers(
    before: tuple[Tensor, ...], after: tuple[Tensor, ...]
) -> tuple[float | None, float | None, float | None]:
    """Agreement, its standard error and KL, where the first output is (images, classes)."""
    if not before or not after or before[0].ndim != 2 or before[0].shape != after[0].shape or before[0].shape[1] < 2:
        return None, None, None
    images = len(before[0])
    same, kl = compare_logits(after[0].double().cpu(), before[0].double().cpu())
    share = same / images
    return share, math.sqrt(share * (1 - share) / images), max(kl / images, 0.0) if math.isfinite(kl) else kl


def _samples(call: Call) -> int:
    first = next(tensors_in([call.args, dict(call.kwargs)]), None)
    return len(first) if first is not None and first.ndim else 0
