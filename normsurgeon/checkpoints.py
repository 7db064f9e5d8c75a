"""Saving a converted model and getting it back: architecture, plans, history and weights in one file.

``.safetensors``: the tensors, and in the header one JSON text under ``normsurgeon``. ``.pt``: a dict of plain types
with ``state_dict`` and ``normsurgeon``. Reading never runs code from a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normsurgeon.architectures import ModelSource, build
from normsurgeon.errors import CheckpointError, UsageError
from normsurgeon.surgery.planning import ConversionPlan
from normsurgeon.surgery.rewriting import Conversion, convert_
from normsurgeon.weights import StateDict, fit, read_file, write_atomically, write_safetensors

FORMAT = 1
KEY = "normsurgeon"


@dataclass(frozen=True)
class Origin:
    """Where a model came from and what was done to it: kept on the model, written into its checkpoint.

    ``source`` is None for a model that was made by hand: its checkpoint then needs ``load(path, model=…)``.
    """

    source: ModelSource | None
    plans: tuple[ConversionPlan, ...] = ()
    history: tuple[Mapping[str, Any], ...] = ()
    data: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain types, the header of a checkpoint."""
        from normsurgeon.version import __version__

        return {
            "format": FORMAT,
            "version": __version__,
            "source": self.source.to_dict() if self.source else None,
            "plan": self.plans[-1].to_dict() if self.plans else None,
            "earlier_plans": [plan.to_dict() for plan in self.plans[:-1]],
            "history": [dict(event) for event in self.history],
            "data": dict(self.data) if self.data else None,
        }

    @classmethod
    def from_dict(cls, header: Mapping[str, Any], where: str) -> Origin:
        """The inverse of ``to_dict``.

        :raises CheckpointError: another format, or a damaged header.
        """
        if header.get("format") != FORMAT:
            raise CheckpointError(
                f"{where} has checkpoint format {header.get('format')!r}, and this version reads format {FORMAT}; "
                "try: pip install --upgrade normsurgeon"
            )
        try:
            source = header["source"]
            plans = [*header["earlier_plans"], *([header["plan"]] if header["plan"] else [])]
            return cls(
                source=ModelSource(**source) if source else None,
                plans=tuple(ConversionPlan.from_dict(plan) for plan in plans),
                history=tuple(header["history"]),
                data=header["data"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{where}: the header is damaged ({type(error).__name__} {error})") from error


def origin_of(model: nn.Module) -> Origin:
    """What is known of a model's origin; for a timm model made elsewhere, what its own configuration tells."""
    found = getattr(model, "_normsurgeon_origin", None)
    if isinstance(found, Origin):
        return found
    config = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture") if isinstance(config, dict) else getattr(config, "architecture", None)
    if name and type(model).__module__.startswith("timm."):
        kwargs = {"num_classes": model.num_classes} if hasattr(model, "num_classes") else {}
        return Origin(ModelSource("timm", str(name), kwargs))
    return Origin(None)


def remember(model: nn.Module, origin: Origin) -> nn.Module:
    """Note a model's origin on it. An attribute, so that it survives copies; no part of the state dict."""
    model._normsurgeon_origin = origin  # type: ignore[assignment]
    return model


def save(result: Conversion | nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a conversion (or a model) to ``path``: ``.safetensors``, or ``.pt`` / ``.pth``. Atomic.

    :raises UsageError: another file ending.
    :raises CheckpointError: when the file cannot be written; what stood there is untouched.

    >>> import normsurgeon as ns, tempfile, timm
    >>> result = ns.convert(timm.create_model("test_resnet"), to="gn")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(result, f"{folder}/gn.safetensors")
    ...     type(ns.load(path)).__name__
    'ResNet'
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise UsageError(f"{path}: the ending says the format, and must be .safetensors, .pt or .pth")
    if isinstance(result, Conversion):
        model, origin = result.model, origin_of(result.model)
        origin = Origin(
            origin.source, (*origin.plans, result.plan), (*origin.history, *result.history), origin.data
        )
    else:
        model, origin = result, origin_of(result)
    header = origin.to_dict()
    state = {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    if path.suffix == ".safetensors":
        text = json.dumps(header)
        write_atomically(path, lambda temporary: write_safetensors(temporary, state, {KEY: text}))
    else:
        write_atomically(path, lambda temporary: torch.save({"state_dict": state, KEY: header}, temporary))
    return path


def header_of(rest: Mapping[str, Any], where: str) -> Origin | None:
    """The origin in what stood beside a file's tensors, or None for a file that normsurgeon did not write."""
    header = rest.get(KEY)
    if header is None:
        return None
    if isinstance(header, str):
        try:
            header = json.loads(header)
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{where}: the header is damaged ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{where}: the header is damaged (a {type(header).__name__})")
    return Origin.from_dict(header, where)


def rebuild(
    state: StateDict, origin: Origin, where: str, model: nn.Module | None, say: Callable[[str], None]
) -> nn.Module:
    """The model of a checkpoint: make the architecture, replay the plans, load strictly.

    :raises CheckpointError: when the architecture is not known, or the tensors do not fit.
    """
    if model is None:
        if origin.source is None:
            raise CheckpointError(
                f"{where} was saved from a model made by hand, and its architecture is not in the file; "
                "try: normsurgeon.load(path, model=the BatchNorm model)"
            )
        model = build(origin.source)
    else:
        from normsurgeon.surgery.replacing import copy_model

        model, _ = copy_model(model, None)
    for plan in origin.plans:
        model = convert_(model, plan).model
    fit(model, state, where, say)
    if origin.data and not hasattr(model, "pretrained_cfg"):
        model.pretrained_cfg = dict(origin.data)
    return remember(model, origin)
