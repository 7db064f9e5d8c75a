"""The diagonal empirical Fisher information, from per-sample gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from normsurgeon._util.one_line import one_line
from normsurgeon.analysis.records import Sensitivity
from normsurgeon.analysis.sensitivity.borrowing import differentiable
from normsurgeon.analysis.sensitivity.objective import Objective, cross_entropies
from normsurgeon.analysis.sensitivity.selection import Selection
from normsurgeon.inference.run import logits_of

MEMORY = 256 * 2**20
"""Bytes that the per-sample gradients of one chunk may take."""


def fisher(objective: Objective, selection: Selection, *, memory: int = MEMORY) -> Sensitivity:
    """``Σ_θ mean_i g_i(θ)²``: the trace of the empirical Fisher's block of each layer, g_i the gradient of image i.

    The squares are of per-sample gradients (a batch's squared gradient is something else: Kunstner et al.,
    arXiv:1905.12558), computed with ``torch.func`` for as many images at once as fit into ``memory`` bytes. A network
    that vmap cannot handle is run one image at a time; ``details["per_sample"]`` says which, and why.
    With ``loss="labels"`` this is the empirical Fisher, with ``prediction`` the one at the network's own answer.

    The standard error is over the images.
    """
    model, tensors = objective.model, selection.tensors
    selection.require_parameters(model, "fisher")
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    chunk = max(1, memory // max(size, 1))
    if tensors[0].device.type == "cpu":
        # There a vmap over convolutions becomes one grouped convolution, three times as slow as one image at a time.
        chunk = min(chunk, 2)
    details: dict[str, Any] = {"per_sample": "vmap", "chunk": chunk}
    samples = []
    with differentiable(model, tensors):
        for images, labels in objective.run("fisher"):
            with torch.no_grad():
                _, targets, _ = objective.forward(images, labels)
            squares = None
            if details["per_sample"] == "vmap":
                try:
                    squares = _all_at_once(objective, selection, images, targets, chunk)
                except Exception as error:  # a foreign forward may be anything; the loop below needs less of it
                    details = {"per_sample": "loop", "reason": one_line(error, kind=False)}
            if squares is None:
                squares = _one_by_one(objective, selection, images, targets)
            samples.append(squares.cpu())
    layers, parameters = selection.scores(torch.cat(samples))
    return Sensitivity(
        method="fisher",
        loss=objective.kind,
        layers=layers,
        parameters=parameters,
        unit="nats²: trace of the empirical Fisher",
        samples=objective.images,
        details=details,
    )


class _Logits(nn.Module):
    """The model with its logits taken out of whatever it returns."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.model, images)


def _all_at_once(objective: Objective, selection: Selection, images: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Squared norms of the per-sample gradients, (N, P) in float64."""
    logits = _Logits(objective.model)

    def loss(parameters: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
        return cross_entropies(functional_call(logits, parameters, (image[None],)), target[None]).sum()

    def squares(image: Tensor, target: Tensor) -> Tensor:
        gradients = grad(loss)(parameters, image, target)
        # Reduced here, so that no more than one chunk of gradients is ever held.
        return torch.stack([gradient.double().square().sum() for gradient in gradients.values()])

    parameters = {f"model.{name}": tensor.detach() for name, tensor in selection.parameters.items()}
    with torch.no_grad():  # else the parameters that are not asked for would build a graph of their own
        return vmap(squares, chunk_size=chunk)(images, targets)


def _one_by_one(objective: Objective, selection: Selection, images: Tensor, targets: Tensor) -> Tensor:
    rows = []
    for image, target in zip(images, targets, strict=True):
        loss = cross_entropies(logits_of(objective.model, image[None]), target[None]).sum()
        gradients = torch.autograd.grad(loss, selection.tensors, allow_unused=True)
        zero = loss.new_zeros((), dtype=torch.float64)
        rows.append(torch.stack([zero if g is None else g.double().square().sum() for g in gradients]))
    return torch.stack(rows)
