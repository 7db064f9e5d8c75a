"""What a norm's own error predicts of the network's damage, for all sites in one forward and a few backward passes.

Three figures, from cheap to good. The number of elements that share statistics needs no data. The norm's error is how
far it is from the batch norm on the original's features. The Taylor estimate weighs that error by what the outputs
make of it: with d the error at a site, J the Jacobian of the outputs by the site's output,

    KL(p ‖ p') ≈ ½ E_y[(d · ∇ log p(y))²],  y drawn from p      (a classifier; the Fisher information)
    ‖y' - y‖²  ≈ E_u[(u · J d)²],           u normal            (any other network)

to second order in d. Sums over an image's features are taken before the square, so cancelling errors cancel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from normsurgeon.calls import Call, on, outputs_of
from normsurgeon.graph.skeleton import tensors_in
from normsurgeon.inference.run import home_of
from normsurgeon.norms.targets import find_target
from normsurgeon.selection.damage import Answers
from normsurgeon.selection.switching import Option, Switchable

SAMPLES = 4
"""Backward passes a batch."""


def elements_per_pool(option: Option) -> int | None:
    """How many values share a mean and a variance: what fluctuates less the more there are; None if not known."""
    decision = option.decision
    positions = decision.site.positions
    if positions is None:
        return None
    channels = decision.site.channels // (decision.groups or 1)
    return channels * (positions if find_target(decision.target or "").pools == "groups" else 1)


def predict(
    board: Switchable, chosen: Mapping[str, Option], inputs: Tensor | Call, samples: int = SAMPLES, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """For each site that one batch reaches, per image (N,), float64: the norm's squared relative error, and the damage
    that the Taylor estimate gives (in nats, or relative to the outputs' squared deviations).

    chosen  the option to look at, by site; the network itself stays at its batch norms
    """
    inputs = on(inputs, *home_of(board.network))
    images = len(inputs)
    generator = torch.Generator().manual_seed(seed)
    board.reset()
    with torch.enable_grad(), board.watched(chosen) as seen:
        output = outputs_of(board.network, inputs)
        answers = Answers.of(output, images)
        directions = _directions(output, answers, images, samples, generator)
        probes = [probe for site in seen.values() for probe, _, _ in site]
        sums = {name: torch.zeros(images, dtype=torch.float64) for name in seen}
        for number, direction in enumerate(directions):
            more = number + 1 < samples
            gradients = iter(torch.autograd.grad(direction, probes, retain_graph=more, allow_unused=True))
            for name, calls in seen.items():
                along = torch.zeros(images, dtype=torch.float64)
                for (_, error, _), gradient in zip(calls, gradients, strict=False):
                    if gradient is not None:
                        along += (gradient.double() * error.double()).reshape(images, -1).sum(1).cpu()
                sums[name] += along.square()
    scale = 0.5 if answers.classes else 1 / _spread(answers, images)
    found = {}
    for name, calls in seen.items():
        own = torch.stack([size for _, _, size in calls]).mean(0)
        found[name] = (own, scale * sums[name] / samples)
    return found


def _directions(output: Any, answers: Answers, images: int, samples: int, generator: torch.Generator) -> list[Tensor]:
    """Scalars whose gradients are the random directions of the estimate."""
    outputs = [t for t in tensors_in(output) if t.numel() and t.is_floating_point()]
    if answers.classes:
        log_p = F.log_softmax(outputs[0].double(), 1)
        drawn = torch.multinomial(log_p.detach().exp().cpu(), samples, replacement=True, generator=generator)
        return [log_p.gather(1, drawn[:, k : k + 1].to(log_p.device)).sum() for k in range(samples)]
    found = []
    for _ in range(samples):
        parts = [(t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in outputs if t.requires_grad]
        found.append(torch.stack(parts).sum())
    return found


def _spread(answers: Answers, images: int) -> float:
    """The mean over images of the outputs' squared deviation from their mean."""
    whole = 0.0
    for t in answers.outputs:
        t_NF = t.double().reshape(len(t), -1) if t.ndim and len(t) == images else t.double().reshape(1, -1)
        whole += float((t_NF - t_NF.mean(0) if len(t_NF) > 1 else t_NF).square().sum()) / images
    return max(whole, 1e-30)
