"""The record of a model that no call is known for, from its torch.fx graphs: who reads what, without shapes."""

from __future__ import annotations

from operator import attrgetter

from torch import fx, nn

from normsurgeon.graph.moves import Move
from normsurgeon.graph.recording import LayerCall, Record, Value, is_layer


def record_of_graphs(skeleton: nn.Module, graphs: dict[str, fx.Graph]) -> Record:
    """One record of all graphs, each traced from the module at its path.

    A dimension move needs shapes to be understood, so layers are only known to feed a norm directly, or through
    ``nn.Identity`` and ``contiguous()``.
    """
    record = Record("the traced graph")
    names = {id(module): name for name, module in reversed(list(skeleton.named_modules()))}
    for path, graph in graphs.items():
        root = skeleton.get_submodule(path)
        values: dict[fx.Node, Value] = {}
        for node in graph.nodes:
            _note(node, path, root, names, values, record)
    return record


def _note(
    node: fx.Node,
    path: str,
    root: nn.Module,
    names: dict[int, str],
    values: dict[fx.Node, Value],
    record: Record,
) -> None:
    if node.op == "placeholder":
        values[node] = Value("the model's input" if not path else f"the input of {path}", ())
        return
    if node.op == "get_attr":
        values[node] = Value("a parameter", ())
        owner, _, attribute = str(node.target).rpartition(".")
        module = attrgetter(owner)(root) if owner else root
        record.read.setdefault(names[id(module)], (attribute, "the forward of its parent"))
        return
    given = [values[each] for each in node.all_input_nodes]
    if node.op == "call_module" and is_layer(root.get_submodule(str(node.target))):
        name = names[id(root.get_submodule(str(node.target)))]
        call = LayerCall(name, given[0] if given else None, None, Value(name, (), name))
        assert call.made is not None
        values[node] = call.made
        record.calls.setdefault(name, []).append(call)
        for value in given:
            value.readers.append((name, call, None))
        return
    label = getattr(node.target, "__name__", str(node.target)).strip("_")
    same = node.op == "call_method" and node.target == "contiguous"
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        label = f"{type(module).__name__} ({names[id(module)]})"
        same = type(module) is nn.Identity
    made = Value(label, (), move=Move((), (), ()) if same else None, source=given[0] if same and given else None)
    values[node] = made
    for value, source in zip(given, node.all_input_nodes, strict=True):
        if not _reads_only_shape(node, source):
            value.readers.append((label, None, made if same else None))


def _reads_only_shape(node: fx.Node, source: fx.Node) -> bool:
    """Whether ``node`` looks at ``source``'s shape, dtype or device but not at its values."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "dtype", "device", "ndim", "is_cuda")
    if node.op == "call_method":
        if node.target in ("size", "dim", "numel"):
            return True
        if node.target in ("reshape_as", "view_as", "expand_as", "type_as"):
            return node.args[0] is not source
    return False
