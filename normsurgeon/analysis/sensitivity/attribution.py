"""How much of the answer each layer carries: captum's layer attributions, summed into one score a layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normsurgeon._util.one_line import one_line
from normsurgeon.analysis.records import Sensitivity
from normsurgeon.analysis.sensitivity.borrowing import out_of_place
from normsurgeon.analysis.sensitivity.objective import Objective
from normsurgeon.analysis.sensitivity.selection import Selection, estimate
from normsurgeon.inference.hooks import Tap, listening
from normsurgeon.inference.run import classifier_logits

MEMORY = 512 * 2**20
"""Bytes that the outputs of all layers together may take where they are explained at once."""

_COPIES = 4
"""How often an output is held meanwhile: before and after a step, its gradient, and the sum."""

Layers = dict[str, nn.Module]
Forward = Callable[[Tensor], Tensor]
Explained = tuple[Tensor, Tensor | None]
"""Of N images, float64 on the CPU: Σ|attribution| over the layer's output (N,); Σ attribution (N,) for conductance."""


def attribution(objective: Objective, selection: Selection, method: str, *, steps: int) -> Sensitivity:
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
    samples: dict[str, list[Tensor]] = {layer: [] for layer in selection.modules}
    deltas: dict[str, list[Tensor]] = {layer: [] for layer in selection.modules}
    failed: dict[str, str] = {}
    forward = partial(classifier_logits, objective.model)
    with out_of_place(objective.model):
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
            at_once = max(1, MEMORY * len(images) // max(_COPIES * size.total(), 1))
            for start in range(0, len(images), at_once):
                part = slice(start, start + at_once)
                for layer, result in _explain(method, forward, layers, images[part], targets[part], steps).items():
                    if isinstance(result, Exception):
                        failed[layer] = one_line(result)
                    elif len(result[0]) != len(images[part]):
                        failed[layer] = f"its output has {len(result[0])} rows for {len(images[part])} images"
                    else:
                        samples[layer].append(result[0])
                        deltas[layer] += [] if result[1] is None else [result[1] - rise[part]]
    details: dict[str, Any] = {"failed": {layer: failed[layer] for layer in selection.modules if layer in failed}}
    good = [layer for layer in selection.modules if layer not in failed]
    if method == "conductance":
        means = {layer: torch.cat(deltas[layer]).abs().mean().item() for layer in good}
        details |= {"convergence_delta": means, "steps": steps, "baseline": "zero image, after pre-processing"}
    scores = tuple(estimate(layer, torch.cat(samples[layer]) if layer in good else None) for layer in selection.modules)
    loss = "logit of the label" if objective.kind == "labels" else "logit of the prediction"
    unit = "logits: mean over images of the sum of |attribution|"
    return Sensitivity(method, loss, scores, (), unit, objective.images, details=details)


def _explain(
    method: str, forward: Forward, layers: Layers, images: Tensor, targets: Tensor, steps: int
) -> dict[str, Explained | Exception]:
    """Each layer's result, or what went wrong with it: all layers in one pass, and if that fails one by one."""
    methods: dict[str, Callable[..., dict[str, Explained]]] = {
        "conductance": partial(conductances, steps=steps),
        "gradient_x_activation": _gradients_x_activations,
        "feature_ablation": _feature_ablation,
    }
    alone = [{layer: module} for layer, module in layers.items()]
    found: dict[str, Explained | Exception] = {}
    for some in alone if method == "feature_ablation" or not layers else [layers, *alone]:
        if len(found) == len(layers):
            break
        try:
            found |= methods[method](forward, some, images, targets)
        except Exception as error:  # captum and a foreign forward may raise anything; the other layers go on
            found |= dict.fromkeys(some, error) if len(some) == 1 else {}
    return found


def conductances(forward: Forward, layers: Layers, images: Tensor, targets: Tensor, steps: int) -> dict[str, Explained]:
    """What captum's ``LayerConductance`` gives with its default settings, for all layers at once.

    captum walks the path from the zero image once for each layer; here each of its steps asks captum for the gradients
    and the outputs of all layers, which for a ResNet-18 is some ten times faster. The sum is captum's:
    ``Σ_k (y(x_k+1) − y(x_k)) · ∂f/∂y(x_k)`` along Gauss-Legendre points x_k.
    """
    from captum.attr import LayerActivation, LayerGradientXActivation

    modules = list(layers.values())
    slopes = LayerGradientXActivation(forward, modules, multiply_by_inputs=False)
    outputs = LayerActivation(forward, modules)
    path = [float(node + 1) / 2 for node in np.polynomial.legendre.leggauss(steps + 1)[0]]
    totals: list[list[Tensor]] = []
    before = _maps(outputs.attribute(path[0] * images))
    for here, there in pairwise(path):
        slope = _maps(slopes.attribute(here * images, target=targets))
        after = _maps(outputs.attribute(there * images))
        parts = [
            [(y1 - y0) * g for y1, y0, g in zip(*maps, strict=True)] for maps in zip(after, before, slope, strict=True)
        ]
        for total, part in zip(totals, parts, strict=True) if totals else ():
            for t, p in zip(total, part, strict=True):
                t.add_(p)
        totals, before = totals or parts, after
    return {name: (_summed(map(torch.abs, total)), _summed(total)) for name, total in zip(layers, totals, strict=True)}


def _gradients_x_activations(forward: Forward, layers: Layers, images: Tensor, targets: Tensor) -> dict[str, Explained]:
    from captum.attr import LayerGradientXActivation

    found = LayerGradientXActivation(forward, list(layers.values())).attribute(images, target=targets)
    return {name: (_summed(map(torch.abs, maps)), None) for name, maps in zip(layers, _maps(found), strict=True)}


def _feature_ablation(forward: Forward, layers: Layers, images: Tensor, targets: Tensor) -> dict[str, Explained]:
    from captum.attr import LayerFeatureAblation

    one_feature = torch.zeros(1, dtype=torch.long, device=images.device)
    ((name, module),) = layers.items()
    found = LayerFeatureAblation(forward, module).attribute(images, target=targets, layer_mask=one_feature)
    # Every value of the feature carries the feature's attribution.
    return {name: (_maps([found])[0][0].flatten(1)[:, 0].abs().double().cpu(), None)}


def _maps(found: Iterable[Tensor | Iterable[Tensor]]) -> list[list[Tensor]]:
    """Of each layer the tensors that it gives, mostly one."""
    return [[each.detach() for each in ([maps] if isinstance(maps, Tensor) else maps)] for maps in found]


def _summed(maps: Iterable[Tensor]) -> Tensor:
    return torch.stack([each.flatten(1).sum(1, dtype=torch.float64) for each in maps]).sum(0).cpu()


def _target_logits(logits_NK: Tensor, targets_N: Tensor) -> Tensor:
    """Each image's logit of its target, float64 on the CPU; one row of logits serves all images."""
    logits_NK = logits_NK.detach().double().expand(len(targets_N), -1)
    return logits_NK.gather(1, targets_N[:, None])[:, 0].cpu()


def _counting(modules: Layers, calls: Counter[str], size: Counter[str]) -> Iterator[Tap]:
    """Count the calls in which modules return a tensor, and the bytes of these."""

    def count(layer: str, output: Tensor) -> None:
        calls[layer] += 1
        size[layer] += output.numel() * output.element_size()

    for layer, module in modules.items():
        yield module, "output", partial(count, layer)
