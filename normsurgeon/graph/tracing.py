"""Following a network's data flow without its weights.

torch.fx traces the skeleton with timm's own leaf modules and autowrapped functions. A leaf that hides a batch norm is
traced once more on its own. Where fx cannot follow, the module tree and the hooks of one forward pass on the meta
device still give every site's name, calls and shapes; only the proof that a producer has one reader is missing.
"""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from normsurgeon.graph.skeleton import input_shape_of, skeleton_of
from normsurgeon.norms.layers import ChannelAffine, DropAct, LayerNormC, RmsNormC, RmsNormChw
from normsurgeon.norms.sources import is_batch_norm

Shape = tuple[int, ...]

OWN_LAYERS = (ChannelAffine, DropAct, LayerNormC, RmsNormC, RmsNormChw)


@dataclass(frozen=True)
class TracedModel:
    """What tracing found. ``graphs`` maps a module path ("" for the model) to the graph traced from it.

    ``untraced`` maps the path of each module that fx could not follow to the reason. ``shapes`` holds, for each
    batch norm module or functional node that a forward pass on the meta device reached, its input's and
    output's shape. ``calls`` counts how often that pass called each batch norm, convolution and linear layer, by
    canonical module name. ``output_shapes`` are those of the tensors that the model returned.
    """

    model_class: str
    traced_by: Literal["fx", "hooks"]
    skeleton: nn.Module
    graphs: dict[str, fx.Graph]
    untraced: dict[str, str]
    input_shape: Shape | None
    shapes: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    output_shapes: list[Shape] = field(default_factory=list)
    shape_problem: str | None = None


class NormTracer(fx.Tracer):
    """torch.fx's tracer with timm's leaves and autowrapped functions; every batch norm is a leaf."""

    def __init__(self, extra_leaves: tuple[type[nn.Module], ...] = ()) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self._leaves = (*get_notrace_modules(), *OWN_LAYERS, *extra_leaves)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Leaves: batch norms, timm's untraceable modules, torch's own modules."""
        return is_batch_norm(m) or isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, example_input: Tensor | None = None) -> TracedModel:
    """Follow ``model``, which is neither changed nor run.

    ``example_input``: a tensor (N, …) whose shape the model accepts; without it the shape comes from timm's
    configuration or the first layer.

    :raises TracingError: when the model cannot even be copied.

    >>> import timm
    >>> traced = trace(timm.create_model("test_resnet"))
    >>> traced.traced_by, traced.shapes["bn1"]
    ('fx', ((2, 32, 80, 80), (2, 32, 80, 80)))
    """
    skeleton = skeleton_of(model)
    graphs: dict[str, fx.Graph] = {}
    untraced: dict[str, str] = {}
    with torch.device("meta"):  # tensors that a forward makes on the way must live where the ghosts live
        _trace_into(skeleton, "", graphs, untraced)
        input_shape = input_shape_of(model, example_input)
        traced = TracedModel(
            model_class=type(model).__name__,
            traced_by="fx" if "" in graphs else "hooks",
            skeleton=skeleton,
            graphs=graphs,
            untraced=untraced,
            input_shape=input_shape,
        )
        dtype = example_input.dtype if example_input is not None else _floating_dtype(skeleton)
        problem = _propagate_shapes(traced, dtype)
    return TracedModel(**{**traced.__dict__, "shape_problem": problem})


def symbolic_trace(root: nn.Module, extra_leaves: tuple[type[nn.Module], ...] = ()) -> fx.Graph:
    """The fx graph of ``root``'s forward, arguments that have a default held at it."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(root.forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    return NormTracer(extra_leaves).trace(root, concrete_args=defaults or None)


def is_functional_batch_norm(node: fx.Node) -> bool:
    """Whether the node is a call of ``F.batch_norm`` rather than of a module."""
    return node.op == "call_function" and node.target in (F.batch_norm, torch.batch_norm)


