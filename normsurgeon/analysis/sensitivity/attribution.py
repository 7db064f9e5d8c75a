"""How much of the answer each layer carries: captum's layer attributions, summed into one score a layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normsurgeon._util.one_line import one_line
from normsurgeon.analysis.records import Sensitivity
from normsurgeon.analysis.sensitivity import explaining
from normsurgeon.analysis.sensitivity.borrowing import differentiable, out_of_place
from normsurgeon.analysis.sensitivity.explaining import Explained
from normsurgeon.analysis.sensitivity.objective import Objective
from normsurgeon.analysis.sensitivity.selection import Selection, estimate
from normsurgeon.inference.hooks import Tap, listening
from normsurgeon.inference.run import classifier_logits

MEMORY = 512 * 2**20
"""Bytes that the outputs of all layers together may take where they are explained at once."""

_COPIES = 4
"""How often an output is held meanwhile: before and after a step, its gradient, and the sum."""


def attribution(
    objective: Objective, selection: Selection, method: str, *, steps: int = 32, memory: int = MEMORY
) -> Sensitivity:
    """One of captum's layer attributions of the target's logit f; a layer's score is the mean over images of Σ|a|.

    The target is the image's label if there is one and the network's own answer otherwise; the sum is over all values
    of the layer's output, and the standard error over the images.

    conductance            the part of ``f(x) − f(0)`` that flows through each value, integrated over ``steps`` steps
                           from the zero image (after pre-processing: the mean colour) to x (Dhamdhere et al.,
                           arXiv:1805.12233). ``details["convergence_delta"]``: layer → mean over images of
                           ``|Σa − (f(x) − f(0))|``, near 0 where everything flows through this layer; next to a
                           shortcut it also holds what the shortcut carries
    gradient_x_activation  ``a = y · ∂f/∂y``, y the layer's output
    feature_ablation       the layer's whole output set to zero, as one feature: ``|f(x) − f(x; y = 0)|``

    A layer that cannot be explained scores None, and ``details["failed"]`` says why: one that is not called, or
    more than once (captum follows one call), or whose output is no tensor.
    """
    model = objective.model
    samples: dict[str, list[Tensor]] = {layer: [] for layer in selection.modules}
    deltas: dict[str, list[Tensor]] = {layer: [] for layer in selection.modules}
    failed: dict[str, str] = {}

    def forward(images: Tensor) -> Tensor:
        return classifier_logits(model, images)

    # Without gradients for the weights only the layers' outputs are differentiated.
    with differentiable(model), out_of_place(model):
        for images, labels in objective.run(method):
            calls: Counter[str] = Counter()
            size: Counter[str] = Counter()
            with torch.no_grad(), listening(_counting(selection.modules, calls, size)):
                logits, targets, _ = objective.forward(images, labels)
            failed |= {
                layer: f"called {calls[layer]} times in one pass; captum explains one call"
                for layer in selection.modules
                if calls[layer] != 1
            }
            layers = {layer: module for layer, module in selection.modules.items() if layer not in failed}
            rise = _target_logits(logits, targets) - _target_logits(forward(torch.zeros_like(images[:1])), targets)
            at_once = max(1, memory * len(images) // max(_COPIES * size.total(), 1))
            for start in range(0, len(images), at_once):
                part = slice(start, start + at_once)
                found = _explain(method, forward, layers, images[part], targets[part], steps)
                for layer, result in found.items():
                    if isinstance(result, Exception):
                        failed[layer] = one_line(result)
                        continue
                    if len(result[0]) != len(images[part]):
                        failed[layer] = f"its output has {len(result[0])} rows for {len(images[part])} images"
                        continue
                    samples[layer].append(result[0])
                    if result[1] is not None:
                        deltas[layer].append(result[1] - rise[part])
    details: dict[str, Any] = {"failed": {layer: failed[layer] for layer in selection.modules if layer in failed}}
    good = [layer for layer in selection.modules if layer not in failed]
    if method == "conductance":
        means = {layer: torch.cat(deltas[layer]).abs().mean().item() for layer in good}
        details |= {"convergence_delta": means, "steps": steps, "baseline": "zero image, after pre-processing"}
    return Sensitivity(
        method=method,
        loss="logit of the label" if objective.kind == "labels" else "logit of the prediction",
        layers=tuple(
            estimate(layer, torch.cat(samples[layer]) if layer in good else None) for layer in selection.modules
        ),
        unit="logits: mean over images of the sum of |attribution|",
        samples=objective.images,
        details=details,
    )


def _explain(
    method: str,
    forward: explaining.Forward,
    layers: dict[str, nn.Module],
    images: Tensor,
    targets: Tensor,
    steps: int,
) -> dict[str, Explained | Exception]:
    """Each layer's result, or what went wrong with it: all layers in one pass, and if that fails one by one."""
    together: dict[str, Callable[[], dict[str, Explained]]] = {
        "conductance": lambda: explaining.conductances(forward, layers, images, targets, steps),
        "gradient_x_activation": lambda: explaining.gradients_x_activations(forward, layers, images, targets),
    }
    alone: dict[str, Callable[[str], Explained]] = {
        "conductance": lambda layer: explaining.conductance(forward, layers[layer], images, targets, steps),
        "gradient_x_activation": lambda layer: explaining.gradients_x_activations(
            forward, {layer: layers[layer]}, images, targets
        )[layer],
        "feature_ablation": lambda layer: explaining.feature_ablation(forward, layers[layer], images, targets),
    }
    if method in together and layers:
        found = _attempt(together[method])
        if not isinstance(found, Exception):
            return {**found}
    return {layer: _attempt(partial(alone[method], layer)) for layer in layers}


def _attempt(explain: Callable[[], Any]) -> Any:
    try:
        return explain()
    except Exception as error:  # captum and a foreign forward may raise anything; the other layers go on
        return error


def _target_logits(logits_NK: Tensor, targets_N: Tensor) -> Tensor:
    """Each image's logit of its target, float64 on the CPU; one row of logits serves all images."""
    logits_NK = logits_NK.detach().double().expand(len(targets_N), -1)
    return logits_NK.gather(1, targets_N[:, None])[:, 0].cpu()


def _counting(modules: dict[str, nn.Module], calls: Counter[str], size: Counter[str]) -> Iterator[Tap]:
    """Count the calls in which modules return a tensor, and the bytes of these."""

    def count(layer: str, output: Tensor) -> None:
        calls[layer] += 1
        size[layer] += output.numel() * output.element_size()

    for layer, module in modules.items():
        yield module, "output", partial(count, layer)
