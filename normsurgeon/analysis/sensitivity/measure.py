"""``measure_sensitivity``: which layers and parameters the loss cares about, by several measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from normsurgeon._util.checks import check_at_least
from normsurgeon._util.progress import OnProgress
from normsurgeon._util.suggest import suggest
from normsurgeon.analysis.records import Sensitivity
from normsurgeon.analysis.sensitivity.attribution import attribution
from normsurgeon.analysis.sensitivity.borrowing import borrowed, differentiable
from normsurgeon.analysis.sensitivity.changes import noise
from normsurgeon.analysis.sensitivity.derivatives import fisher, hessian_trace, taylor
from normsurgeon.analysis.sensitivity.objective import Batches, Objective
from normsurgeon.analysis.sensitivity.selection import select_layers
from normsurgeon.errors import UsageError

METHODS = (
    "taylor",
    "fisher",
    "hessian_trace",
    "noise",
    "conductance",
    "gradient_x_activation",
    "feature_ablation",
)
DEFAULT_METHODS = METHODS[:4]


def measure_sensitivity(
    model: nn.Module,
    batches: Batches,
    *,
    methods: Sequence[str] = DEFAULT_METHODS,
    layers: Sequence[str] | None = None,
    probes: int = 16,
    draws: int = 4,
    sigma: float = 0.05,
    steps: int = 32,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> tuple[Sensitivity, ...]:
    """How much the loss of a classifier depends on each layer and each parameter tensor, in eval mode.

    batches      images, pre-processed, and their labels, if all have some; every method makes one pass
    methods      of ``METHODS``, one record each; the function of each method says what it measures
    layers       module paths; a block counts with all that is inside. None: every module that owns parameters
    probes       random directions of the Hessian's trace
    draws        noises for each layer; ``sigma`` is their size relative to a tensor's root mean square
    steps        of conductance's path
    seed         of probes and noise; the caller's own random state is left alone
    on_progress  called with a Progress after each batch: the method and how many images it has seen

    The loss is the cross-entropy with the labels, or without them with the network's own prediction; the record says
    which. A shared parameter is counted once, under its first name. Frozen parameters are measured like all others.
    The model is left as it was, with its values, flags, ``.grad`` and hooks, also after an error.

    :raises UsageError: an unknown method or setting, a model that is no classifier, or a network that a method cannot
        handle.
    :raises PatternError: a layer that the model does not have.
    :raises DataError: labels that the head cannot have or that some images lack, or a loss that is not finite.

    >>> import timm, torch
    >>> net = timm.create_model("test_resnet", num_classes=10)
    >>> images = torch.rand(4, 3, 32, 32)
    >>> (found,) = measure_sensitivity(net, [(images, None)], methods=["taylor"], layers=["conv1.0", "fc"])
    >>> [score.name for score in found.layers], [score.name for score in found.parameters], found.loss
    (['conv1.0', 'fc'], ['conv1.0.weight', 'fc.weight', 'fc.bias'], 'prediction')
    """
    methods = check_methods(methods)
    check_at_least(1, probes=probes, draws=draws)
    check_at_least(2, steps=steps)
    if not 0 < sigma < float("inf"):
        raise UsageError(f"sigma={sigma} must be positive; try 0.05, noise of a twentieth of the weights' size")
    selection = select_layers(model, layers)
    objective = Objective(model, batches, on_progress)
    of_weights: dict[str, Callable[..., Sensitivity]] = {
        "taylor": taylor,
        "fisher": fisher,
        "hessian_trace": partial(hessian_trace, probes=probes, seed=seed),
        "noise": partial(noise, draws=draws, sigma=sigma, seed=seed),
    }
    found = []
    with borrowed(model):
        for method in methods:
            if method in of_weights:
                selection.require_parameters(model, method)
            # Attributions differentiate the layers' outputs alone.
            with differentiable(model, selection.tensors if method in of_weights else ()):
                measure = of_weights.get(method, partial(attribution, method=method, steps=steps))
                found.append(measure(objective, selection))
    return tuple(found)


def passes(method: str, layers: int, probes: int = 16, draws: int = 4, steps: int = 32) -> float:
    """About how many forward passes a method costs in a network of so many layers: within a factor of 2 on
    EfficientNet-Lite0 and test_resnet, on the CPU.

    >>> passes("taylor", 50), passes("noise", 50)
    (4.0, 160.0)
    """
    costs = {
        "taylor": 4.0,
        "fisher": 9.0,
        "hessian_trace": 9.0 * probes,
        "noise": 0.8 * draws * layers,
        "conductance": 4.5 * steps,
        "gradient_x_activation": 3.0,
        "feature_ablation": 2.3 * layers,
    }
    return costs[method]


def check_methods(methods: Sequence[str]) -> tuple[str, ...]:
    """The methods as a tuple, each once.

    :raises UsageError: an unknown one.

    >>> check_methods(["fisher", "taylor", "fisher"])
    ('fisher', 'taylor')
    """
    chosen = (methods,) if isinstance(methods, str) else tuple(dict.fromkeys(methods))
    for method in chosen:
        if method not in METHODS:
            raise UsageError(f"unknown method {method!r}; {suggest(str(method), METHODS)}")
    return chosen
