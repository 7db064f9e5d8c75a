"""Every norm layer of a model as a ``NormSite``: where it sits, what feeds it, what it feeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from pydantic import ConfigDict
from torch import fx, nn

from normsurgeon._util.schema import STRICT, Count, ModulePath, Name, NotNegative, Shape, Words
from normsurgeon.graph.activations import activation_after
from normsurgeon.graph.producers import ProducerFinder
from normsurgeon.graph.recording import Record
from normsurgeon.graph.symbolic import record_of_graphs
from normsurgeon.graph.trace import TracedModel, batch_norm_arguments, is_functional_batch_norm, trace
from normsurgeon.norms import batchnorm


@dataclass(frozen=True)
class NormSite:
    """One batch norm of a model, as facts and without tensors.

    name, aliases      module path (or, for a functional call, the graph node's name), and its other paths
    class_name         Python class; "F.batch_norm" for a functional call
    channels, eps      number of features, and the eps inside its square root
    input_shape        shape of the input on the meta device, None where no forward pass reached it
    has_statistics     whether running statistics exist: without them eval mode uses the batch's
    affine, trainable  whether gamma and beta exist, and whether they require a gradient
    producer           path of the layer that feeds it, where that is one layer
    foldable, reason   whether the producer can absorb a scale and shift; if not, why
    activation         class name of the activation behind it, fused or next in the graph
    readers            who reads its output
    calls              how often one forward pass calls it
    unreadable         why its function cannot be known at all, or None
    overflows          whether the squares of what the statistics say of its input overflow
    """

    name: ModulePath
    class_name: Name
    channels: Count
    eps: NotNegative
    aliases: tuple[ModulePath, ...] = ()
    input_shape: Shape | None = None
    output_shape: Shape | None = None
    has_statistics: bool = True
    affine: bool = True
    trainable: bool = True
    producer: ModulePath | None = None
    producer_class: Name | None = None
    foldable: bool = False
    reason: Words | None = None
    activation: Name | None = None
    readers: tuple[Words, ...] = ()
    calls: Count = 1
    unreadable: Words | None = None
    overflows: bool = False

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    """For plans that are read from a file; a site that is found in a model is not checked again."""

    @property
    def functional(self) -> bool:
        """Whether this is a call of ``F.batch_norm`` rather than a module."""
        return self.class_name == "F.batch_norm"

    @property
    def rank(self) -> int | None:
        """Number of dimensions of the input, or None."""
        return len(self.input_shape) if self.input_shape is not None else None

    @property
    def positions(self) -> int | None:
        """Number of positions (H·W for images; 1 after global pooling), or None."""
        return math.prod(self.input_shape[2:]) if self.input_shape is not None else None

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def find_sites(model: nn.Module | TracedModel, example_inputs: Any = None) -> tuple[NormSite, ...]:
    """The batch norms of ``model``, in the order in which a forward pass reaches them.

    ``model`` is left alone; hand in a ``TracedModel`` to save tracing it again. ``example_inputs`` as in
    ``normsurgeon.plan``. Batch norms that no forward pass reaches come last.

    :raises TracingError: when the model cannot be copied.

    >>> import timm
    >>> site = find_sites(timm.create_model("test_resnet"))[0]
    >>> site.name, site.class_name, site.channels, site.producer, site.foldable, site.activation
    ('conv1.1', 'BatchNorm2d', 16, 'conv1.0', True, 'ReLU')
    """
    traced = model if isinstance(model, TracedModel) else trace(model, example_inputs)
    records = traced.followed.records
    if not records and "" in traced.graphs:
        records = [record_of_graphs(traced.skeleton, traced.graphs)]
    finder = ProducerFinder(traced.model, records)
    canonical = {id(module): name for name, module in reversed(list(traced.skeleton.named_modules()))}
    nodes: dict[str, tuple[str, fx.Node]] = {}
    sites: list[NormSite] = []
    for path, graph in traced.graphs.items():
        root = traced.skeleton.get_submodule(path)
        for node in graph.nodes:
            if is_functional_batch_norm(node) and _reads_data(node) and not _of_a_module(node, root):
                sites.append(_functional_site(traced, path, node))
            elif node.op == "call_module":
                nodes.setdefault(canonical[id(root.get_submodule(str(node.target)))], (path, node))
    aliases: dict[int, list[str]] = {}
    for name, module in traced.model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(name)
    shapes = traced.shapes
    inside: tuple[str, ...] = ()  # auxiliary norms of a SplitBatchNorm2d belong to it, and go with it
    for name, module in traced.model.named_modules():
        if batchnorm.is_batch_norm(module) and not name.startswith(inside):
            inside = (*inside, f"{name}." if name else "")
            facts = _facts(finder, name, module)
            producer = finder.find(name)
            flow = _flow(traced, records, name, nodes.get(name), facts["activation"])
            input_shape, output_shape = shapes.get(name, (None, None))
            sites.append(
                NormSite(
                    **{**facts, **flow},
                    aliases=tuple(aliases[id(module)][1:]),
                    input_shape=input_shape,
                    output_shape=output_shape,
                    producer=producer.name,
                    producer_class=producer.class_name,
                    foldable=producer.foldable,
                    reason=producer.reason,
                )
            )
    order = {name: position for position, name in enumerate(dict.fromkeys(n for r in records for n in r.calls))}
    return tuple(sorted(sites, key=lambda site: order.get(site.name, len(order))))


def _facts(finder: ProducerFinder, name: str, module: nn.Module) -> dict[str, Any]:
    """What the module itself says, and whether something else reads its numbers."""
    unreadable = batchnorm.why_unreadable(module)
    for record in finder.records:
        if unreadable is None and name in record.read:
            what, reader = record.read[name]
            unreadable = f"its {what} is also read directly, by {reader}, which counts on a batch norm's numbers"
    reading = batchnorm.read(module)
    activation = type(reading.act).__name__ if reading.act is not None else None
    tensors = [t for t in (reading.weight, reading.bias) if t is not None]
    return {
        "name": name,
        "class_name": type(module).__name__,
        "channels": reading.channels,
        "eps": reading.eps,
        "has_statistics": reading.mean is not None and reading.var is not None,
        "affine": bool(tensors),
        "trainable": any(t.requires_grad for t in tensors),
        "activation": None if activation == "Identity" else activation,
        "unreadable": unreadable,
        "overflows": unreadable is None and batchnorm.overflows(reading),
    }


def _flow(
    traced: TracedModel,
    records: Sequence[Record],
    name: str,
    found: tuple[str, fx.Node] | None,
    activation: str | None,
) -> dict[str, Any]:
    """Who reads the norm's output, the activation among them, and how often a pass calls it."""
    calls = [record.calls[name] for record in records if name in record.calls]
    made = calls[0][0].made if calls else None
    readers = tuple(label for label, _, _ in made.readers) if made is not None else ()
    if found is not None and activation is None:
        path, node = found
        activation = activation_after(traced, path, node)
    return {"readers": readers, "activation": activation, "calls": max(map(len, calls), default=0)}


def _functional_site(traced: TracedModel, path: str, node: fx.Node) -> NormSite:
    input_shape, output_shape = traced.functional_shapes.get(node.name, (None, None))
    arguments = batch_norm_arguments(node)
    eps = arguments.get("eps", 1e-5)
    statistics = [arguments.get(key) for key in ("running_mean", "running_var")]
    constant = all(isinstance(s, fx.Node) and s.op == "get_attr" for s in statistics)
    unreadable = None
    if arguments.get("training"):
        unreadable = "functional call in training mode: its statistics are the batch's"
    elif path:
        unreadable = f"functional call inside {path}, which is a leaf of the trace"
    elif not constant or input_shape is None:
        unreadable = "functional call whose statistics are computed on the fly"
    return NormSite(
        name=node.name,
        class_name="F.batch_norm",
        channels=input_shape[1] if input_shape else 0,
        eps=float(eps) if isinstance(eps, (int, float)) else 1e-5,
        input_shape=input_shape,
        output_shape=output_shape,
        has_statistics=constant,
        affine=arguments.get("weight") is not None,
        reason="a functional call: the analytic affine is used",
        readers=tuple(user.name for user in node.users),
        unreadable=unreadable,
    )


def _of_a_module(node: fx.Node, root: nn.Module) -> bool:
    """Whether the statistics are those of a batch norm module, which is a site itself: not called, but read."""
    mean = batch_norm_arguments(node).get("running_mean")
    if not isinstance(mean, fx.Node) or mean.op != "get_attr":
        return False
    return batchnorm.is_batch_norm(root.get_submodule(str(mean.target).rpartition(".")[0]))


def _reads_data(node: fx.Node) -> bool:
    """Whether the normed tensor comes from the input: weight standardisation calls F.batch_norm on a weight."""
    pending, seen = [node.args[0] if node.args else node.kwargs["input"]], set()
    while pending:
        source = pending.pop()
        if not isinstance(source, fx.Node) or source in seen:
            continue
        seen.add(source)
        if source.op == "placeholder":
            return True
        pending.extend(source.all_input_nodes)
    return False
