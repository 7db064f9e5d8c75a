"""The measures that differentiate the loss: first-order Taylor (SNIP), the empirical Fisher, the Hessian's trace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from normsurgeon._util.one_line import one_line
from normsurgeon.analysis.records import Sensitivity
from normsurgeon.analysis.sensitivity.borrowing import generator_for
from normsurgeon.analysis.sensitivity.objective import Objective, cross_entropies
from normsurgeon.analysis.sensitivity.selection import Selection
from normsurgeon.errors import UsageError
from normsurgeon.inference.run import first_tensor, logits_of, name_of

MEMORY = 256 * 2**20
"""Bytes that the per-sample gradients of one chunk may take."""


def taylor(objective: Objective, selection: Selection) -> Sensitivity:
    """``Σ |g · θ|`` over a layer's parameters, with g the gradient of the mean loss over all images.

    Each term is, to first order, how much the loss changes when that one weight becomes zero: the connection
    sensitivity of SNIP (Lee et al., arXiv:1810.02340, not normalised over the network). The gradients add up over
    the batches before the absolute value is taken, so the score does not depend on the batch size.

    ``details["unused"]`` lists parameters that the loss does not depend on: they score 0.
    """
    tensors = selection.tensors
    # Many small terms are added up: half precision would lose the later ones.
    totals = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    used = set()
    for images, labels in objective.run("taylor"):
        *_, loss = objective.forward(images, labels)
        for number, gradient in enumerate(torch.autograd.grad(loss, tensors, allow_unused=True)):
            if gradient is not None:
                totals[number] += gradient
                used.add(number)
    products = [(g.double() * t.detach().double()).abs().sum() for g, t in zip(totals, tensors, strict=True)]
    scores = selection.scores(torch.stack(products).cpu()[None] / objective.images)
    details = {"unused": [name for number, name in enumerate(selection.names) if number not in used]}
    unit = "nats: sum of |gradient · weight|"
    return Sensitivity("taylor", objective.kind, *scores, unit, objective.images, details=details)


def fisher(objective: Objective, selection: Selection) -> Sensitivity:
    """``Σ_θ mean_i g_i(θ)²``: the trace of the empirical Fisher's block of each layer, g_i the gradient of image i.

    The squares are of per-sample gradients (a batch's squared gradient is something else: Kunstner et al.,
    arXiv:1905.12558), computed with ``torch.func`` for as many images at once as fit into ``MEMORY``. A network
    that vmap cannot handle is run one image at a time; ``details["per_sample"]`` says which, and why. With labels this
    is the empirical Fisher, without them the one at the network's own answer.

    The standard error is over the images.
    """
    model, tensors = objective.model, selection.tensors
    chunk = max(1, MEMORY // max(1, sum(tensor.numel() * tensor.element_size() for tensor in tensors)))
    if tensors[0].device.type == "cpu":
        # There a vmap over convolutions becomes one grouped convolution, three times as slow as one image at a time.
        chunk = min(chunk, 2)
    details: dict[str, Any] = {"per_sample": "vmap", "chunk": chunk}
    samples: list[Tensor] = []
    for images, labels in objective.run("fisher"):
        with torch.no_grad():
            _, targets, _ = objective.forward(images, labels)
        squares = None
        if details["per_sample"] == "vmap":
            try:
                squares = _all_at_once(model, selection, images, targets, chunk)
            except Exception as error:  # a foreign forward may be anything; the loop below needs less of it
                details = {"per_sample": "loop", "reason": one_line(error, kind=False)}
        samples.append((_one_by_one(model, selection, images, targets) if squares is None else squares).cpu())
    scores = selection.scores(torch.cat(samples))
    unit = "nats²: trace of the empirical Fisher"
    return Sensitivity("fisher", objective.kind, *scores, unit, objective.images, details=details)


def _all_at_once(model: nn.Module, selection: Selection, images: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Squared norms of the per-sample gradients, (N, P) in float64."""

    def loss(parameters: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
        logits = first_tensor(functional_call(model, parameters, (image[None],)))
        assert logits is not None
        return cross_entropies(logits, target[None]).sum()

    def squares(image: Tensor, target: Tensor) -> Tensor:
        gradients = grad(loss)(parameters, image, target)
        # Reduced here, so that no more than one chunk of gradients is ever held.
        return torch.stack([gradient.double().square().sum() for gradient in gradients.values()])

    parameters = {name: tensor.detach() for name, tensor in selection.parameters.items()}
    with torch.no_grad():  # else the parameters that are not asked for would build a graph of their own
        return vmap(squares, chunk_size=chunk)(images, targets)


def _one_by_one(model: nn.Module, selection: Selection, images: Tensor, targets: Tensor) -> Tensor:
    rows = []
    for image, target in zip(images, targets, strict=True):
        loss = cross_entropies(logits_of(model, image[None]), target[None]).sum()
        gradients = torch.autograd.grad(loss, selection.tensors, allow_unused=True)
        zero = loss.new_zeros((), dtype=torch.float64)
        rows.append(torch.stack([zero if g is None else g.double().square().sum() for g in gradients]))
    return torch.stack(rows)


def hessian_trace(objective: Objective, selection: Selection, *, probes: int, seed: int) -> Sensitivity:
    """Hutchinson's estimate of the trace of each layer's diagonal block of the Hessian of the mean loss.

    For a vector v of independent signs, one for each parameter, ``E[v_l · (H v)_l] = tr H_ll``: the terms between two
    different parameters have mean zero (Hutchinson, 1990; for networks HAWQ-V2, arXiv:1911.03852, and PyHessian,
    arXiv:1912.07145). One Hessian-vector product with signs for all parameters at once serves every layer, so that all
    layers cost as much as the one trace of the whole network. The same probes are used for every batch, and H v
    is averaged over the images as the loss is: the figures do not depend on the batch size.

    The standard error is over the probes: it says how well the trace of these images' Hessian is known. A trace
    can be negative. ``details["total"]`` is the trace over all layers measured, ``total_stderr`` its error;
    ``details["unused"]`` lists parameters that the loss does not depend on.

    :raises UsageError: a network that cannot be differentiated twice.
    """
    tensors = selection.tensors
    samples_KP = torch.zeros(probes, len(tensors), dtype=torch.float64)
    used = set()
    for images, labels in objective.run("hessian_trace"):
        *_, loss = objective.forward(images, labels)
        try:
            gradients = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
            used |= {number for number, gradient in enumerate(gradients) if gradient is not None}
            del loss
            if not samples_KP.any():  # once, on the first batch
                _require_second_derivatives(gradients)
            samples_KP += _products(selection, gradients, probes, seed).cpu()
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UsageError(
                f"hessian_trace: {name_of(objective.model)} cannot be differentiated twice "
                f"({one_line(error, kind=False)}); try taylor and fisher"
            ) from error
    samples_KP /= objective.images
    total_K = samples_KP.sum(1)
    details = {
        "total": total_K.mean().item(),
        "total_stderr": (total_K.std() / probes**0.5).item() if probes > 1 else None,
        "unused": [name for number, name in enumerate(selection.names) if number not in used],
    }
    unit = "nats per squared unit of weight: trace of the Hessian"
    scores = selection.scores(samples_KP)
    return Sensitivity("hessian_trace", objective.kind, *scores, unit, objective.images, probes, details)


def _products(selection: Selection, gradients: tuple[Tensor | None, ...], probes: int, seed: int) -> Tensor:
    """``v_p · (H v)_p`` for each of K probes and P parameters, (K, P) in float64, where the parameters are."""
    tensors, names = selection.tensors, selection.names
    samples_KP = torch.zeros(probes, len(tensors), dtype=torch.float64, device=tensors[0].device)
    live = {number: each for number, each in enumerate(gradients) if each is not None}
    for probe in range(probes if live else 0):
        signs = [rademacher(tensors[number], seed, probe, names[number]) for number in live]
        products = torch.autograd.grad(
            list(live.values()),
            [tensors[number] for number in live],
            grad_outputs=signs,
            retain_graph=probe + 1 < probes,
        )
        for number, sign, product in zip(live, signs, products, strict=True):
            # Terms of either sign cancel, so they are added up in double precision.
            samples_KP[probe, number] = (sign * product).sum(dtype=torch.float64)
    return samples_KP


def _require_second_derivatives(gradients: tuple[Tensor | None, ...]) -> None:
    """Raise where an operation has no second derivative: autograd would take it for zero without a word."""
    waiting = [gradient.grad_fn for gradient in gradients if gradient is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None or node.name().rpartition("::")[2] in ("Error", "DelayedError"):
            raise RuntimeError("an operation of its backward pass has no derivative: once_differentiable, or no graph")
        new = {parent for parent, _ in node.next_functions if parent is not None} - seen
        seen |= new
        waiting += new


def rademacher(like: Tensor, seed: int, probe: int, name: str) -> Tensor:
    """Independent signs ±1 of a tensor's shape, the same for the same seed, probe and name.

    >>> rademacher(torch.zeros(2, 3), 0, 0, "fc.weight").abs().sum().item()
    6.0
    """
    # Eight signs from each random byte: drawn one by one they would take as long as half of the product.
    bits = torch.arange(256, device=like.device)[:, None] >> torch.arange(8, device=like.device) & 1
    table = (bits * 2 - 1).to(like.dtype)
    generator = generator_for(like.device, seed, "probe", probe, name)
    draws = torch.randint(256, (-(-like.numel() // 8),), generator=generator, device=like.device)
    return table.index_select(0, draws).flatten()[: like.numel()].view(like.shape)
