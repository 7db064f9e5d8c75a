"""Whether the layer that feeds a batch norm can absorb a per-channel scale and shift, and if not, why.

It can when it is a convolution or linear layer, called once, whose parameters are its own and whose output nothing
but the batch norm reads.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from timm.layers import CondConv2d, Conv2dSame
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from normsurgeon.graph.tracing import TracedModel, reads_only_shape

_KNOWN_FORWARDS = {
    cls.forward
    for cls in (
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
        nn.Linear,
        Conv2dSame,
    )
}
_FORWARD_VERDICTS: dict[tuple[Any, ...], bool] = {}


@dataclass(frozen=True)
class Producer:
    """The layer before a batch norm: its path and class, and why it can't absorb a scale and shift (None: it can)."""

    name: str | None
    class_name: str | None
    reason: str | None

    @property
    def foldable(self) -> bool:
        """Whether a per-channel scale and shift of its output can go into its parameters."""
        return self.reason is None


class ProducerFinder:
    """Answers for every batch norm of one traced model; the facts about shared tensors are gathered once."""

    def __init__(self, traced: TracedModel, canonical: dict[int, str]) -> None:
        self.traced = traced
        self.canonical = canonical
        self.owners: dict[int, set[str]] = {}
        for name, tensor in traced.skeleton.named_parameters(remove_duplicate=False):
            owner = traced.skeleton.get_submodule(name.rpartition(".")[0])
            self.owners.setdefault(id(tensor), set()).add(canonical.get(id(owner), name))
        self.node_calls: dict[str, int] = {}
        self.read_directly: set[int] = set()
        for path, graph in traced.graphs.items():
            for node in graph.nodes:
                if node.op == "call_module":
                    name = self.name_of(path, node)
                    self.node_calls[name] = self.node_calls.get(name, 0) + 1
                elif node.op == "get_attr":
                    self.read_directly.add(id(attrgetter(str(node.target))(self._root(path))))

    def _root(self, path: str) -> nn.Module:
        return self.traced.skeleton.get_submodule(path)

    def name_of(self, path: str, node: fx.Node) -> str:
        """The module path, within the whole model, that a ``call_module`` node of the graph at ``path`` calls."""
        return self.canonical[id(self._module(path, node))]

    def find(self, path: str, norm: fx.Node, rank: int | None) -> Producer:
        """The producer of the batch norm called by ``norm`` in the graph at ``path``; its input has ``rank`` dims."""
        given = norm.args[0] if norm.args else norm.kwargs.get("input")
        if not isinstance(given, fx.Node):
            return Producer(None, None, "its input is a constant")
        source, reader = given, norm
        moved: list[tuple[Any, ...]] = []
        while True:
            others = [user for user in source.users if user is not reader and not reads_only_shape(user, source)]
            if others:
                who = f"{self.describe(path, source)}'s output" if source.op == "call_module" else "its input"
                return replace(
                    self._named(path, source), reason=f"{who} is also read by {self.describe(path, others[0])}"
                )
            step = self._channel_move(path, source)
            before = source.args[0] if source.args else None
            if step is None or not isinstance(before, fx.Node):
                break
            moved.append(step)
            reader, source = source, before
        if source.op != "call_module":
            return Producer(None, None, f"follows {self.describe(path, source)}")
        found = self._named(path, source)
        module = self._module(path, source)
        reason = self._why_not(module, found.name or "") or _why_misaligned(module, moved, rank)
        return replace(found, reason=reason)

    def _module(self, path: str, node: fx.Node) -> nn.Module:
        return self._root(path).get_submodule(str(node.target))

    def _named(self, path: str, node: fx.Node) -> Producer:
        if node.op != "call_module":
            return Producer(None, None, None)
        module = self._module(path, node)
        return Producer(self.name_of(path, node), type(module).__name__, None)

    def _why_not(self, module: nn.Module, name: str) -> str | None:
        if not isinstance(module, (_ConvNd, nn.Linear)):
            if isinstance(module, CondConv2d):
                return f"{name} mixes its experts by weights that do not sum to 1 (CondConv2d)"
            return f"follows {type(module).__name__} ({name})"
        if parametrize.is_parametrized(module):
            return f"{name} is parametrized"
        if "weight" not in module._parameters:
            return f"{name}'s weight is computed on the fly"
        if not scales_with_its_weight(module):
            return f"{name} rescales its own weight ({type(module).__name__})"
        calls = max(self.node_calls.get(name, 0), self.traced.calls.get(name, 0))
        if calls > 1:
            return f"{name} is called {calls} times"
        for tensor in module._parameters.values():
            if tensor is not None and len(self.owners[id(tensor)]) > 1:
                other = sorted(self.owners[id(tensor)] - {name})[0]
                return f"{name} shares its parameters with {other}"
            if id(tensor) in self.read_directly:
                return f"{name}'s parameters are also read directly"
        return None

    def _channel_move(self, path: str, node: fx.Node) -> tuple[Any, ...] | None:
        """A step that only moves dimensions about, as (kind, *numbers), or None for anything else."""
        if not node.args or not isinstance(node.args[0], fx.Node):
            return None
        rest = node.args[1:]
        if node.op == "call_module":
            module = self._module(path, node)
            return ("same",) if type(module) is nn.Identity else None
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        if name == "contiguous":
            return ("same",)
        if name in ("transpose", "permute", "flatten") and all(isinstance(a, int) for a in rest):
            options = [node.kwargs[k] for k in ("dim0", "dim1", "start_dim", "end_dim") if k in node.kwargs]
            return (name, *rest, *options)
        return None

    def describe(self, path: str, node: fx.Node) -> str:
        """A node of the graph at ``path`` in the words of an explanation."""
        if node.op == "call_module":
            return self.name_of(path, node)
        if node.op == "placeholder":
            return "the model's input" if not path else f"the input of {path}"
        return getattr(node.target, "__name__", str(node.target)).strip("_")


