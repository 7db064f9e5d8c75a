"""Residual blocks: the modules in which two branches of the data are added."""

from __future__ import annotations

from torch import fx

from normsurgeon.graph.trace import TracedModel

_ADDITIONS = ("add", "iadd", "add_", "__add__", "__iadd__")


def residual_blocks(traced: TracedModel) -> tuple[str, ...]:
    """The paths of the modules whose own forward adds two values that come from the input, in the tree's order.

    Modules of the same class count too, although they may lack the shortcut (where a stage changes its width). Empty
    for a model that fx cannot follow: only a graph shows an addition.

    >>> import timm
    >>> from normsurgeon.graph.trace import trace
    >>> residual_blocks(trace(timm.create_model("test_resnet")))
    ('layer1.0', 'layer2.0', 'layer3.0', 'layer4.0')
    """
    found: set[str] = set()
    for path, graph in traced.graphs.items():
        data = _from_the_input(graph)
        for node in graph.nodes:
            operands = [argument for argument in node.args[:2] if isinstance(argument, fx.Node)]
            if _name(node) in _ADDITIONS and len(operands) == 2 and data.issuperset(operands):
                inner = next(reversed(node.meta.get("nn_module_stack") or {}), "")
                name = ".".join(filter(None, (path, inner)))
                if inner:
                    found.add(name)
    classes = {type(traced.skeleton.get_submodule(name)) for name in found}
    return tuple(name for name, module in traced.skeleton.named_modules() if name and type(module) in classes)


def _name(node: fx.Node) -> str:
    if node.op not in ("call_function", "call_method"):
        return ""
    return getattr(node.target, "__name__", str(node.target))


def _from_the_input(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose value depends on the input: a bias table added to it does not."""
    data: set[fx.Node] = set()
    for node in graph.nodes:
        shape = node.op == "call_function" and node.target is getattr
        shape = shape or (node.op == "call_method" and node.target in ("size", "dim"))
        if node.op == "placeholder" or (not shape and not data.isdisjoint(node.all_input_nodes)):
            data.add(node)
    return data
