"""Following a network's data flow without changing it.

Two roads. torch.fx traces the skeleton symbolically, with timm's own leaf modules and autowrapped functions; what it
cannot trace, and leaves that hide a batch norm, are traced once more on their own. And one real call of the model is
recorded for each way of calling it (``following``). Who reads what is taken from the records, which every model that
runs has; from the graphs where no call is possible (docs/decisions.md 11).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from normsurgeon._util.one_line import one_line
from normsurgeon.calls import as_call
from normsurgeon.graph.following import Followed, filled, follow
from normsurgeon.graph.moves import Shape
from normsurgeon.graph.recording import Record
from normsurgeon.graph.skeleton import skeleton_of
from normsurgeon.norms.batchnorm import is_batch_norm
from normsurgeon.norms.layers import ChannelAffine, DropAct, LayerNormC, RmsNormC, RmsNormChw

OWN_LAYERS = (ChannelAffine, DropAct, LayerNormC, RmsNormC, RmsNormChw)


@dataclass(frozen=True)
class TracedModel:
    """What tracing found. ``graphs`` maps a module path ("" for the model) to the graph traced from it.

    ``model`` is the model itself, ``skeleton`` its weightless copy. ``untraced`` maps the path of each module that fx
    could not follow to the reason. ``followed`` holds the records. ``functional_shapes`` are the input's and output's
    shape of each functional batch norm, by its node's name.
    """

    model: nn.Module
    skeleton: nn.Module
    graphs: dict[str, fx.Graph]
    untraced: dict[str, str]
    followed: Followed
    functional_shapes: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)

    @property
    def traced_by(self) -> Literal["fx", "run", "modules"]:
        """The best that is known: the whole model's graph, a recorded call, or the module tree alone."""
        if "" in self.graphs:
            return "fx"
        return "run" if self.followed.records else "modules"

    @property
    def base(self) -> Record | None:
        """The record of the base call, or None."""
        return self.followed.records[0] if self.followed.records else None

    @property
    def input_shape(self) -> Shape | None:
        """The shape of the tensor that the base call hands over, where it is one tensor."""
        return self.followed.call.shape if self.followed.call is not None else None

    @property
    def shapes(self) -> dict[str, tuple[Shape, Shape]]:
        """For each convolution, linear layer and batch norm reached: its (first) input's and its output's shape."""
        found = dict(self.functional_shapes)
        for record in self.followed.records:
            for name, calls in record.calls.items():
                first = calls[0]
                if name not in found and first.given_shape is not None and first.made is not None:
                    found[name] = (first.given_shape, first.made.shape)
        return found

    @property
    def output_shapes(self) -> list[Shape]:
        """Those of the tensors that the base call returned."""
        return self.base.output_shapes if self.base is not None else []

    @property
    def shape_problem(self) -> str | None:
        """Why shapes are unknown, or None."""
        return self.followed.problem

    @property
    def notes(self) -> tuple[str, ...]:
        """What was not, or not wholly, followed, each in one line."""
        notes = []
        if "" in self.untraced:
            instead = "one real call was followed instead" if self.followed.records else "and no call could be followed"
            notes.append(f"torch.fx cannot trace this model ({self.untraced['']}): {instead}")
        if self.followed.problem is not None:
            notes.append(f"shapes are unknown ({self.followed.problem}): pass example_inputs (--input-shape)")
        return (*notes, *self.followed.notes)


