"""What random noise on a layer's weights does to the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from normsurgeon.analysis.records import Sensitivity
from normsurgeon.analysis.sensitivity.borrowing import generator_for, restored
from normsurgeon.analysis.sensitivity.objective import Objective, cross_entropies
from normsurgeon.analysis.sensitivity.selection import Selection, estimate
from normsurgeon.inference.run import classifier_logits


def noise(
    objective: Objective, selection: Selection, *, draws: int = 4, sigma: float = 0.05, seed: int = 0
) -> Sensitivity:
    """The mean loss's change when a layer's parameters become ``θ + sigma · rms(θ) · n``, n standard normal.

    The noise is relative to the tensor's root mean square, not to each weight, so that small weights move as far as
    large ones (as rounding to a grid does); a tensor of zeros stays as it is. The score is the mean over the draws,
    with its standard error. All batches and all noise levels see the same n, which depends only on the seed, the
    draw and the parameter's name: two networks with the same names are compared under the same noise.

    Parameters are put back bit for bit, also after an error or an interruption. ``details["loss"]`` is the loss
    without noise.
    """
    model = objective.model
    selection.require_parameters(model, "noise")
    layers = [layer for layer, names in selection.owned.items() if names]
    changes_RL = torch.zeros(draws, len(layers), dtype=torch.float64)
    base = 0.0
    with torch.no_grad():
        for images, labels in objective.run("noise"):
            logits, targets, _ = objective.forward(images, labels)
            unchanged = _loss(logits, targets)
            base += unchanged
            for column, layer in enumerate(layers):
                chosen = {name: selection.parameters[name] for name in selection.owned[layer]}
                for draw in range(draws):
                    with noisy(chosen, sigma, seed, draw):
                        changed = _loss(classifier_logits(model, images), targets)
                    changes_RL[draw, column] += changed - unchanged
    changes_RL /= objective.images
    samples = dict(zip(layers, changes_RL.unbind(1), strict=True))
    return Sensitivity(
        method="noise",
        loss=objective.kind,
        layers=tuple(estimate(layer, samples.get(layer)) for layer in selection.owned),
        unit=f"nats: change of the loss under noise of {sigma:g} of the weights' rms",
        samples=objective.images,
        probes=draws,
        details={"sigma": sigma, "relative_to": "root mean square of the tensor", "loss": base / objective.images},
    )


@contextmanager
def noisy(parameters: dict[str, torch.nn.Parameter], sigma: float, seed: int, draw: int) -> Iterator[None]:
    """Parameters with relative noise on them for a while."""
    with restored(parameters.values()):
        for name, tensor in parameters.items():
            generator = generator_for(tensor.device, seed, "noise", draw, name)
            wide = torch.promote_types(tensor.dtype, torch.float32)
            n = torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=wide)
            scale = sigma * tensor.data.double().square().mean().sqrt().item()
            tensor.data.copy_(tensor.data.to(wide).add_(n, alpha=scale))
        yield


def _loss(logits: Tensor, targets: Tensor) -> float:
    return cross_entropies(logits.double(), targets).sum().item()
