"""The trace of the Hessian, layer by layer, from one set of random probes for all layers."""

from __future__ import annotations

import torch
from torch import Tensor

from normsurgeon._util.one_line import one_line
from normsurgeon.analysis.records import Sensitivity
from normsurgeon.analysis.sensitivity.borrowing import differentiable, generator_for
from normsurgeon.analysis.sensitivity.objective import Objective
from normsurgeon.analysis.sensitivity.selection import Selection
from normsurgeon.errors import UsageError
from normsurgeon.inference.run import name_of


def hessian_trace(objective: Objective, selection: Selection, *, probes: int = 16, seed: int = 0) -> Sensitivity:
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
    model, tensors = objective.model, selection.tensors
    selection.require_parameters(model, "hessian_trace")
    samples_KP = torch.zeros(probes, len(tensors), dtype=torch.float64)
    unused = set(range(len(tensors)))
    with differentiable(model, tensors):
        for images, labels in objective.run("hessian_trace"):
            _, _, loss = objective.forward(images, labels)
            try:
                gradients = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
                unused -= {number for number, gradient in enumerate(gradients) if gradient is not None}
                del loss
                if not samples_KP.any():  # once, on the first batch
                    _require_second_derivatives(gradients)
                samples_KP += _products(selection, gradients, probes, seed).cpu()
            except (RuntimeError, NotImplementedError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise UsageError(
                    f"hessian_trace: {name_of(model)} cannot be differentiated twice "
                    f"({one_line(error, kind=False)}); try taylor and fisher"
                ) from error
    samples_KP /= objective.images
    layers, parameters = selection.scores(samples_KP)
    total_K = samples_KP.sum(1)
    return Sensitivity(
        method="hessian_trace",
        loss=objective.kind,
        layers=layers,
        parameters=parameters,
        unit="nats per squared unit of weight: trace of the Hessian",
        samples=objective.images,
        probes=probes,
        details={
            "total": total_K.mean().item(),
            "total_stderr": (total_K.std() / probes**0.5).item() if probes > 1 else None,
            "unused": [selection.names[number] for number in sorted(unused)],
        },
    )


def _products(selection: Selection, gradients: tuple[Tensor | None, ...], probes: int, seed: int) -> Tensor:
    """``v_p · (H v)_p`` for each of K probes and P parameters, (K, P) in float64, where the parameters are."""
    tensors, names = selection.tensors, selection.names
    samples_KP = torch.zeros(probes, len(tensors), dtype=torch.float64, device=tensors[0].device)
    live = {number: each for number, each in enumerate(gradients) if each is not None}
    if not live:
        return samples_KP
    for probe in range(probes):
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