class NormTracer(fx.Tracer):
    """torch.fx's tracer with timm's leaves and autowrapped functions; every batch norm is a leaf."""

    def __init__(self, extra_leaves: tuple[type[nn.Module], ...] = ()) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self._leaves = (*get_notrace_modules(), *OWN_LAYERS, *extra_leaves)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Leaves: batch norms, timm's untraceable modules, torch's own modules."""
        return is_batch_norm(m) or isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, example_inputs: Any = None) -> TracedModel:
    """Follow ``model``, which is left as it is.

    example_inputs  what the model is called with: a tensor, a tuple of arguments, a dict, ``(args, kwargs)``, or a data
                    loader; without it, shapes come from timm's configuration or the first layer

    :raises TracingError: when the model cannot even be copied.
    :raises UsageError: for inputs of another kind.

    >>> import timm
    >>> traced = trace(timm.create_model("test_resnet"))
    >>> traced.traced_by, traced.shapes["bn1"]
    ('fx', ((2, 32, 80, 80), (2, 32, 80, 80)))
    """
    example = as_call(example_inputs) if example_inputs is not None else None
    skeleton = skeleton_of(model)
    graphs: dict[str, fx.Graph] = {}
    untraced: dict[str, str] = {}
    with torch.device("meta"):  # tensors that a forward makes on the way must live where the ghosts live
        _trace_into(skeleton, "", graphs, untraced)
    followed = follow(model, skeleton, example)
    traced = TracedModel(model, skeleton.eval(), graphs, untraced, followed)
    traced.functional_shapes.update(_functional_shapes(traced))
    return traced


def symbolic_trace(root: nn.Module, extra_leaves: tuple[type[nn.Module], ...] = ()) -> fx.Graph:
    """The fx graph of ``root``'s forward; arguments that have a default are held at it, but for the first."""
    parameters = list(inspect.signature(root.forward).parameters.values())
    defaults = {p.name: p.default for p in parameters[1:] if p.default is not inspect.Parameter.empty}
    return NormTracer(extra_leaves).trace(root, concrete_args=defaults or None)


def is_functional_batch_norm(node: fx.Node) -> bool:
    """Whether the node is a call of ``F.batch_norm`` rather than of a module."""
    return node.op == "call_function" and node.target in (F.batch_norm, torch.batch_norm)


def batch_norm_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a functional batch norm's call, by name."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _trace_into(root: nn.Module, path: str, graphs: dict[str, fx.Graph], untraced: dict[str, str]) -> None:
    """Trace ``root``; then, on their own, what hides a batch norm in it: leaves of its graph, children without one."""
    try:
        graph = symbolic_trace(root)
    except Exception as error:  # tracing runs foreign code, which may raise anything
        untraced[path] = one_line(error)
        within = [name for name, _ in root.named_children()]
    else:
        graphs[path] = graph
        within = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    for name in within:
        child = root.get_submodule(name)
        child_path = f"{path}.{name}" if path else name
        if _hides_batch_norm(child) and child_path not in graphs and child_path not in untraced:
            _trace_into(child, child_path, graphs, untraced)


def _hides_batch_norm(module: nn.Module) -> bool:
    return not is_batch_norm(module) and any(is_batch_norm(m) for m in module.modules())


def shapes_of(output: Any) -> list[Shape]:
    """The shapes of the tensors in a model's output, whatever it is nested in."""
    return [tuple(leaf.shape) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _functional_shapes(traced: TracedModel) -> dict[str, tuple[Shape, Shape]]:
    """The shapes at functional batch norms of the model's own graph, which no layer's record has."""
    graph, call = traced.graphs.get(""), traced.followed.call
    if graph is None or call is None or not any(is_functional_batch_norm(node) for node in graph.nodes):
        return {}
    interpreter = _ShapeInterpreter(traced.skeleton, graph)
    try:
        with torch.no_grad(), torch.device("meta"):
            interpreter.run(*call.map(lambda t: filled(t, torch.device("meta"))).args)
    except Exception:  # a graph with other arguments than the call's: its sites are refused for want of shapes
        pass
    return interpreter.found


class _ShapeInterpreter(fx.Interpreter):
    """Runs a graph and notes the shapes at its functional batch norms, which no module hook can see."""

    def __init__(self, skeleton: nn.Module, graph: fx.Graph) -> None:
        super().__init__(skeleton, garbage_collect_values=True, graph=graph)
        self.found: dict[str, tuple[Shape, Shape]] = {}

    def run_node(self, n: fx.Node) -> Any:
        output = super().run_node(n)
        if is_functional_batch_norm(n):
            x = self.fetch_args_kwargs_from_env(n)[0][0]
            self.found[n.name] = (tuple(x.shape), tuple(output.shape))
        return output
