"""A record of one real call of a model: which layer's output is read by what.

Below autograd every computation passes torch's dispatcher, whatever Python control flow led to it. A dispatch mode
sees each of them with its tensors; convolutions, linear layers and batch norms are taken as a whole. So a record says
who reads a layer's output for any model that runs, traceable or not: values are tensors, and readers are operations,
layers, hooks, what the model returns and what it keeps. Looking at a shape or dtype is no operation and no reader.

The idea, one real pass instead of a symbolic one, is that of torchlens (Taylor & Kriegeskorte, 2023).
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from normsurgeon.calls import Call
from normsurgeon.graph.moves import Move, Shape, move_of
from normsurgeon.graph.skeleton import seeded, tensor_attributes, tensors_in
from normsurgeon.norms.batchnorm import is_batch_norm
from normsurgeon.norms.layers import laid_out

META_SECONDS = 3.0
"""A pass on the meta device that takes longer (torch decomposes some operations there) gives way to a real one."""

_VALUE_FREE = {
    f"aten::{name}{kind}"
    for name in ("empty", "zeros", "ones", "full", "rand", "randn", "randint")
    for kind in ("_like", "")
} | {f"aten::new_{name}" for name in ("empty", "zeros", "ones", "full", "empty_strided")}

_VALUES_TO_PYTHON = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::item")

_OUT_OF_TORCH = {"tolist", "numpy", "__array__", "__dlpack__", "data_ptr"}
"""Functions that hand values out without an operation."""


class TooSlow(Exception):
    """A pass on the meta device that takes longer than a real one would."""


@dataclass
class Value:
    """One tensor: where it came from and who reads it.

    ``layer``: the name of the layer whose output it is. ``move`` and ``source``: the dimension move that made it, and
    of what. ``label``: what made it, in words. ``readers``: each in words, with the call where it is a layer, and with
    what it made where it is a dimension move.
    """

    label: str
    shape: Shape
    layer: str | None = None
    move: Move | None = None
    source: Value | None = None
    readers: list[tuple[str, LayerCall | None, Value | None]] = field(default_factory=list)


@dataclass
class LayerCall:
    """One call of a convolution, linear layer or batch norm: its first input, its output."""

    layer: str
    given: Value | None
    given_shape: Shape | None
    made: Value | None = None


@dataclass
class Record:
    """What one call of the model did.

    how           in words: "eval mode", "training mode", "output_hidden_states=True"
    calls         of each layer, by its canonical name, in the order of the call
    read          of each layer's parameters and buffers read outside the layer: (what, by what)
    branches      lines at which Python decided by a tensor's value
    output_shapes of the tensors that the model returned
    """

    how: str
    calls: dict[str, list[LayerCall]] = field(default_factory=dict)
    read: dict[str, tuple[str, str]] = field(default_factory=dict)
    branches: list[str] = field(default_factory=list)
    output_shapes: list[Shape] = field(default_factory=list)


def record(
    model: nn.Module,
    call: Call,
    how: str = "eval mode",
    hooked: dict[str, str] | None = None,
    seconds: float = META_SECONDS,
) -> Record:
    """Run ``call`` on ``model`` (a skeleton or shadow, which is the recorder's own) and note what reads what.

    hooked  names of modules that carry a hook in the model itself, which sees their input and output

    :raises TooSlow: on the meta device, after ``seconds``.
    """
    recorder = _Recorder(model, how, hooked or {})
    on_meta = any(p.is_meta for p in itertools.chain(model.parameters(), model.buffers()))
    recorder.deadline = time.perf_counter() + seconds if on_meta else None
    place = torch.device("meta") if on_meta else nullcontext()
    # Inside the modes there must be no autograd: below it, tensors are those of the forward's own code.
    with torch.no_grad(), place, seeded(model), recorder.layers(), _Exits(recorder), recorder:
        output = call(model)
    found = list(tensors_in(output))
    recorder.note_kept("the model's output", found)
    for name, module in model.named_modules():
        recorder.note_kept(f"an attribute of {name or 'the model'}", tensor_attributes(module))
    recorder.result.output_shapes = [tuple(tensor.shape) for tensor in found]
    return recorder.result


class _Exits(TorchFunctionMode):
    """Notes what reads a tensor's values without an operation that the dispatcher sees."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _OUT_OF_TORCH:
            self.recorder.value(args[0]).readers.append((name.strip("_"), None, None))
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    def __init__(self, model: nn.Module, how: str, hooked: dict[str, str]) -> None:
        super().__init__()
        self.model, self.hooked = model, hooked
        self.result = Record(how)
        self.deadline: float | None = None
        self.values: dict[int, Value] = {}
        self.alive: list[Any] = []  # so that no id and no storage is used again
        self.storages: dict[int, list[Value]] = {}
        self.stack: list[tuple[str, nn.Module]] = []
        self.owners: dict[int, tuple[str, str]] = {}
        self.storage_owners: dict[int, tuple[str, str]] = {}
        for name, module in model.named_modules():
            if is_layer(module):
                own = {**module._parameters, **module._buffers}
                own.update((k, v) for k, v in vars(module).items() if isinstance(v, Tensor))
                for key, tensor in own.items():
                    if tensor is not None:
                        self.owners.setdefault(id(tensor), (name, key))
                        if _storage(tensor) is not None:
                            self.storage_owners.setdefault(_storage(tensor), (name, key))  # type: ignore[arg-type]

    # What the dispatcher hands over.

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run one operation and note its readers and its result."""
        kwargs = kwargs or {}
        if self.deadline is not None and time.perf_counter() > self.deadline:
            raise TooSlow("the meta device is slower than a real call")
        name = func._schema.name
        if name in _VALUES_TO_PYTHON:
            self._note_branch()
        output = func(*args, **kwargs)
        given = list(tensors_in((args, kwargs), into_objects=False))
        label = self._label(func)
        if name not in _VALUE_FREE:
            for tensor in given:
                self._note_direct(tensor, label)
        move = move_of(name, args, output)
        source = self.value(given[0]) if given and move is not None else None
        made = Value(label, tuple(output.shape), None, move, source) if isinstance(output, Tensor) else None
        if name not in _VALUE_FREE:
            for tensor in given:
                self.value(tensor).readers.append((label, None, made if move is not None else None))
        in_place = {id(tensor) for tensor in given}
        for tensor in tensors_in(output, into_objects=False):
            if id(tensor) in in_place:  # from here on it is another value
                self._add(tensor, Value(label, tuple(tensor.shape)))
            elif id(tensor) not in self.values:
                self._add(tensor, made if tensor is output and made is not None else Value(label, tuple(tensor.shape)))
        return output

    def _add(self, tensor: Tensor, value: Value) -> Value:
        self.values[id(tensor)] = value
        self.alive.append(tensor)
        storage = _storage(tensor)
        if storage is not None:
            self.storages.setdefault(storage, []).append(value)
        return value

    def value(self, tensor: Tensor) -> Value:
        """What is known of a tensor; one that no operation made is an input, a parameter, or unseen."""
        known = self.values.get(id(tensor))
        if known is None:
            label = "the model's input" if id(tensor) not in self.owners else "a parameter"
            for shared in self.storages.get(_storage(tensor) or -1, ()):
                label = "data"  # y.data: the same memory, in a tensor that no operation made
                shared.readers.append((label, None, None))
            known = Value(label, tuple(tensor.shape))
            self.values[id(tensor)] = known
            self.alive.append(tensor)
        return known

    def _note_direct(self, tensor: Tensor, label: str) -> None:
        owner = self.owners.get(id(tensor)) or self.storage_owners.get(_storage(tensor) or -1)
        if owner is not None:
            self.result.read.setdefault(owner[0], (owner[1], label))

    def _label(self, func: Any) -> str:
        name, module = self.stack[-1] if self.stack else ("", self.model)
        if name and not module._modules:
            return f"{type(module).__name__} ({name})"
        return func.overloadpacket.__name__.strip("_")

    def _note_branch(self) -> None:
        line = _line_of_the_model()
        if line is not None and line not in self.result.branches:
            self.result.branches.append(line)

    def note_kept(self, label: str, tensors: Any) -> None:
        """The tensors that are left over when the pass is done are read by whoever looks at them later."""
        for tensor in tensors:
            if id(tensor) in self.values or _storage(tensor) in self.storages:
                self.value(tensor).readers.append((label, None, None))

    # The layers, taken as a whole, and the names of the modules around the operations.

    @contextmanager
    def layers(self) -> Iterator[None]:
        """While inside, each layer's ``forward`` is one step of the record, and each other module's a place in it."""
        patched = []
        try:
            for name, module in self.model.named_modules():
                if not isinstance(module, torch.jit.ScriptModule):
                    whole = is_layer(module) or isinstance(module, nn.RNNBase)
                    patched.append((module, module.__dict__.get("forward")))
                    module.forward = (self._as_a_whole if whole else self._around)(name, module, module.forward)
            yield
        finally:
            for module, before in patched:
                module.__dict__.pop("forward", None)
                if before is not None:
                    module.forward = before

    def _around(self, name: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.stack.append((name, module))
            self._note_hook(name, args)
            try:
                output = forward(*args, **kwargs)
            finally:
                self.stack.pop()
            self._note_hook(name, output)
            return output

        return run

    def _note_hook(self, name: str, tensors: Any) -> None:
        if name in self.hooked:
            for tensor in tensors_in(tensors):
                self.value(tensor).readers.append((self.hooked[name], None, None))

    def _as_a_whole(self, name: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        on_meta = self.deadline is not None

        def run(*args: Any, **kwargs: Any) -> Any:
            tensors = list(tensors_in((args, kwargs), into_objects=False))
            known = [self.value(tensor) for tensor in tensors]
            first = known[0] if known else None
            call = LayerCall(name, first, tuple(tensors[0].shape) if tensors else None)
            for value in known:
                value.readers.append((name, call, None))
            with _disable_current_modes(), torch.device("meta") if on_meta else nullcontext():
                if on_meta and is_batch_norm(module) and tensors:
                    output: Any = laid_out(torch.empty_like(tensors[0]))  # torch is slow there
                elif on_meta and isinstance(module, nn.RNNBase) and len(tensors) == 1:
                    output = _recurrent_shapes(module, tensors[0])
                else:
                    output = forward(*args, **kwargs)
            hook = self.hooked.get(name)
            for value in known if hook is not None else ():
                value.readers.append((hook, None, None))  # type: ignore[arg-type]
            for tensor in tensors_in(output, into_objects=False):
                whole = is_layer(module) and not any(tensor is each for each in tensors)  # not in place
                label = name if is_layer(module) else f"{type(module).__name__} ({name})"
                made = self._add(tensor, Value(label, tuple(tensor.shape), name if whole else None))
                if whole:
                    call.made = made
                if hook is not None:
                    made.readers.append((hook, None, None))
            self.result.calls.setdefault(name, []).append(call)
            return output

        return run


def is_layer(module: nn.Module) -> bool:
    """Whether a record takes the module as a whole: convolutions, linear layers and batch norms."""
    return isinstance(module, (_ConvNd, nn.Linear)) or is_batch_norm(module)


def _storage(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # sparse, functional or quantized tensors have none
        return None


def _recurrent_shapes(module: nn.RNNBase, x: Tensor) -> Any:
    """What an RNN, LSTM or GRU gives, as far as shapes go; on the meta device torch runs it step by step."""
    directions = 2 if module.bidirectional else 1
    size = module.proj_size or module.hidden_size
    batch = [] if x.ndim == 2 else [x.shape[0] if module.batch_first else x.shape[1]]
    hidden = x.new_empty(module.num_layers * directions, *batch, size)
    output = x.new_empty(*x.shape[:-1], size * directions)
    if isinstance(module, nn.LSTM):
        return output, (hidden, x.new_empty(module.num_layers * directions, *batch, module.hidden_size))
    return output, hidden


_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))


def is_own_line(path: str) -> bool:
    """Whether a source file is a model's and neither torch's nor this package's."""
    return not path.startswith((_OWN, _TORCH, "<"))


def _line_of_the_model() -> str | None:
    """The line of the model's own code that runs now, as ``file.py:12``."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if is_own_line(path):
            return f"{os.path.basename(path)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return None
