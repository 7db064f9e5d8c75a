"""What weights and the files beside them say of an architecture: its name, its classes, its channels."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from normsurgeon.errors import CheckpointError
from normsurgeon.models.foreign_files import read_json
from normsurgeon.models.prefixes import find
from normsurgeon.models.registry import ModelSource
from normsurgeon.models.state_dict import StateDict

_PREPROCESSING = {
    "mean": (list,),
    "std": (list,),
    "input_size": (list,),
    "crop_pct": (int, float),
    "interpolation": (str,),
    "crop_mode": (str,),
}
_CONSTRUCTOR = {"num_classes": int, "global_pool": str}
"""Of what a ``config.json`` says, what goes to timm's constructor; the channels are read from the weights."""


def shown_arguments(
    source: ModelSource, model: nn.Module, state: StateDict, where: str, prefix: str | None = None
) -> dict[str, int]:
    """``num_classes`` and ``in_chans``, where a file's weights differ from the model's in those alone.

    Only what the source leaves open, and its constructor takes.

    :raises CheckpointError: several networks in the file fit, and ``prefix`` does not choose.
    """
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    found = find(own, state, where, prefix)
    shown = differing_arguments(own, found.under(state)) if found is not None else {}
    return {k: v for k, v in shown.items() if k not in source.kwargs and _takes_argument(source, k)}


def differing_arguments(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, int]:
    """``num_classes`` and ``in_chans`` of tensors that differ from a model's in those alone; none if in more.

    >>> import torch
    >>> own = {"conv.weight": torch.zeros(8, 3, 3, 3), "fc.weight": torch.zeros(1000, 8), "fc.bias": torch.zeros(1000)}
    >>> grey = {"conv.weight": torch.zeros(8, 1, 3, 3), "fc.weight": torch.zeros(10, 8), "fc.bias": torch.zeros(10)}
    >>> differing_arguments(own, grey)
    {'num_classes': 10, 'in_chans': 1}
    """
    pairs = {
        name: (tuple(value.shape), tuple(state[name].shape))
        for name, value in own.items()
        if name in state and value.shape != state[name].shape
    }
    heads = {name: pair for name, pair in pairs.items() if pair[0][1:] == pair[1][1:] and pair[0]}
    stems = {
        name: pair
        for name, pair in pairs.items()
        if len(pair[0]) > 2 and pair[0][:1] + pair[0][2:] == pair[1][:1] + pair[1][2:]
    }
    classes = {(ours[0], theirs[0]) for ours, theirs in heads.values()}
    if len(heads) + len(stems) < len(pairs) or len(classes) > 1 or len(stems) > 1:
        return {}
    arguments = [("num_classes", theirs) for _, theirs in classes]
    return dict(arguments + [("in_chans", theirs[1]) for _, theirs in stems.values()])


def _takes_argument(source: ModelSource, name: str) -> bool:
    """Whether the constructor of a source takes an argument of that name."""
    if source.kind != "callable":
        return source.kind == "timm" or name == "num_classes"
    path, _, attribute = source.name.rpartition(":")
    try:
        function = getattr(importlib.import_module(path), attribute)
        return not isinstance(function, nn.Module) and name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return False


def described(folder: Path, kwargs: Mapping[str, Any]) -> tuple[ModelSource, dict[str, Any]]:
    """The architecture and the pre-processing that a folder's ``config.json`` describes, in timm's format.

    kwargs  what the user says, which goes before what the file says

    :raises CheckpointError: a folder of another library, or a constructor with arguments that a file does not choose.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds weights but no config.json that says of which architecture; "
            f"try: the architecture's name with --weights {folder} (in Python: load(name, weights=…))"
        )
    config = read_json(path)
    name = config.get("architecture")
    if not isinstance(name, str) or not timm.is_model(name.partition(".")[0]):
        classes = config.get("architectures")
        named = classes[0] if isinstance(classes, list) and classes and isinstance(classes[0], str) else "unknown"
        raise CheckpointError(
            f"{path} describes no architecture of timm (it is of {named}); "
            f"in Python: load({str(folder)!r}, model=the network made by its own library)"
        )
    given = config.get("model_args")
    given = {key: value for key, value in given.items() if key not in kwargs} if isinstance(given, dict) else {}
    if given:
        listed = " ".join(f"{key}={value}" for key, value in list(given.items())[:4])
        raise CheckpointError(
            f"{path} makes {name} with arguments of its own, which a file does not choose; try: --model-args {listed}"
        )
    known = {key: config[key] for key, kind in _CONSTRUCTOR.items() if type(config.get(key)) is kind}
    written = config.get("pretrained_cfg")
    written = {**config, **written} if isinstance(written, dict) else config
    data = {key: written[key] for key, kinds in _PREPROCESSING.items() if type(written.get(key)) in kinds}
    return ModelSource("timm", name.partition(".")[0], {**known, **kwargs}), data
