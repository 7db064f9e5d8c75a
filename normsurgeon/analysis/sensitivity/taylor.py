"""First-order Taylor sensitivity: the SNIP score."""

from __future__ import annotations

import torch

from normsurgeon.analysis.records import Sensitivity
from normsurgeon.analysis.sensitivity.borrowing import differentiable
from normsurgeon.analysis.sensitivity.objective import Objective
from normsurgeon.analysis.sensitivity.selection import Selection


def taylor(objective: Objective, selection: Selection) -> Sensitivity:
    """``Σ |g · θ|`` over a layer's parameters, with g the gradient of the mean loss over all images.

    Each term is, to first order, how much the loss changes when that one weight becomes zero: the connection
    sensitivity of SNIP (Lee et al., arXiv:1810.02340, not normalised over the network). The gradients add up over
    the batches before the absolute value is taken, so the score does not depend on the batch size.

    ``details["unused"]`` lists parameters that the loss does not depend on: they score 0.
    """
    model, tensors = objective.model, selection.tensors
    selection.require_parameters(model, "taylor")
    # Many small terms are added up: half precision would lose the later ones.
    totals = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    used = [False] * len(tensors)
    with differentiable(model, tensors):
        for images, labels in objective.run("taylor"):
            _, _, loss = objective.forward(images, labels)
            gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
            for number, gradient in enumerate(gradients):
                if gradient is not None:
                    totals[number] += gradient
                    used[number] = True
    values = [
        (total.double() * tensor.detach().double()).abs().sum() / objective.images
        for total, tensor in zip(totals, tensors, strict=True)
    ]
    layers, parameters = selection.scores(torch.stack(values).cpu()[None])
    return Sensitivity(
        method="taylor",
        loss=objective.kind,
        layers=layers,
        parameters=parameters,
        unit="nats: sum of |gradient · weight|",
        samples=objective.images,
        details={"unused": [name for name, was in zip(selection.names, used, strict=True) if not was]},
    )
