"""How much of the function is left with the norms that were asked for.

Two measures. On the owner's own images: the converted network's outputs against the original's. Without any, images are
made up, and answers to them say little: they show nothing, and their features are not those that the running statistics
describe. So there the norms are judged one by one, each on features that are brought to the moments which its running
statistics promise, against the fixed affine map that it stands in for. On EfficientNet-Lite0 that error is within a
quarter of the one on photographs (docs/decisions.md 12).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normsurgeon._util.one_line import one_line
from normsurgeon.calls import Call
from normsurgeon.errors import UsageError
from normsurgeon.graph.following import Followed
from normsurgeon.graph.skeleton import seeded, shadow_of, tensors_in
from normsurgeon.norms.affine import Affine, Moments
from normsurgeon.surgery.agreement import Agreement
from normsurgeon.surgery.probing import synthetic_calls

NORM_IMAGES, OUTPUT_IMAGES = 32, 16
"""Size of the synthetic input, for the norms and for the outputs: together they cost one pass of 64 small images."""

CHUNK = 2**17
"""Values that are compared at a time: 1 MiB in float64. Activations are what a verdict's memory goes to."""

CLOSE, PART = 0.11, 0.2
"""Up to which error of its norms a network is closely, and up to which it is partly what it was."""


@dataclass(frozen=True)
class StandIn:
    """What one new norm stands in for: the affine map ``fixed`` of its input, which has these ``moments``."""

    fixed: Affine
    moments: Moments


@dataclass(frozen=True)
class Verdict:
    """What is left of the function after a conversion.

    images       that both networks saw; ``source`` says which they were
    synthetic    whether they were made up
    norm_error   root mean square over the sites of how far each new norm is from the fixed affine map that it stands in
                 for, relative to that map's deviations; a site that stays or becomes exact counts as 0, so that a plan
                 with few new norms is not judged as if all were
    worst_site   the norm that is furthest from it, and by how much
    error        of the outputs, relative to the original's: the root of the summed squares of the difference over that
                 of the original's deviations from its mean over the images
    agreement    for a classifier, the share of images to which both give the same answer, with its standard error
    kl           for a classifier, the mean KL divergence from the original's answers, in nats
    problem      why the converted network could not be run, or None
    """

    images: int
    source: str
    synthetic: bool
    norm_error: float
    error: float
    worst_site: str | None = None
    worst_error: float | None = None
    agreement: float | None = None
    agreement_stderr: float | None = None
    kl: float | None = None
    problem: str | None = None

    @property
    def kept(self) -> str:
        """In one word: exactly, closely, partly, hardly, not."""
        if self.problem is not None:
            return "not"
        if self.error < 1e-3:
            return "exactly"
        if self.synthetic and self.worst_site is not None:
            loss = self.norm_error
            return "closely" if loss <= CLOSE else "partly" if loss <= PART else "hardly"
        share = self.agreement if self.agreement is not None else 1 - self.error
        return "closely" if share >= 0.85 else "partly" if share >= 0.4 else "hardly"

    @property
    def advice(self) -> str:
        """What to do next, in words."""
        return {
            "exactly": "nothing is lost: use it as it is",
            "closely": "use it as it is; --calibrate DATA (unlabelled images) wins back a little more",
            "partly": "next: --calibrate DATA (unlabelled images); of all norms, ln and rms lose least",
            "hardly": "of no use before it is trained; next: finetune; of all norms, ln and rms lose least",
            "not": "next: another norm, or keep the one before it (--keep); where it is a view, reshape does",
        }[self.kept]

    @property
    def gist(self) -> str:
        """In a few words: "closely kept, norms off by 8 %"."""
        return f"{self.kept} kept" + (f", norms off by {_share(self.norm_error)}" if self.worst_site else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        numbers = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}
        return {**numbers, "kept": self.kept, "advice": self.advice}

    def __str__(self) -> str:
        if self.problem is not None:
            return f"the converted network does not run ({self.problem}); {self.advice}"
        parts = [f"function {self.kept} kept on {self.images} {self.source}"]
        if self.worst_site is not None:
            parts.append(
                f"norms off by {_share(self.norm_error)}, most at {self.worst_site} ({_share(self.worst_error or 0)})"
            )
        if not self.synthetic or self.worst_site is None:
            parts.append(f"outputs off by {_share(self.error)}")
            if self.agreement is not None:
                answers = f"same answer {100 * self.agreement:.0f} % ± {100 * (self.agreement_stderr or 0):.0f}"
                parts += [answers, "KL " + ("not finite" if not math.isfinite(self.kl or 0) else f"{self.kl:.2g} nats")]
        text = f"{', '.join(parts)}; {self.advice}"
        return text if self.kept == "exactly" or not self.synthetic else f"{text}; --probe DATA measures it on yours"


def _share(error: float) -> str:
    if not math.isfinite(error):
        return "more than can be counted"
    return f"{100 * error:.0f} %" if error >= 0.01 or not error else f"{error:.0e}"


@dataclass(frozen=True)
class Reference:
    """The original's outputs, kept for the comparison: it may be gone by then."""

    call: Call
    source: str
    synthetic: bool
    outputs: tuple[Tensor, ...]


def reference(model: nn.Module, followed: Followed, probe: Call | None) -> Reference | None:
    """The original's outputs on ``probe``, its owner's example, or what is made up; None where it does not run.

    :raises UsageError: a probe that the model cannot be called with.
    """
    if probe is not None:
        try:
            return Reference(probe, "images", False, _outputs(model, probe))
        except Exception as error:  # as below
            raise UsageError(f"the model cannot be called with probe ({one_line(error)})") from error
    for call, source in synthetic_calls(model, followed, OUTPUT_IMAGES):
        try:
            outputs = _outputs(model, call)
        except Exception:  # a foreign forward may refuse an input in any way
            continue
        return Reference(call, source, True, outputs) if all(t.isfinite().all() for t in outputs) else None
    return None


