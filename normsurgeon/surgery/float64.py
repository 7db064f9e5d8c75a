"""Running a model of any precision in float64, its weights scaled or not, without a copy of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_NARROWING = {Tensor.float, Tensor.half, Tensor.bfloat16}
_LEAVES = (Tensor, int, float, str, type(None), torch.dtype)


class Float64(TorchFunctionMode):
    """While inside, every torch function computes in float64: its floating-point arguments are widened, call by call.

    Weights are widened when they are used and forgotten again. Code that asks for a tensor's dtype gets float64, and
    what it asks to be made narrower is not. In-place operations keep their tensor's own precision.

    factors  what to multiply a tensor by wherever it is read, by the tensor's ``id``
    wide     False leaves precision as it is: then only the ``factors`` are seen
    """

    def __init__(self, factors: Mapping[int, Tensor] | None = None, wide: bool = True) -> None:
        super().__init__()
        self.factors, self.wide = factors or {}, wide

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """One call, widened."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            found = func(*args, **kwargs)
            if isinstance(found, Tensor) and id(args[0]) in self.factors:  # weight.data, weight.T
                return func(self._read(args[0]), *args[1:], **kwargs)
            return torch.float64 if self.wide and isinstance(found, torch.dtype) and found in _NARROW else found
        if self.wide and func in _NARROWING:
            func, args = Tensor.double, args[:1]
        in_place = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "set_")
        first = args[:1] if in_place else ()
        given = [self._read_all(each) for each in args[len(first) :]]
        output = func(*first, *given, **{key: self._read_all(each) for key, each in kwargs.items()})
        return output if in_place or not self.wide else self._read_all(output)

    def _read_all(self, value: Any) -> Any:
        """An argument with all that it holds; most hold nothing, and ``tree_map`` is slow."""
        return self._read(value) if isinstance(value, _LEAVES) else tree_map(self._read, value)

    def _read(self, value: Any) -> Any:
        """An argument as the function is to see it."""
        if isinstance(value, Tensor):
            read = value.double() if self.wide and value.dtype in _NARROW else value
            factors = self.factors.get(id(value))
            if factors is None:
                return read
            factors = factors.to(read.device, read.dtype)
            return read * factors if read is value else read.mul_(factors)
        return torch.float64 if self.wide and isinstance(value, torch.dtype) and value in _NARROW else value
