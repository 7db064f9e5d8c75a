"""Copies of a model that can be run without touching it: a weightless one, and one around its own weights."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normsurgeon._util.one_line import one_line
from normsurgeon.errors import ConversionError, TracingError

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)

_PLAIN = (str, bytes, int, float, bool, nn.Module, type, type(None))
"""What holds no tensor, or (a module) is gone through by itself."""


def skeleton_of(model: nn.Module) -> nn.Module:
    """The model's modules with every tensor on the meta device, in eval mode and without hooks.

    Costs no memory for weights. Shared modules and tied tensors stay shared and tied.

    :raises TracingError: when the modules themselves cannot be copied.
    """
    return _copy_around(model, _ghost)


def shadow_of(model: nn.Module) -> nn.Module:
    """The model's modules around the model's own parameters, in eval mode and without hooks.

    Runs like the model and costs memory for the buffers alone: those are copies, since a forward pass may change them.

    :raises TracingError: when the modules themselves cannot be copied.
    """

    def replaced(tensor: Tensor) -> Tensor:
        if nn.parameter.is_lazy(tensor):
            return _ghost(tensor)  # a forward pass would make the model's own
        return tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone()

    return _copy_around(model, replaced)


def why_valueless(model: nn.Module) -> str | None:
    """Why a model cannot be run for its values: on the meta device, or with lazy layers, it has none."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if nn.parameter.is_lazy(tensor):
            return "it has lazy layers: run it once on an example first"
        if tensor.is_meta:
            return "its weights are on the meta device"
    return None


@contextmanager
def seeded(model: nn.Module) -> Iterator[None]:
    """Always the same random numbers inside, and the caller's random state as it was afterwards."""
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()] if tensor.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        torch.manual_seed(0)
        yield


def _copy_around(model: nn.Module, replaced: Any) -> nn.Module:
    memo: dict[int, Any] = {}
    keep_alive = []
    for tensor in [*model.parameters(), *model.buffers(), *(t for m in model.modules() for t in tensor_attributes(m))]:
        if id(tensor) not in memo:
            memo[id(tensor)] = replaced(tensor)
            keep_alive.append(tensor)
    copied = deepcopy_module(model, memo)
    for module in copied.modules():
        for hooks in HOOKS:
            # Parametrizations of the old kind (weight_norm, spectral_norm) live in pre-hooks that forward needs.
            if hooks == "_forward_pre_hooks" and any(
                hasattr(hook, "compute_weight") for hook in module._forward_pre_hooks.values()
            ):
                continue
            getattr(module, hooks, {}).clear()
        if isinstance(module, nn.DataParallel):
            module.device_ids = []  # it would call copies, in threads
    return copied.eval()


def deepcopy_module(model: Any, memo: dict[int, Any] | None = None) -> Any:
    """``copy.deepcopy`` that also copies modules which keep a tensor of an earlier graph (detached).

    :raises TracingError: when something in the modules cannot be copied.
    """
    memo = {} if memo is None else memo
    parts = model if isinstance(model, tuple) else (model,)
    keep_alive = []
    for module in [m for part in parts if isinstance(part, nn.Module) for m in part.modules()]:
        # deepcopy takes a long way round for an OrderedDict, and a module holds ten of them.
        memo.update((id(value), type(value)()) for value in vars(module).values() if _is_empty(value))
        for tensor in tensor_attributes(module):
            if tensor.grad_fn is not None and id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone()
                keep_alive.append(tensor)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever a foreign __deepcopy__ raises
        name = type(parts[0]).__name__
        raise TracingError(
            f"{name} cannot be copied ({one_line(error)}); "
            "a module that refuses copy.deepcopy (legacy weight_norm, say) has to be made plain first"
        ) from error


def tensor_attributes(module: nn.Module) -> Iterator[Tensor]:
    """The tensors in a module's plain attributes (no parameters, no buffers), also those in containers."""
    for name, value in vars(module).items():
        if (
            not isinstance(value, _PLAIN)
            and not _is_empty(value)
            and name not in ("_parameters", "_buffers", "_modules")
        ):
            yield from tensors_in(value, into_objects=False)


def _is_empty(value: Any) -> bool:
    """Whether it is an empty container of a built-in type: of the dozen that a module holds for hooks, most are."""
    return type(value) in (OrderedDict, dict, list, set) and not value


def tensors_in(value: Any, into_objects: bool = True) -> Iterator[Tensor]:
    """Every tensor in a nest of containers and, with ``into_objects``, of objects' attributes (modules excepted)."""
    pending, seen = [value], set()
    while pending:
        each = pending.pop()
        if isinstance(each, Tensor):
            yield each
            continue
        if isinstance(each, _PLAIN) or id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Mapping):
            pending.extend(reversed(list(each.values())))
        elif isinstance(each, (tuple, list, set, frozenset)):
            pending.extend(reversed(list(each)))
        elif into_objects and hasattr(each, "__dict__"):
            pending.extend(reversed(list(vars(each).values())))


def _ghost(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.parameter.UninitializedParameter):
        return nn.parameter.UninitializedParameter(device="meta")  # type: ignore[call-arg]
    if isinstance(tensor, nn.parameter.UninitializedBuffer):
        return nn.parameter.UninitializedBuffer(device="meta")  # type: ignore[call-arg]
    ghost = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(ghost, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else ghost


_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


def require_plain(model: Any) -> None:
    """Nothing, where the model is a plain Python module.

    :raises ConversionError: for anything else (a name, a scripted, compiled or exported model, a module that is wrapped
        for several processes), with the way out.
    """
    if isinstance(model, str):
        raise ConversionError(f"{model!r} is a name, not a module: convert normsurgeon.load({model!r})")
    if type(model).__name__ == "ExportedProgram":
        raise ConversionError("an ExportedProgram cannot be rewritten: convert the module before exporting it")
    if not isinstance(model, nn.Module):
        raise ConversionError(f"{type(model).__name__} is not a torch.nn.Module: hand over the network itself")
    if isinstance(model, torch.jit.ScriptModule):
        raise ConversionError("a TorchScript module cannot be rewritten: convert the Python model before scripting it")
    if hasattr(model, "_orig_mod"):
        raise ConversionError("this is a torch.compile wrapper: convert model._orig_mod, then compile the result")
    for name, module in model.named_modules():
        wrapper = next((c.__name__ for c in type(module).__mro__ if c.__name__ in _WRAPPERS), None)
        if wrapper is not None:
            where = f"{name} is wrapped in" if name else "this is a"
            raise ConversionError(f"{where} {wrapper}: convert the module inside, then wrap it")
