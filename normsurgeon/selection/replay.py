"""Runs of a network that begin in its middle: what comes before a cut is remembered from an earlier run.

Where two networks differ in one layer, all that is finished before that layer's first call is the same in both. So a
module whose call had ended by then hands out what it gave before and does not compute. This needs no graph: the order
of the calls is that of one real run, and code between modules simply runs again. Modules that are finished as a whole
stand for all that is inside them, so that little has to be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from normsurgeon.calls import Call, outputs_of
from normsurgeon.graph.skeleton import tensors_in


class NotRepeatableError(Exception):
    """The network calls other modules, or in another order, than in the run that is remembered."""


class _Reached(BaseException):
    """Ends a run at the cut; no handler in a foreign forward may catch it."""


@dataclass
class _Span:
    """One call of a module, numbered by when it began; ``end`` is the number of the next call that began after it."""

    module: nn.Module
    end: int


@dataclass
class Replay:
    """A network whose runs on one batch can begin at a cut, the first call of a module.

    Owns the ``forward`` of every module of ``model`` while inside ``replaying``. Use: ``record`` once for a batch, then
    ``advance`` to cut after cut in the order of the calls, and ``run`` as often as wanted at each.

    changed  numbers of calls whose output other code overwrites in place: those are handed out as copies. Found by
             ``find_changed``, and the same for every batch.
    """

    model: nn.Module
    changed: set[int] = field(default_factory=set)
    _inputs: Any = None
    _spans: list[_Span] = field(default_factory=list)
    _first: dict[nn.Module, int] = field(default_factory=dict)
    _known: dict[int, Any] = field(default_factory=dict)
    _cut: int = 0
    _cursor: int = 0
    _mode: str = "off"
    _target: int | None = None
    _watched: list[tuple[int, Tensor, int]] | None = None

    def record(self, inputs: Tensor | Call) -> Any:
        """The output for a batch, and with it the order of the calls."""
        self._inputs, self._spans, self._first, self._known, self._cut = inputs, [], {}, {}, 0
        return self._call("record")

    def first_call(self, module: nn.Module) -> int | None:
        """The number of the first call of a module in the run that was recorded; None where there was none."""
        return self._first.get(module)

    def share_before(self, cut: int) -> float:
        """How much of the calls end before a cut."""
        return cut / max(1, len(self._spans))

    def advance(self, cut: int) -> None:
        """Move to a later cut: compute what lies between it and the one before.

        :raises NotRepeatableError: when the calls come in another order than recorded.
        """
        try:
            self._call("advance", cut)
        except _Reached:
            pass
        else:
            raise NotRepeatableError("the call at the cut was not reached")
        self._cut = cut
        parents = [k for k in self._known if self._spans[k].end <= cut]
        inside: set[int] = set()
        for k in sorted(parents):
            if k not in inside:
                inside.update(range(k + 1, self._spans[k].end))
        for k in inside & self._known.keys():
            del self._known[k]

    def run(self) -> Any:
        """The output of the network as it is now, beginning at the cut.

        :raises NotRepeatableError: when the calls before the cut come in another order than recorded.
        """
        return self._call("run")

    def run_whole(self) -> Any:
        """The output of the network as it is now, from its beginning."""
        return self._call("off")

    def find_changed(self, cut: int) -> Any:
        """As ``advance`` and ``run``; notes which outputs are overwritten in place on the way and behind the cut."""
        self._watched = []
        try:
            self.advance(cut)
            output = self.run()
            self.changed.update(k for k, tensor, version in self._watched if tensor._version != version)
        finally:
            self._watched = None
        return output

    def _call(self, mode: str, cut: int | None = None) -> Any:
        self._mode, self._cursor = mode, 0
        self._target = cut
        try:
            return outputs_of(self.model, self._inputs)
        finally:
            self._mode = "off"

    def _on_call(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._mode == "off" or (self._mode == "run" and self._cursor > self._cut):
            return forward(*args, **kwargs)  # behind the cut all is computed, in whatever order
        k = self._cursor
        self._cursor += 1
        if self._mode == "record":
            self._spans.append(_Span(module, 0))
            self._first.setdefault(module, k)
            output = forward(*args, **kwargs)
            self._spans[k].end = self._cursor
            return output
        if k >= len(self._spans) or self._spans[k].module is not module:
            raise NotRepeatableError(f"call {k} is of another module")
        end = self._spans[k].end
        if k in self._known:
            self._cursor = end
            return self._handed_out(k, self._known[k])
        if self._mode == "advance":
            assert self._target is not None
            if k == self._target:
                raise _Reached
            output = forward(*args, **kwargs)
            if end <= self._target:
                self._known[k] = self._kept(k, output)
            return output
        return forward(*args, **kwargs)

    def _handed_out(self, k: int, value: Any) -> Any:
        """What is remembered; a copy, where later code changes it."""
        if self._watched is None and k not in self.changed:
            return value
        copy = _cloned(value)
        self._watch(k, copy)
        return copy

    def _kept(self, k: int, output: Any) -> Any:
        """What to remember of an output; a copy, where later code changes it."""
        if self._watched is None and k not in self.changed:
            return output
        self._watch(k, output)
        return _cloned(output)

    def _watch(self, k: int, value: Any) -> None:
        if self._watched is not None:
            self._watched += [(k, tensor, tensor._version) for tensor in tensors_in(value)]


def _cloned(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


@contextmanager
def replaying(model: nn.Module, changed: set[int] | None = None) -> Iterator[Replay]:
    """A ``Replay`` of ``model``; its modules' own ``forward`` are back afterwards."""
    replay = Replay(model, set() if changed is None else changed)
    own: dict[nn.Module, Any] = {}

    def wrapped(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: replay._on_call(module, forward, args, kwargs)

    for module in model.modules():
        if module is not model and not isinstance(module, nn.ModuleList | nn.ModuleDict | torch.jit.ScriptModule):
            own[module] = module.__dict__.get("forward")
            module.forward = wrapped(module, module.forward)
    try:
        yield replay
    finally:
        for module, forward in own.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward
