"""A weightless copy of a model, to be traced and run for shapes while the model itself stays untouched."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

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


def skeleton_of(model: nn.Module) -> nn.Module:
    """The model's modules with every parameter and buffer on the meta device, in eval mode and without hooks.

    Costs no memory for weights. Shared modules and tied tensors stay shared and tied.

    :raises TracingError: when the modules themselves cannot be copied.
    """
    memo: dict[int, Any] = {}
    keep_alive = []
    for tensor in [*model.parameters(), *model.buffers()]:
        memo[id(tensor)] = _ghost(tensor)
        keep_alive.append(tensor)
    try:
        skeleton = copy.deepcopy(model, memo)
    except Exception as error:  # whatever a foreign __deepcopy__ raises
        raise TracingError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); "
            "a module that refuses copy.deepcopy (legacy weight_norm, say) has to be made plain first"
        ) from error
    for module in skeleton.modules():
        for hooks in HOOKS:
            # Parametrizations of the old kind (weight_norm, spectral_norm) live in pre-hooks that forward needs.
            if hooks == "_forward_pre_hooks" and any(
                hasattr(hook, "compute_weight") for hook in module._forward_pre_hooks.values()
            ):
                continue
            getattr(module, hooks, {}).clear()
    return skeleton.eval()


def _ghost(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.parameter.UninitializedParameter):
        return nn.parameter.UninitializedParameter(device="meta")  # type: ignore[call-arg]
    if isinstance(tensor, nn.parameter.UninitializedBuffer):
        return nn.parameter.UninitializedBuffer(device="meta")  # type: ignore[call-arg]
    ghost = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(ghost, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else ghost


def input_shape_of(model: nn.Module, example_input: Tensor | None = None) -> tuple[int, ...] | None:
    """The shape (N, …) on which to run a model for its shapes, or None when nothing tells it.

    In order: the example, timm's ``pretrained_cfg``, the first convolution (2-D: 224 pixels a side, the ImageNet
    custom; 1-D: 256; 3-D: 32), the first linear layer. N is 2, so that a batch is told from a token dimension.
    """
    if example_input is not None:
        return tuple(example_input.shape)
    config = getattr(model, "pretrained_cfg", None)
    if config is not None:
        size = config.get("input_size") if isinstance(config, dict) else getattr(config, "input_size", None)
        if size:
            return (2, *size)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return (2, module.in_channels, 224, 224)
        if isinstance(module, nn.Conv1d):
            return (2, module.in_channels, 256)
        if isinstance(module, nn.Conv3d):
            return (2, module.in_channels, 32, 32, 32)
        if isinstance(module, nn.Linear):
            return (2, module.in_features)
    return None


def require_plain(model: nn.Module) -> None:
    """Nothing, where the model is plain Python.

    :raises ConversionError: for a scripted or compiled one, with the way out.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ConversionError("a TorchScript module cannot be rewritten: convert the Python model before scripting it")
    if hasattr(model, "_orig_mod"):
        raise ConversionError("this is a torch.compile wrapper: convert model._orig_mod, then compile the result")
