"""The names that a grid may use, known without importing torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from normsurgeon.norms.target_names import TARGET_NAMES

NORMS = ("bn", *TARGET_NAMES)
"""``bn`` is the network's own; ``gn:8`` stands for ``gn`` with 8 groups."""

PREPROCESSING = (
    "none",
    "model",
    "zero-mean",
    "min-max",
    "standard",
    "standard-per-image",
    "contrast-stretch",
    "linear-prediction",
    "zca",
)
"""``model`` is the network's own mean and std; the others are fitted, see ``normsurgeon.study.preprocessing``."""

STARTS = ("scratch", "converted")

START_ALIASES = {"random": "scratch"}
"""Another name of random weights, so that one start is never two cells."""

SMALL_RESNETS = ("resnet8", "resnet14", "resnet20")
"""Networks of the study's own (``normsurgeon.models.small_resnets``), of which no weights are published."""

ACTIVATIONS = (
    "default",
    "relu",
    "relu6",
    "leaky_relu",
    "prelu",
    "elu",
    "celu",
    "selu",
    "gelu",
    "gelu_tanh",
    "quick_gelu",
    "silu",
    "mish",
    "hard_mish",
    "hardswish",
    "sigmoid",
    "hardsigmoid",
    "tanh",
    "identity",
)
"""``default`` is the network's own; the others are timm's names (``timm.layers.get_act_layer``)."""

ALIASES = {"swish": "silu", "hard_swish": "hardswish", "hard_sigmoid": "hardsigmoid", "leakyrelu": "leaky_relu"}
"""Other names of activations, so that one activation is never two cells."""

OPTIMIZERS = ("sgd", "momentum", "adam", "adamw", "nadamw", "radam", "rmsprop", "adagrad", "lamb", "lars", "lion")
"""timm's usual optimizers; for any other name timm itself is asked, which takes seconds."""


def offer(name: str, known: Iterable[str]) -> str:
    """The end of a message about a name that there is not.

    >>> offer("batchsizes", ["batch_sizes", "norms"])
    "did you mean 'batch_sizes'?"
    >>> offer("x", ["scratch", "converted"])
    'choose one of: scratch, converted'
    """
    known = tuple(known)
    near = difflib.get_close_matches(name.lower(), known, 1, 0.5)
    return f"did you mean {near[0]!r}?" if near else f"choose one of: {', '.join(known)}"