def scales_with_its_weight(module: nn.Module) -> bool:
    """Whether doubling a layer's weight and bias doubles its output.

    True for plain convolutions and linear layers; a weight-standardised one fails. Unknown classes are put to the
    test on a small random copy, once for each class.
    """
    if type(module).forward in _KNOWN_FORWARDS and type(module) not in _FORWARD_VERDICTS:
        conv_forward = getattr(type(module), "_conv_forward", None)
        if conv_forward in (None, nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward):
            return True
    key = (type(module), getattr(module, "padding_mode", None))
    if key not in _FORWARD_VERDICTS:
        _FORWARD_VERDICTS[key] = _doubles(module)
    return _FORWARD_VERDICTS[key]


def _doubles(module: nn.Module) -> bool:
    try:
        probe = copy.deepcopy(module).to_empty(device="cpu").double().eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad(), torch.device("cpu"):
            for tensor in [*probe.parameters(), *probe.buffers()]:
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) - 0.3)
            if isinstance(probe, nn.Linear):
                shape: tuple[int, ...] = (2, probe.in_features)
            else:
                assert isinstance(probe, _ConvNd)
                side = max(8, *(d * (k - 1) + 2 for d, k in zip(probe.dilation, probe.kernel_size, strict=True)))
                shape = (1, probe.in_channels, *[side] * len(probe.kernel_size))
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            before = probe(x)
            for own in (probe.weight, probe.bias):
                if own is not None:
                    own.mul_(2)
            return torch.allclose(probe(x), 2 * before, rtol=1e-9, atol=1e-9)
    except Exception:  # a foreign forward may raise anything; then nothing is proven
        return False


def _why_misaligned(module: nn.Module, moved: list[tuple[Any, ...]], rank: int | None) -> str | None:
    """Check that the producer's output channels arrive in dimension 1 of the batch norm's input.

    ``moved`` lists the dimension moves from the norm backwards; they are undone from there.
    """
    if isinstance(module, (_ConvNd, _ConvTransposeNd)) and not moved:
        return None
    if rank is None:
        return None if isinstance(module, _ConvNd) and all(m == ("same",) for m in moved) else "its rank is unknown"
    dims = rank + sum(m[0] == "flatten" and m[1:] == (0, 1) for m in moved)
    axis = dims - 1 if isinstance(module, nn.Linear) else 1
    for kind, *numbers in reversed(moved):
        if kind == "transpose":
            first, second = (n % dims for n in numbers)
            axis = {first: second, second: first}.get(axis, axis)
        elif kind == "permute":
            axis = [n % dims for n in numbers].index(axis)
        elif kind == "flatten" and numbers == [0, 1]:
            if axis < 2:
                return "its channels are flattened away before the norm"
            axis, dims = axis - 1, dims - 1
        elif kind == "flatten" and not (numbers and numbers[0] > axis):
            return "its channels are flattened away before the norm"
    return None if axis == 1 else "its channels are not the norm's channels"
