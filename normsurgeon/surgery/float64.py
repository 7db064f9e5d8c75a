"""Running a model of any precision in float64, without a copy of its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_NARROWING = {Tensor.float, Tensor.half, Tensor.bfloat16}


class Float64(TorchFunctionMode):
    """While inside, every torch function computes in float64: its floating-point arguments are widened, call by call.

    Weights are widened when they are used and forgotten again. Code that asks for a tensor's dtype is told float64, and
    what it asks to be made narrower is not. In-place operations keep their tensor's own precision.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """One call, widened."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            found = func(*args, **kwargs)
            return torch.float64 if isinstance(found, torch.dtype) and found in _NARROW else found
        if func in _NARROWING:
            func, args = Tensor.double, args[:1]
        in_place = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "set_")
        first = args[:1] if in_place else ()
        output = func(*first, *tree_map(_wide, args[len(first) :]), **tree_map(_wide, kwargs))
        return output if in_place else tree_map(_wide, output)


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype in _NARROW else value
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value
