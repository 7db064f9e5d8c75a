"""From a name or a file to a model: ``load``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from torch import nn

from normsurgeon.errors import CheckpointError, UsageError
from normsurgeon.models.origin import Origin, attach_origin, header_of, origin_of
from normsurgeon.models.rebuilding import rebuild, rebuilt, source_in
from normsurgeon.models.registry import HUB_PREFIXES, ModelSource, build, settled
from normsurgeon.models.state_dict import StateDict, read_file
from normsurgeon.surgery.replacing import copy_model

_FILE_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")


def load(
    spec: str | os.PathLike[str],
    *,
    pretrained: bool = True,
    weights: str | os.PathLike[str] | None = None,
    model: nn.Module | None = None,
    on_message: Callable[[str], None] = warnings.warn,
    **kwargs: Any,
) -> nn.Module:
    """A model in eval mode, with its real weights.

    spec        a timm name (``resnet50``, ``resnet50.a1_in1k``, ``hf-hub:timm/…``), ``torchvision:resnet50``,
                ``package.module:callable``, ``demo``, or a checkpoint file
    pretrained  False: the architecture with random weights
    weights     a file of weights to load instead of the published ones; a checkpoint's plans are replayed
    model       for a checkpoint file that names no architecture: the model to load into (a copy is)
    on_message  called with one line on what was assumed (tensors matched in order); default: a warning
    kwargs      go to the constructor (``num_classes=10``, ``in_chans=1``)

    :raises LoadingError: an unknown name.
    :raises WeightsUnavailableError: published weights that cannot be fetched.
    :raises CheckpointError: a file that is no checkpoint, or does not fit.

    >>> model = load("test_resnet", pretrained=False)
    >>> model.training
    False
    """
    if _is_file(spec):
        if weights is not None:
            raise UsageError(f"{spec} is a file of weights already: leave out weights={weights}")
        return _from_file(Path(spec), model, on_message, kwargs)
    source = ModelSource.parse(os.fspath(spec), **kwargs)
    if weights is None:
        loaded = build(source, pretrained=pretrained)
        return attach_origin(loaded, Origin(settled(source, loaded), data=_data_of(loaded, source)))
    state, rest = read_file(weights)
    origin = header_of(rest, str(weights)) or Origin(source)
    if source.kind != "callable" and not source.name.startswith(HUB_PREFIXES):
        return rebuilt(source, state, replace(origin, source=source), str(weights), on_message)
    loaded = build(source)
    origin = replace(origin, source=source, data=origin.data or _data_of(loaded, source))
    return rebuild(state, origin, str(weights), loaded, on_message)


def _is_file(spec: str | os.PathLike[str]) -> bool:
    """A path, by its type, its ending, its slashes, or by being there."""
    text = os.fspath(spec)
    if isinstance(spec, os.PathLike) or os.path.isfile(text):
        return True
    return ":" not in text and (text.endswith(_FILE_ENDINGS) or "/" in text or os.sep in text)


def _from_file(
    path: Path, model: nn.Module | None, on_message: Callable[[str], None], kwargs: dict[str, Any]
) -> nn.Module:
    where = str(path)
    state, rest = read_file(path)
    origin = header_of(rest, where)
    if model is not None:
        base, _ = copy_model(model, None)
        if origin is None:
            return attach_origin(rebuild(state, Origin(None), where, base, on_message), origin_of(model))
        return rebuild(state, origin, where, base, on_message)
    if origin is not None:
        return rebuilt(source_in(origin, where), state, origin, where, on_message)
    name = _architecture(path, rest)
    if name is None:
        raise CheckpointError(
            f"{path} holds weights but does not say of which architecture; "
            f"try: the architecture's name with --weights {path} (in Python: load(name, weights=…))"
        )
    source = ModelSource("timm", name, {**_arguments(name, state), **kwargs})
    return rebuilt(source, state, Origin(source), where, on_message)


def _architecture(path: Path, rest: dict[str, Any]) -> str | None:
    """The timm architecture of a file that normsurgeon did not write: its ``arch`` key, or its own name."""
    named = rest.get("arch") or rest.get("architecture") or getattr(rest.get("args"), "model", None)
    if isinstance(named, str) and timm.is_model(named.partition(".")[0]):
        return named.partition(".")[0]
    stem = path.name.partition(".")[0]
    while stem:  # resnet50_a1_0-14fe96d1.pth is a resnet50
        if timm.is_model(stem):
            return stem
        cut = max(stem.rfind("-"), stem.rfind("_"))
        stem = stem[:cut] if cut > 0 else ""
    return None


def _arguments(name: str, state: StateDict) -> dict[str, int]:
    """``num_classes`` and ``in_chans`` as the file's first and last layer have them."""
    arguments: dict[str, int] = {}
    for key, entry, axis in (("num_classes", "classifier", 0), ("in_chans", "first_conv", 1)):
        paths = timm.get_pretrained_cfg_value(name, entry)
        for path in paths if isinstance(paths, (tuple, list)) else [paths]:
            weight = state.get(f"{path}.weight")
            if weight is not None and weight.ndim > axis:
                arguments.setdefault(key, weight.shape[axis])
    return arguments


def _data_of(model: nn.Module, source: ModelSource) -> dict[str, Any] | None:
    """The pre-processing, where rebuilding the architecture would not bring it back."""
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, dict) or not (source.kind == "callable" or source.name.startswith(HUB_PREFIXES)):
        return None
    return {key: value for key, value in config.items() if isinstance(value, (str, int, float, list, tuple))}
