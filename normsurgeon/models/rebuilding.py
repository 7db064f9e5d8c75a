"""From a checkpoint to a model. A file never chooses code, other files, the network, or more memory than it holds.

What the file names is first made on the meta device, where tensors have shapes and no memory, and compared with the
file's tensors. Only what fits is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from pydantic import ValidationError
from torch import Tensor, fx, nn

from normsurgeon._util.one_line import one_line
from normsurgeon.errors import CheckpointError, LoadingError
from normsurgeon.graph.skeleton import tensor_attributes
from normsurgeon.models.described import shown_arguments
from normsurgeon.models.file_checks import size_of
from normsurgeon.models.header_schema import ArgumentsSchema
from normsurgeon.models.origin import Origin, attach_origin
from normsurgeon.models.registry import DEMO, HUB_PREFIXES, ModelSource, build
from normsurgeon.models.state_dict import StateDict, fit_state_dict, restore_, versions_of
from normsurgeon.printable import one_short_line
from normsurgeon.surgery.convert import convert_

WIDEST = 4
"""Bytes that a model may take for each byte of the file: float32 layers are also stored in 8 bits."""

SMALL = 2**26
"""Bytes that it may take in any case."""


def source_in(origin: Origin, where: str) -> ModelSource:
    """The architecture that a checkpoint names, where a file may name it.

    :raises CheckpointError: when the file does not say, or names code, an address, or arguments that only a person may
        give.
    """
    source = origin.source
    if source is None:
        raise CheckpointError(
            f"{where} was saved from a model made by hand, and its architecture is not in the file; "
            "try: normsurgeon.load(path, model=the BatchNorm model)"
        )
    refused = why_refused(source)
    if refused is not None:
        name = one_short_line(source.name, 60)
        raise CheckpointError(
            f"{where} was made from {name}, {refused}; "
            f"try: {name} --weights FILE (in Python: load({name!r}, weights=path))"
        )
    return source


def why_refused(source: ModelSource) -> str | None:
    """Why a file must not decide that this source is built; None where it may."""
    if source.name == DEMO and source.kind == "callable" and not source.kwargs:
        return None
    if source.kind == "callable":
        return "which is code, and a file does not decide what code runs"
    if source.name.startswith(HUB_PREFIXES) or not source.name.replace(".", "_").isidentifier():
        return "which is an address, and a file does not decide what is fetched"
    try:
        ArgumentsSchema.model_validate({k: tuple(v) if isinstance(v, list) else v for k, v in source.kwargs.items()})
    except ValidationError as error:
        argument = one_short_line(str(error.errors(include_url=False, include_input=False)[0]["loc"][0]), 40)
        return f"and with {argument} as a file may not decide it"
    return None


def skeleton(source: ModelSource, origin: Origin) -> nn.Module:
    """The network that a source and the plans give, on the meta device: shapes, and no memory.

    :raises LoadingError: an architecture that cannot be made.
    :raises ConversionError: when the plans were made for another architecture.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                model = build(source)
        except LoadingError:  # a constructor that computes with tensors, as torchvision's RegNet; or a wrong argument
            from accelerate import init_empty_weights

            with init_empty_weights():  # each weight is given up before it is written to; buffers are a layer's width
                model = build(source)
        with torch.device("meta"):
            return replayed(model, origin)


def replayed(model: nn.Module, origin: Origin) -> nn.Module:
    """The structure that a checkpoint's plans give, without values; changes ``model``."""
    for plan in origin.plans:
        model = convert_(model, plan, values=False).model
    # A file from before 2026-11-26 names eps only where a plan softens: then its norms have the original's.
    before = {d.name: d.site.eps for plan in origin.plans for d in plan.decisions if d.status == "converted"}
    known = origin.eps or before
    for name, module in model.named_modules():
        if name in known and isinstance(getattr(module, "eps", None), float):
            module.eps = known[name]
    return model


def rebuilt(
    source: ModelSource,
    state: StateDict,
    origin: Origin,
    where: str,
    on_message: Callable[[str], None],
    prefix: str | None = None,
    read_arguments: bool = False,
) -> nn.Module:
    """The model of a timm or torchvision source with a checkpoint's plans and tensors.

    prefix          of several networks in the file, the one to take
    read_arguments  make it with as many classes and channels as the tensors have, where the source does not say

    :raises CheckpointError: when the tensors do not fit; before any memory is taken for the model.
    :raises LoadingError: an architecture that cannot be made.
    :raises ConversionError: when the plans were made for another architecture.
    """
    bare = skeleton(source, origin)
    shown = shown_arguments(source, bare, state, where, prefix) if read_arguments else {}
    if shown:
        source = replace(source, kwargs={**source.kwargs, **shown})
        origin = replace(origin, source=source)
        bare = skeleton(source, origin)
    fitting = fit_state_dict(bare, state, where, on_message, prefix)
    shapes = [tensor for tensor in bare.state_dict().values() if isinstance(tensor, Tensor)]
    needed, held = sum(t.numel() * t.element_size() for t in shapes), size_of(state)
    if needed > WIDEST * held + SMALL:
        raise CheckpointError(
            f"{where} does not fit {type(bare).__name__}: its tensors share {held} bytes, and {needed} would be needed"
        )
    # Random weights would be drawn for nothing, and take three times as long as reading the file.
    model = bare.to_empty(device="cpu") if _is_whole(bare) else replayed(build(source), origin)
    return _loaded(model, fitting, origin, where)


def rebuild(
    state: StateDict,
    origin: Origin,
    where: str,
    model: nn.Module,
    on_message: Callable[[str], None],
    prefix: str | None = None,
) -> nn.Module:
    """Replay a checkpoint's plans on ``model``, in place, and load strictly.

    :raises CheckpointError: when the tensors do not fit.
    :raises ConversionError: when the plans were made for another architecture.
    """
    model = replayed(model, origin)
    return _loaded(model, fit_state_dict(model, state, where, on_message, prefix), origin, where)


def _is_whole(model: nn.Module) -> bool:
    """Whether the state dict alone makes a model on the meta device whole: it computes no tensor, and shares none."""
    kept = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    own = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return (
        not isinstance(model, fx.GraphModule)
        and all(id(tensor) in kept and tensor.is_meta for _, tensor in own)
        and len({id(tensor) for _, tensor in own}) == len(own)
        and not any(True for module in model.modules() for _ in tensor_attributes(module))
    )


def _loaded(model: nn.Module, fitting: Mapping[str, Tensor], origin: Origin, where: str) -> nn.Module:
    # A counter that the file lacks is the skeleton's, which has no value: nothing was counted.
    whole = {key: torch.zeros(t.shape, dtype=t.dtype) if t.is_meta else t for key, t in fitting.items()}
    try:
        restore_(model, {**model.state_dict(), **whole}, versions_of(fitting))
    except Exception as error:  # of a type that torch does not cast, or with hooks of the model's own
        raise CheckpointError(f"{where} does not fit {type(model).__name__}: {one_line(error)}") from error
    if origin.data:
        model.pretrained_cfg = dict(origin.data)  # type: ignore[assignment]
    return attach_origin(model, origin).eval()
