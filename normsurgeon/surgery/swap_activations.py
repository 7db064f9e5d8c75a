"""Swapping the activation functions of a model for others."""

from __future__ import annotations

from timm.layers import activations as timm_activations
from timm.layers import get_act_layer
from torch import nn
from torch.nn.modules import activation as torch_activations

from normsurgeon.errors import UsageError
from normsurgeon.surgery.swap_layers import swap_layers

GATES = ("Sigmoid", "Hardsigmoid", "Softmax", "Softmax2d", "LogSoftmax", "Softmin", "MultiheadAttention", "GLU")
"""Classes of torch's activation module that are no activation of a layer: gates, probabilities, attention."""


def with_activation(model: nn.Module, name: str) -> nn.Module:
    """A copy of a network whose activations are all ``name`` (timm's names); gates keep theirs.

    :raises UsageError: if timm has no such activation, or the network's activations are no modules.

    >>> with_activation(nn.Sequential(nn.ReLU(inplace=True)), "silu")[0]
    SiLU(inplace=True)
    """
    try:
        made = get_act_layer(name)
    except (KeyError, AssertionError):
        made = None
    if made is None:
        raise UsageError(f"timm has no activation {name!r}; try relu, silu, gelu or leaky_relu")

    def build(old: nn.Module) -> nn.Module:
        return made(inplace=True) if getattr(old, "inplace", False) else made()

    if not any(is_activation(module) for module in model.modules()):
        raise UsageError(f"the activations of {type(model).__name__} are no modules, and cannot be swapped for {name}")
    training = model.training
    return swap_layers(model, lambda path, module: is_activation(module), build).model.train(training)


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation function (of torch's or timm's), and no gate.

    >>> is_activation(nn.ReLU()), is_activation(nn.Sigmoid()), is_activation(nn.Linear(2, 2))
    (True, False, False)
    """
    home = type(module).__module__
    known = (torch_activations.__name__, timm_activations.__name__, "timm.layers.activations_me")
    return home in known and type(module).__name__ not in GATES
