"""From a name or a file to a model: ``load``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from torch import nn

from normsurgeon.architectures import ModelSource, build
from normsurgeon.checkpoints import Origin, header_of, rebuild, remember
from normsurgeon.errors import CheckpointError, UsageError
from normsurgeon.weights import StateDict, fit, read_file

_FILE_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")


def load(
    spec: str | os.PathLike[str],
    *,
    pretrained: bool = True,
    weights: str | os.PathLike[str] | None = None,
    model: nn.Module | None = None,
    say: Callable[[str], None] = warnings.warn,
    **kwargs: Any,
) -> nn.Module:
    """A model in eval mode, with its real weights.

    spec        a timm name (``resnet50``, ``resnet50.a1_in1k``, ``hf-hub:timm/…``), ``torchvision:resnet50``,
                ``package.module:callable``, ``demo``, or a checkpoint file
    pretrained  False: the architecture with random weights
    weights     a state dict file to load instead of the published weights
    model       for a checkpoint file that names no architecture: the model to load into (a copy is)
    say         is told, in one line, of what was assumed (tensors matched in order); default: ``warnings.warn``
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
        return _from_file(Path(spec), model, say, kwargs)
    source = ModelSource.parse(os.fspath(spec), **kwargs)
    loaded = build(source, pretrained=pretrained and weights is None)
    if weights is not None:
        state, _ = read_file(weights)
        fit(loaded, state, str(weights), say)
    return remember(loaded, Origin(source, data=_data_of(loaded, source)))


def _is_file(spec: str | os.PathLike[str]) -> bool:
    text = os.fspath(spec)
    if isinstance(spec, os.PathLike) or text.endswith(_FILE_ENDINGS):
        return True
    return os.path.isfile(text)


def _from_file(
    path: Path, model: nn.Module | None, say: Callable[[str], None], kwargs: dict[str, Any]
) -> nn.Module:
    state, rest = read_file(path)
    origin = header_of(rest, str(path))
    if origin is not None:
        return rebuild(state, origin, str(path), model, say).eval()
    if model is not None:
        return rebuild(state, Origin(None), str(path), model, say).eval()
    name = _architecture(path, rest)
    if name is None:
        raise CheckpointError(
            f"{path} holds weights but does not say of which architecture; "
            f"try the architecture's name with --weights {path} (in Python: load(name, weights=…))"
        )
    source = ModelSource("timm", name, {**_classes(name, state), **kwargs})
    loaded = build(source)
    fit(loaded, state, str(path), say)
    return remember(loaded, Origin(source))


def _architecture(path: Path, rest: dict[str, Any]) -> str | None:
    """The timm architecture of a file that normsurgeon did not write: its ``arch`` key, or the file's own name."""
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


def _classes(name: str, state: StateDict) -> dict[str, int]:
    """``num_classes`` as the file's classifier has it."""
    classifier = timm.get_pretrained_cfg_value(name, "classifier")
    names = classifier if isinstance(classifier, (tuple, list)) else [classifier]
    for candidate in names:
        weight = state.get(f"{candidate}.weight")
        if weight is not None:
            return {"num_classes": weight.shape[0]}
    return {}


def _data_of(model: nn.Module, source: ModelSource) -> dict[str, Any] | None:
    """The pre-processing, where rebuilding the architecture would not bring it back."""
    config = getattr(model, "pretrained_cfg", None)
    return dict(config) if source.kind == "callable" and isinstance(config, dict) else None
