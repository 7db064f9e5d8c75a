"""Which activation a layer's output goes into."""

from __future__ import annotations

from torch import fx, nn

from normsurgeon.graph.trace import TracedModel

_FUNCTIONS = ("relu", "relu_", "gelu", "silu", "sigmoid", "hardswish", "elu", "leaky_relu")


def activation_after(traced: TracedModel, path: str, node: fx.Node) -> str | None:
    """The name of the activation that alone reads ``node``, in the graph traced from the module at ``path``."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    if user.op == "call_module":
        module = traced.skeleton.get_submodule(path).get_submodule(str(user.target))
        if "activation" in type(module).__module__ and not isinstance(module, nn.MultiheadAttention):
            return type(module).__name__
        return None
    name = getattr(user.target, "__name__", str(user.target))
    return name if name in _FUNCTIONS else None


def activations(traced: TracedModel) -> dict[str, str]:
    """For every module that the graphs call and that an activation alone reads: that activation's name.

    >>> import timm
    >>> from normsurgeon.graph.trace import trace
    >>> activations(trace(timm.create_model("test_resnet")))["bn1"]
    'ReLU'
    """
    return {
        f"{path}.{node.target}" if path else str(node.target): found
        for path, graph in traced.graphs.items()
        for node in graph.nodes
        if node.op == "call_module" and (found := activation_after(traced, path, node)) is not None
    }
