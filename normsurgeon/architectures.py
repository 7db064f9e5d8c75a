"""Where a model comes from, as a record that can make it again: timm, torchvision, or a function of one's own."""

from __future__ import annotations

import difflib
import importlib
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import timm
from torch import nn

from normsurgeon.errors import LoadingError, WeightsUnavailableError

Kind = Literal["timm", "torchvision", "callable"]

DEMO = "normsurgeon.demo:network"

OFFLINE_HELP = (
    "two ways on: --weights FILE (a state dict you have; weights=… in Python), "
    "or --random-init (pretrained=False) for the architecture alone"
)


@dataclass(frozen=True)
class ModelSource:
    """How to make a model's architecture: ``kind``, ``name`` and the keyword arguments of its constructor."""

    kind: Kind
    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, spec: str, **kwargs: Any) -> ModelSource:
        """A model spec as a source: ``NAME``, ``hf-hub:…``, ``torchvision:NAME`` or ``package.module:callable``.

        >>> ModelSource.parse("torchvision:resnet18").kind
        'torchvision'
        >>> ModelSource.parse("my_project.nets:build").kind
        'callable'
        """
        spec = DEMO if spec == "demo" else spec
        prefix, colon, rest = spec.partition(":")
        if prefix == "torchvision" and colon:
            return cls("torchvision", rest, kwargs)
        if colon and prefix not in ("hf-hub", "hf_hub", "local-dir", "timm"):
            return cls("callable", spec, kwargs)
        return cls("timm", rest if prefix == "timm" else spec, kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {**asdict(self), "kwargs": dict(self.kwargs)}


def build(source: ModelSource, pretrained: bool = False) -> nn.Module:
    """Make the model, in eval mode, with its published weights where ``pretrained``.

    :raises LoadingError: an unknown name (with the closest real ones), or a constructor that fails.
    :raises WeightsUnavailableError: published weights that cannot be fetched.
    """
    make = {"timm": _from_timm, "torchvision": _from_torchvision, "callable": _from_callable}[source.kind]
    return make(source, pretrained).eval()


def _from_timm(source: ModelSource, pretrained: bool) -> nn.Module:
    remote = source.name.startswith(("hf-hub:", "hf_hub:"))
    if not remote and not source.name.startswith("local-dir:"):
        base, _, tag = source.name.partition(".")
        if not timm.is_model(base):
            raise LoadingError(_unknown(source.name, timm.list_models(), "timm model"))
        tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{base}.*")]
        if tag and tag not in tags:
            raise LoadingError(f"timm's {base} has no weights {tag!r}; it has: {', '.join(tags) or 'none'}")
        if pretrained and not timm.is_model_pretrained(base):
            raise WeightsUnavailableError(f"timm has no published weights for {base}; {OFFLINE_HELP}")
    try:
        with _impatient_hub():
            return timm.create_model(source.name, pretrained=pretrained, **source.kwargs)
    except (OSError, ConnectionError) as error:  # hub and download errors are OSErrors
        if pretrained or remote:
            raise WeightsUnavailableError(
                f"the published weights of {source.name} are out of reach ({_brief(error)}); {OFFLINE_HELP}"
            ) from error
        raise LoadingError(f"{source.name} could not be loaded: {_brief(error)}") from error
    except (RuntimeError, TypeError, ValueError, KeyError, AssertionError) as error:
        raise LoadingError(f"timm could not create {source.name}: {_brief(error)}") from error


def _from_torchvision(source: ModelSource, pretrained: bool) -> nn.Module:
    from torchvision import models

    if source.name not in models.list_models():
        raise LoadingError(_unknown(source.name, models.list_models(), "torchvision model"))
    weights = models.get_model_weights(source.name).DEFAULT if pretrained else None
    try:
        model = models.get_model(source.name, weights=weights, **source.kwargs)
    except OSError as error:
        raise WeightsUnavailableError(
            f"the published weights of torchvision:{source.name} are out of reach ({_brief(error)}); {OFFLINE_HELP}"
        ) from error
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise LoadingError(f"torchvision could not create {source.name}: {_brief(error)}") from error
    if not hasattr(model, "pretrained_cfg"):
        model.pretrained_cfg = _torchvision_config(source.name)
    return model


def _torchvision_config(name: str) -> dict[str, Any]:
    """torchvision's own pre-processing of a model, in timm's terms."""
    from torchvision import models

    transforms = models.get_model_weights(name).DEFAULT.transforms()
    crop = getattr(transforms, "crop_size", [224])
    resize = getattr(transforms, "resize_size", crop) or crop
    side = crop[0] if isinstance(crop, (list, tuple)) else crop
    larger = resize[0] if isinstance(resize, (list, tuple)) else resize
    return {
        "input_size": (3, side, side),
        "crop_pct": min(1.0, side / larger),
        "interpolation": getattr(getattr(transforms, "interpolation", None), "value", "bilinear"),
        "mean": tuple(getattr(transforms, "mean", (0.485, 0.456, 0.406))),
        "std": tuple(getattr(transforms, "std", (0.229, 0.224, 0.225))),
    }


def _from_callable(source: ModelSource, pretrained: bool) -> nn.Module:
    path, _, attribute = source.name.rpartition(":")
    try:
        function = getattr(importlib.import_module(path), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise LoadingError(
            f"{source.name!r}: {_brief(error)}; a model of your own is given as package.module:callable"
        ) from error
    kwargs = dict(source.kwargs)
    if source.name == DEMO:
        kwargs["pretrained"] = pretrained
    model = function(**kwargs) if not isinstance(function, nn.Module) else function
    if not isinstance(model, nn.Module):
        raise LoadingError(f"{source.name} returned {type(model).__name__}; it must return an nn.Module")
    return model


def _unknown(name: str, known: list[str], what: str) -> str:
    close = difflib.get_close_matches(name.partition(".")[0], known, n=4, cutoff=0.6)
    hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists the names"
    return f"unknown {what} {name!r}; {hint}"


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:140]}{'…' if len(text) > 140 else ''}"


@contextmanager
def _impatient_hub() -> Iterator[None]:
    """Without a name server, let the hub's client look in its cache only, instead of retrying for most of a minute."""
    import logging

    from huggingface_hub import constants

    proxied = any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    offline = constants.HF_HUB_OFFLINE
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    if not proxied and not offline and not _resolves(urlsplit(constants.ENDPOINT).hostname or ""):
        constants.HF_HUB_OFFLINE = True
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logger.setLevel(level)


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
