"""From a name or a file to a model: ``load``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from torch import nn

from normsurgeon.errors import CheckpointError, ConversionError, LoadingError, UsageError
from normsurgeon.models.described import described, shown_arguments
from normsurgeon.models.origin import Origin, attach_origin, header_of, origin_of
from normsurgeon.models.rebuilding import rebuild, rebuilt, replayed, source_in
from normsurgeon.models.registry import HUB_PREFIXES, ModelSource, build, settled
from normsurgeon.models.state_dict import StateDict, read_file
from normsurgeon.printable import one_short_line
from normsurgeon.surgery.replacing import copy_model

_FILE_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar", ".pkl", ".index.json")


def load(
    spec: str | os.PathLike[str],
    *,
    pretrained: bool = True,
    weights: str | os.PathLike[str] | None = None,
    weights_prefix: str | None = None,
    model: nn.Module | None = None,
    on_message: Callable[[str], None] = warnings.warn,
    **kwargs: Any,
) -> nn.Module:
    """A model in eval mode, with its real weights.

    spec            a timm name (``resnet50``, ``resnet50.a1_in1k``, ``hf-hub:timm/…``), ``torchvision:resnet50``,
                    ``package.module:callable``, ``demo``, a checkpoint file, or a folder as timm writes it for the
                    Hugging Face hub
    pretrained      False: the architecture with random weights
    weights         a file of weights to load instead of the published ones; a checkpoint's plans are replayed
    weights_prefix  of several networks in the file of weights, the one whose tensors begin so (``"student"``)
    model           for a checkpoint file that names no architecture: the model to load into (a copy is)
    on_message      called with one line on what was assumed or left out; default: a warning
    kwargs          go to the constructor (``num_classes=10``, ``in_chans=1``); these two are read from the file of
                    weights where it shows them

    :raises LoadingError: an unknown name.
    :raises WeightsUnavailableError: published weights that cannot be fetched.
    :raises CheckpointError: a file that is no checkpoint, or does not fit, or holds several networks that do.
    :raises ConversionError: a file whose plan was made for another architecture.

    >>> model = load("test_resnet", pretrained=False)
    >>> model.training
    False
    """
    if _is_file(spec):
        if weights is not None:
            raise UsageError(f"{spec} is a file of weights already: leave out weights={weights}")
        with _named_in_errors(spec):
            return _from_file(Path(spec), model, on_message, weights_prefix, kwargs)
    source = ModelSource.parse(os.fspath(spec), **kwargs)
    if weights is None:
        if weights_prefix is not None:
            raise UsageError(f"weights_prefix={weights_prefix!r} is of a file of weights, and none is given")
        loaded = build(source, pretrained=pretrained)
        published = (getattr(loaded, "pretrained_cfg", None) or {}).get("num_classes")
        if pretrained and source.kind == "timm" and kwargs.get("num_classes", 0) not in (0, published):
            on_message(f"{spec}: the classifier has random weights: {kwargs['num_classes']} classes, not {published}")
        return attach_origin(loaded, Origin(settled(source, loaded), data=_data_of(loaded, source)))
    state, rest = read_file(weights)
    with _named_in_errors(weights):
        return _with_weights(source, state, header_of(rest, str(weights)), str(weights), on_message, weights_prefix)


@contextmanager
def _named_in_errors(file: str | os.PathLike[str]) -> Iterator[None]:
    """A plan that does not fit is that of this file."""
    try:
        yield
    except ConversionError as error:
        raise ConversionError(one_short_line(f"{os.fspath(file)}: {error}")) from error


def _is_file(spec: str | os.PathLike[str]) -> bool:
    """A path, by its type, its ending, its slashes, or by being there: a network's name goes before a folder's."""
    text = os.fspath(spec)
    if isinstance(spec, os.PathLike) or os.path.isfile(text):
        return True
    if os.path.isdir(text) and text != "demo" and not timm.is_model(text):
        return True
    return ":" not in text and (text.endswith(_FILE_ENDINGS) or "/" in text or os.sep in text)


def _from_file(
    path: Path,
    model: nn.Module | None,
    on_message: Callable[[str], None],
    prefix: str | None,
    kwargs: dict[str, Any],
) -> nn.Module:
    where = str(path)
    state, rest = read_file(path)
    origin = header_of(rest, where)
    if kwargs and (model is not None or origin is not None):
        named = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
        what = "the model to load into" if model is not None else f"{where}, which holds its own architecture,"
        raise UsageError(f"{what} is made already: leave out {named}")
    if model is not None:
        base, _ = copy_model(model, None)
        if origin is None:
            return attach_origin(rebuild(state, Origin(None), where, base, on_message, prefix), origin_of(model))
        return rebuild(state, origin, where, base, on_message, prefix)
    if origin is not None:
        try:
            return rebuilt(source_in(origin, where), state, origin, where, on_message, prefix)
        except LoadingError as error:  # about a name or an argument that the file gives
            raise CheckpointError(f"{where} cannot be rebuilt: {error}") from error
    if path.is_dir():
        source, data = described(path, kwargs)
        loaded = _with_weights(source, state, None, where, on_message, prefix)
        known = {k: v for k, v in getattr(loaded, "pretrained_cfg", {}).items() if _is_plain(v)} | data
        loaded.pretrained_cfg = known  # type: ignore[assignment]
        return attach_origin(loaded, replace(origin_of(loaded), data=known))
    name = _architecture(path, rest)
    if name is None:
        raise CheckpointError(
            f"{path} holds weights but does not say of which architecture; "
            f"try: the architecture's name with --weights {path} (in Python: load(name, weights=…))"
        )
    return _with_weights(ModelSource("timm", name, kwargs), state, None, where, on_message, prefix)


def _with_weights(
    source: ModelSource,
    state: StateDict,
    origin: Origin | None,
    where: str,
    on_message: Callable[[str], None],
    prefix: str | None,
) -> nn.Module:
    """The architecture that the user named, with a file's weights.

    It is made with as many classes and channels as the weights have, where ``source`` does not say otherwise.
    """
    origin = replace(origin or Origin(source), source=source)
    if source.kind != "callable" and not source.name.startswith(HUB_PREFIXES):
        return rebuilt(source, state, origin, where, on_message, prefix, read_arguments=True)
    model = build(source)
    compared = replayed(build(source), origin) if origin.plans else model
    shown = shown_arguments(source, compared, state, where, prefix)
    if shown:
        source = replace(source, kwargs={**source.kwargs, **shown})
        model = build(source)
    origin = replace(origin, source=source, data=origin.data or _data_of(model, source))
    return rebuild(state, origin, where, model, on_message, prefix)


def _architecture(path: Path, rest: dict[str, Any]) -> str | None:
    """The timm architecture of a file that normsurgeon did not write: its ``arch`` key, or its own name."""
    settings = [rest, rest.get("hyper_parameters"), getattr(rest.get("args"), "__dict__", rest.get("args"))]
    for key in ("arch", "architecture", "model_name", "model"):
        for named in (entry.get(key) for entry in settings if isinstance(entry, dict)):
            if isinstance(named, str) and timm.is_model(named.partition(".")[0]):
                return named.partition(".")[0]
    stem = path.name.partition(".")[0]
    while stem:  # resnet50_a1_0-14fe96d1.pth is a resnet50
        if timm.is_model(stem):
            return stem
        cut = max(stem.rfind("-"), stem.rfind("_"))
        stem = stem[:cut] if cut > 0 else ""
    return None


def _data_of(model: nn.Module, source: ModelSource) -> dict[str, Any] | None:
    """The pre-processing, where rebuilding the architecture would not bring it back."""
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, dict) or not (source.kind == "callable" or source.name.startswith(HUB_PREFIXES)):
        return None
    return {key: value for key, value in config.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, list, tuple))