def batch_norm_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a functional batch norm's call, by name."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _floating_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _trace_into(root: nn.Module, path: str, graphs: dict[str, fx.Graph], untraced: dict[str, str]) -> None:
    """Trace ``root``; then trace, on their own, the leaves of that graph which hide a batch norm."""
    try:
        graph = symbolic_trace(root)
    except Exception as error:  # tracing runs foreign code, which may raise anything
        untraced[path] = _one_line(error)
        for name, child in root.named_children():
            if path and _hides_batch_norm(child):
                _trace_into(child, f"{path}.{name}", graphs, untraced)
        return
    graphs[path] = graph
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        leaf = root.get_submodule(node.target)
        leaf_path = f"{path}.{node.target}" if path else node.target
        if _hides_batch_norm(leaf) and leaf_path not in graphs and leaf_path not in untraced:
            _trace_into(leaf, leaf_path, graphs, untraced)


def _hides_batch_norm(module: nn.Module) -> bool:
    return not is_batch_norm(module) and any(is_batch_norm(m) for m in module.modules())


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def _propagate_shapes(traced: TracedModel, dtype: torch.dtype) -> str | None:
    """One forward pass on the meta device, hooks on the batch norms; returns what went wrong, if anything did."""
    if traced.input_shape is None:
        return "the input's shape is unknown: pass example_input"
    handles = []
    for name, module in traced.skeleton.named_modules():
        if is_batch_norm(module):
            module.forward = _same  # its output has its input's shape, and on the meta device batch_norm is slow
        if is_batch_norm(module) or isinstance(module, (_ConvNd, nn.Linear)):
            handles.append(module.register_forward_hook(_recorder(traced, name)))
    try:
        with torch.no_grad():
            x = torch.empty(traced.input_shape, dtype=dtype, device="meta")
            graph = traced.graphs.get("")
            if graph is not None and any(is_functional_batch_norm(node) for node in graph.nodes):
                output = _ShapeInterpreter(traced, graph).run(x)
            else:
                output = traced.skeleton(x)
            traced.output_shapes.extend(shapes_of(output))
    except Exception as error:  # a model may refuse the meta device for any reason
        return f"no forward pass on the meta device with input {traced.input_shape} ({_one_line(error)})"
    finally:
        for handle in handles:
            handle.remove()
        for module in traced.skeleton.modules():
            module.__dict__.pop("forward", None)
    return None


def _same(x: Tensor) -> Tensor:
    return x


def shapes_of(output: Any) -> list[Shape]:
    """The shapes of the tensors in a model's output, whatever it is nested in."""
    return [tuple(leaf.shape) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _recorder(traced: TracedModel, name: str) -> Any:
    def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        traced.calls[name] = traced.calls.get(name, 0) + 1
        if is_batch_norm(module) and inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            traced.shapes.setdefault(name, (tuple(inputs[0].shape), tuple(output.shape)))

    return record


class _ShapeInterpreter(fx.Interpreter):
    """Runs a graph and notes the shapes at its functional batch norms, which no module hook can see."""

    def __init__(self, traced: TracedModel, graph: fx.Graph) -> None:
        super().__init__(traced.skeleton, garbage_collect_values=True, graph=graph)
        self.traced = traced

    def run_node(self, n: fx.Node) -> Any:
        output = super().run_node(n)
        if is_functional_batch_norm(n):
            x = self.fetch_args_kwargs_from_env(n)[0][0]
            self.traced.shapes[n.name] = (tuple(x.shape), tuple(output.shape))
            self.traced.calls[n.name] = 1
        return output


def reads_only_shape(node: fx.Node, source: fx.Node) -> bool:
    """Whether ``node`` looks at ``source``'s shape, dtype or device but not at its values."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "dtype", "device", "ndim", "is_cuda")
    if node.op == "call_function" and node.target in (operator.eq, torch._assert):
        return True
    if node.op == "call_method":
        if node.target in ("size", "dim", "numel", "type"):
            return True
        if node.target in ("reshape_as", "view_as", "expand_as", "type_as"):
            return node.args[0] is not source
    return False
