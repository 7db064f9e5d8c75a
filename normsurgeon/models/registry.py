"""Where a model comes from, as a record that can make it again: timm, torchvision, or one's own function."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args
from urllib.error import URLError
from urllib.parse import urlsplit

import timm
from torch import nn

from normsurgeon._util.one_line import one_line
from normsurgeon._util.suggest import suggest
from normsurgeon.errors import LoadingError, NormSurgeonError, WeightsUnavailableError

Kind = Literal["timm", "torchvision", "callable"]

DEMO = "normsurgeon.models.demo:network"

OFFLINE_HELP = (
    "try: --weights FILE (a state dict you have; weights=… in Python), "
    "or --random-init (pretrained=False) for the architecture alone"
)

HUB_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")


@dataclass(frozen=True)
class ModelSource:
    """How to make a model's architecture: ``kind``, ``name`` and the keyword arguments of its constructor."""

    kind: Kind
    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"unknown kind of model {self.kind!r}")

    @classmethod
    def parse(cls, spec: str, **kwargs: Any) -> ModelSource:
        """A spec as a source: ``NAME``, ``hf-hub:…``, ``torchvision:NAME`` or ``package.module:callable``.

        >>> ModelSource.parse("torchvision:resnet18").kind
        'torchvision'
        >>> ModelSource.parse("my_project.nets:build").kind
        'callable'
        """
        spec = DEMO if spec == "demo" else spec
        prefix, colon, rest = spec.partition(":")
        if prefix == "torchvision" and colon:
            return cls("torchvision", rest, kwargs)
        if colon and prefix != "timm" and not spec.startswith(HUB_PREFIXES):
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
    # torch.hub announces its downloads on standard output, where a command may be writing JSON.
    with contextlib.redirect_stdout(sys.stderr):
        return make(source, pretrained).eval()


def settled(source: ModelSource, model: nn.Module) -> ModelSource:
    """The source, with what the published weights decided about the architecture: to be built so again."""
    if source.kind != "torchvision":
        return source
    decided = {key: getattr(model, key) for key in ("aux_logits", "transform_input") if hasattr(model, key)}
    if hasattr(model, "aux_classifier"):
        decided["aux_loss"] = model.aux_classifier is not None
    return replace(source, kwargs={**decided, **source.kwargs})


def timm_source_of(model: nn.Module) -> ModelSource | None:
    """How a timm model's own configuration says it was made: not all of it, so check before use."""
    config = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture") if isinstance(config, dict) else getattr(config, "architecture", None)
    if not name or not timm.is_model(str(name)):
        return None
    kwargs: dict[str, Any] = {"num_classes": model.num_classes} if hasattr(model, "num_classes") else {}
    first = config.get("first_conv") if isinstance(config, dict) else None
    with contextlib.suppress(AttributeError):
        channels = model.get_submodule(first).in_channels if isinstance(first, str) else 3
        kwargs |= {"in_chans": channels} if channels != 3 else {}
    return ModelSource("timm", str(name), kwargs)


def torchvision_sources_of(model: nn.Module) -> Iterator[ModelSource]:
    """The names under which torchvision may have made a model: those whose builders stand beside its class."""
    home = type(model).__module__
    if home.startswith("torchvision.models."):
        from torchvision import models

        for name in models.list_models():
            if models.get_model_builder(name).__module__ == home:
                yield settled(ModelSource("torchvision", name), model)


def _from_timm(source: ModelSource, pretrained: bool) -> nn.Module:
    if not source.name.startswith(HUB_PREFIXES):
        base, _, tag = source.name.partition(".")
        if not timm.is_model(base):
            raise LoadingError(_unknown(source.name, timm.list_models(), "timm model", "timm.list_models()"))
        tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{base}.*")]
        if tag and tag not in tags:
            raise LoadingError(f"timm's {base} has no weights {tag!r}; it has: {', '.join(tags) or 'none'}")
        if pretrained and not timm.is_model_pretrained(base):
            raise WeightsUnavailableError(f"timm has no published weights for {base}; {OFFLINE_HELP}")
    try:
        remote = pretrained or source.name.startswith(HUB_PREFIXES)
        with _impatient_hub() if remote else contextlib.nullcontext():
            return timm.create_model(source.name, pretrained=pretrained, **source.kwargs)
    except OSError as error:  # hub and download errors are OSErrors
        if source.name.startswith(HUB_PREFIXES):
            raise WeightsUnavailableError(
                f"{source.name} is out of reach ({_unreached(error)}), and its configuration with it; "
                "try: the timm name of its architecture, with --weights FILE or --random-init"
            ) from error
        if pretrained:
            raise _weights_unavailable(source.name, error) from error
        raise LoadingError(f"{source.name} could not be loaded: {one_line(error)}") from error
    except Exception as error:  # a constructor may raise anything about an argument that it does not expect
        raise LoadingError(f"timm could not create {source.name}: {one_line(error)}") from error


def _from_torchvision(source: ModelSource, pretrained: bool) -> nn.Module:
    from torchvision import models

    name, kwargs = source.name, dict(source.kwargs)
    if name not in models.list_models():
        known = "torchvision.models.list_models()"
        raise LoadingError(_unknown(name, models.list_models(), "torchvision model", known))
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        kwargs.setdefault("weights_backbone", None)  # or it is downloaded even where no weights are asked for
    weights = models.get_model_weights(name).DEFAULT if pretrained else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # inception_v3 and googlenet: their initialisation will change
            model = models.get_model(name, weights=weights, **kwargs)
    except OSError as error:
        raise _weights_unavailable(f"torchvision:{name}", error) from error
    except Exception as error:
        raise LoadingError(f"torchvision could not create {name}: {one_line(error)}") from error
    if not hasattr(model, "pretrained_cfg"):
        model.pretrained_cfg = _torchvision_config(name)
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
            f"{source.name!r}: {one_line(error)}; a model of your own is given as package.module:callable"
        ) from error
    except Exception as error:  # a module of the user's may raise anything
        raise LoadingError(f"{source.name!r}: importing {path} failed with {one_line(error)}") from error
    if isinstance(function, nn.Module):
        return function
    if not callable(function):
        raise LoadingError(f"{source.name} is a {type(function).__name__}, and a callable was expected")
    kwargs = {**source.kwargs, "pretrained": pretrained} if source.name == DEMO else dict(source.kwargs)
    try:
        model = function(**kwargs)
    except NormSurgeonError:
        raise
    except Exception as error:
        raise LoadingError(f"{source.name} failed with {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise LoadingError(f"{source.name} returned {type(model).__name__}; it must return an nn.Module")
    return model


def _unknown(name: str, known: list[str], what: str, listing: str) -> str:
    hint = suggest(name.partition(".")[0], known, otherwise=f"{listing} lists the names", most=4, cutoff=0.6)
    return f"unknown {what} {name!r}; {hint}"


def _weights_unavailable(name: str, error: OSError) -> WeightsUnavailableError:
    return WeightsUnavailableError(
        f"the published weights of {name} are out of reach ({_unreached(error)}); {OFFLINE_HELP}"
    )


def _unreached(error: OSError) -> str:
    """Why a download failed, in fewer words than the clients use."""
    if isinstance(error, URLError):
        return f"no connection: {error.reason}"
    if type(error).__name__ in ("LocalEntryNotFoundError", "OfflineModeIsEnabled"):
        return "no connection to the Hugging Face hub, and not in its cache"
    return one_line(error)


@contextlib.contextmanager
def _impatient_hub() -> Iterator[None]:
    """Without a name server, have the hub's client look in its cache only, and not retry for a minute."""
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