def judge(
    before: Reference, model: nn.Module, stand_ins: Mapping[str, StandIn], followed: Followed, sites: int
) -> Verdict:
    """Compare the converted ``model`` with the original; of its ``sites``, the ``stand_ins`` are new norms."""
    losses: dict[str, float] = {}
    images = len(before.call)

    def measuring(promised: bool) -> Callable[[nn.Module], Any]:
        return lambda shadow: _measuring(shadow, stand_ins, losses, promised)

    try:
        outputs = _outputs(model, before.call, None if before.synthetic else measuring(promised=False))
    except Exception as error:  # of a foreign forward; the original took this very input
        return Verdict(images, before.source, before.synthetic, math.inf, math.inf, problem=one_line(error))
    if before.synthetic and stand_ins:
        for call, _ in synthetic_calls(model, followed, NORM_IMAGES):
            try:
                _outputs(model, call, measuring(promised=True))
            except Exception:  # as in reference(): the next size may do
                continue
            images = len(call)
            break
    worst = max(losses, key=losses.__getitem__, default=None)
    seen = sites - len(stand_ins) + len(losses)  # what no call reached is not known
    agreement, stderr, kl = _as_classifiers(before.outputs, outputs)
    return Verdict(
        images=images,
        source=before.source,
        synthetic=before.synthetic,
        norm_error=math.sqrt(sum(loss**2 for loss in losses.values()) / max(1, seen)),
        error=_error(before.outputs, outputs),
        worst_site=worst,
        worst_error=losses[worst] if worst is not None else None,
        agreement=agreement,
        agreement_stderr=stderr,
        kl=kl,
    )


@torch.no_grad()
def _outputs(model: nn.Module, call: Call, around: Callable[[nn.Module], Any] | None = None) -> tuple[Tensor, ...]:
    shadow = shadow_of(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with seeded(model):
        call = call.map(lambda t: t.to(device, copy=True))
        if around is None:
            output = call(shadow)
        else:
            with around(shadow):
                output = call(shadow)
    return tuple(t.detach() for t in tensors_in(output) if t.numel() and t.is_floating_point())


@contextmanager
def _measuring(
    shadow: nn.Module, stand_ins: Mapping[str, StandIn], losses: dict[str, float], promised: bool
) -> Iterator[None]:
    """At each new norm, how far its output is from that of the fixed affine map on the same input.

    promised  bring each norm's input to the moments that the running statistics promise
    """

    def measured(name: str, module: nn.Module, stand_in: StandIn) -> Callable[..., Tensor]:
        forward = module.forward

        def run(x: Tensor) -> Tensor:
            x = _with_moments(x, stand_in.moments) if promised else x
            fixed = stand_in.fixed(x)
            for part in (getattr(module, "drop", None), getattr(module, "act", None)):
                fixed = part(fixed) if isinstance(part, nn.Module) else fixed
            output = forward(x.clone())
            losses[name] = max(losses.get(name, 0.0), _error((fixed,), (output,)))
            return output

        return run

    modules = dict(shadow.named_modules())
    for name, stand_in in stand_ins.items():  # the shadow is this function's own: nothing to put back
        modules[name].forward = measured(name, modules[name], stand_in)
    yield


def _with_moments(x: Tensor, moments: Moments) -> Tensor:
    """``x`` with each channel's mean and variance made those given; a channel that does not vary gets the mean."""
    axes = [axis for axis in range(x.ndim) if axis != 1]
    few = max(1, CHUNK * x.shape[1] // x.numel())
    parts = [torch.var_mean(part.double(), axes, correction=0) for part in x.split(few, dim=1)]
    var, mean = (torch.cat(each) for each in zip(*parts, strict=True))
    scale = torch.where(var > 1e-12 * var.mean(), torch.sqrt(moments.var.to(x.device) / var.clamp_min(1e-30)), 0.0)
    return Affine(scale, moments.mean.to(x.device) - scale * mean)(x)


def _error(before: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> float:
    if [t.shape for t in before] != [t.shape for t in after]:
        return math.inf  # a detector that finds other boxes
    squares = whole = 0.0
    for pair in zip(before, after, strict=True):
        count = len(pair[0]) if pair[0].ndim else 1
        a_NF, b_NF = (t.reshape(count, -1) for t in pair)
        few = max(1, CHUNK // count)
        for a, b in zip(a_NF.split(few, dim=1), b_NF.split(few, dim=1), strict=True):
            a, b = a.double(), b.double()
            squares += float((a - b).square().sum())
            whole += float((a - a.mean(0) if count > 1 else a).square().sum())
    return math.sqrt(squares / max(whole, 1e-30)) if math.isfinite(squares + whole) else math.inf


def _as_classifiers(
    before: tuple[Tensor, ...], after: tuple[Tensor, ...]
) -> tuple[float | None, float | None, float | None]:
    """Agreement, its standard error and KL, where the first output is (images, classes)."""
    if not before or not after or before[0].ndim != 2 or before[0].shape != after[0].shape or before[0].shape[1] < 2:
        return None, None, None
    images = len(before[0])
    if len(before[0].argmax(1).unique()) < 2:
        return None, None, None  # an original that says the same of all of them is easily agreed with
    agreement = Agreement()
    agreement.update(after[0], before[0])
    share, kl = agreement.compute()
    assert share is not None
    return share, math.sqrt(share * (1 - share) / images), kl
