"""Carrying a plan out. Takes no decisions: everything it does stands in the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, Literal, Protocol

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from normsurgeon.calls import as_call
from normsurgeon.errors import ConversionError, UsageError
from normsurgeon.graph.following import Followed
from normsurgeon.graph.linearity import out_channels
from normsurgeon.graph.skeleton import require_plain, why_valueless
from normsurgeon.graph.trace import batch_norm_arguments, is_functional_batch_norm, symbolic_trace, trace
from normsurgeon.norms import batchnorm
from normsurgeon.printable import one_short_line
from normsurgeon.render.document import Document, Facts, Notes, Section
from normsurgeon.render.presentable import Presentable
from normsurgeon.surgery import verdict as verdicts
from normsurgeon.surgery.building import new_layer_
from normsurgeon.surgery.check import Check, check
from normsurgeon.surgery.deciding import Decision
from normsurgeon.surgery.plan import ConversionPlan, plan
from normsurgeon.surgery.probing import FeatureProbe, probe_features, synthetic_calls
from normsurgeon.surgery.replacing import Swap, copy_model, replace_modules_
from normsurgeon.surgery.verdict import StandIn, Verdict

DEFAULTS = {"groups": "auto", "eps": None, "keep": (), "set": (), "as_graph": False, "balance": True}
"""The settings of a plan, as they are when nothing is asked for."""


class Record(Protocol):
    """What was done to a network, and its numbers before and after: an entry of ``Conversion.history``."""

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON and checkpoints; ``event`` names what was done."""


@dataclass
class Conversion(Presentable):
    """What ``convert`` returns.

    model       the converted network
    plan        the plan that was carried out; None for a network that came as a module (its origin keeps earlier plans)
    check       what was proven of it; None where no check was wanted
    verdict     how much of the function was left with the norms that were asked for, before anything in ``history``;
                None where it was not measured
    history     what was done to the model since: a record of each calibration, reconstruction and fine-tuning
    optimizer   the optimizer handed over, now of the converted model's parameters, or None
    original    the model that was converted, which calibration and distillation look up to; None after ``convert_``,
                which leaves none. No copy: changing it changes the target. It is not saved.
    """

    model: nn.Module
    plan: ConversionPlan | None
    history: list[Record] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None
    original: nn.Module | None = None
    check: Check | None = None
    verdict: Verdict | None = None

    @property
    def events(self) -> tuple[dict[str, Any], ...]:
        """The history in plain types, as files hold it. An entry may be such a dict already."""
        return tuple(dict(entry) if isinstance(entry, Mapping) else entry.to_dict() for entry in self.history)

    @property
    def sites(self) -> tuple[Decision, ...]:
        """One entry a batch norm: ``name``, ``status``, ``reason``, …"""
        return self.plan.decisions if self.plan is not None else ()

    @property
    def counts(self) -> dict[str, int]:
        """How many sites were converted, kept and refused."""
        return self.plan.counts if self.plan is not None else dict.fromkeys(("converted", "kept", "refused"), 0)

    @property
    def _proofs(self) -> tuple[tuple[str, str], ...]:
        """What is known of the conversion, by name. The verdict is older than what the history holds, and says so."""
        verdict = f"verdict before {self.events[0].get('event', 'the history')}" if self.history else "verdict"
        known = (("check", self.check), (verdict, self.verdict))
        return tuple((name, str(value)) for name, value in known if value is not None)

    @property
    def summary(self) -> str:
        """What was converted, what was proven of it, and how much of the function is left: a line each."""
        plan = self.plan.summary if self.plan is not None else type(self.model).__name__
        return "\n".join([plan, *(f"{name}: {value}" for name, value in self._proofs)])

    def __repr__(self) -> str:
        return f"Conversion({self.summary})"

    def document(self) -> Document:
        """What was proven, how much of the function is left, and the sites."""
        facts = (Facts(self._proofs),)
        if self.plan is None:
            return Document("", type(self.model).__name__, (), facts=facts)
        section = Section("sites", "Sites", (self.plan.table, Notes(self.plan.notes)))
        return Document("", self.plan.summary, (section,), facts=facts)

    @classmethod
    def of(cls, result: Conversion | Swap | nn.Module) -> Conversion:
        """A conversion itself; of a network that came as a module, or from ``swap_layers``, one without a plan."""
        if isinstance(result, Swap):
            return cls(result.model, None, optimizer=result.optimizer)
        return result if isinstance(result, Conversion) else cls(result, None)

    def copy(self) -> Conversion:
        """The same with a deep copy of the network, and of the optimizer that trains it.

        :raises ConversionError: for a model that cannot be copied.
        """
        model, optimizer = copy_model(self.model, self.optimizer)
        return replace(self, model=model, optimizer=optimizer, history=list(self.history))


def convert(
    model: nn.Module | Swap,
    plan: ConversionPlan | None = None,
    *,
    to: str | None = None,
    groups: int | Literal["auto"] = "auto",
    eps: float | None = None,
    keep: Sequence[str] = (),
    set: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    as_graph: bool = False,
    balance: bool = True,
    check: bool = True,
    verdict: bool = True,
    probe: Any = None,
    example_inputs: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Conversion:
    """A converted copy of ``model`` (a network, or what ``swap_layers`` returned), which itself stays as it is.

    Either a ``plan``, or ``to`` and the other settings of ``normsurgeon.plan``. The copy has the same class, methods,
    module names, device, dtype, training flags and hooks. With ``as_graph`` it is an ``fx.GraphModule``. An
    ``optimizer`` of the original's parameters comes back, in ``Conversion.optimizer``, as one of the copy's.

    check           whether to prove, before anything is changed, that all but the new norms' own statistics leaves the
                    network as it was, in float64 on a small input; what does not is taken back, and the plan says so
    verdict         whether to measure, on synthetic images, how much of the function is left
    probe           what to measure it on instead: what the model takes, as in ``example_inputs``, pre-processed
    example_inputs  what the model is called with, as in ``normsurgeon.plan``

    :raises UsageError: neither or both of ``plan`` and ``to``; and whatever ``normsurgeon.plan`` raises.
    :raises ConversionError: a plan that was made for another model.

    >>> import timm, torch
    >>> model = timm.create_model("test_resnet").eval()
    >>> result = convert(model, to="affine")
    >>> x = torch.randn(1, 3, 160, 160)
    >>> type(result.model) is type(model), bool(torch.allclose(result.model(x), model(x), atol=1e-5))
    (True, True)
    >>> str(result.check).startswith("exact")
    True
    """
    settings = {"groups": groups, "eps": eps, "keep": keep, "set": set, "as_graph": as_graph, "balance": balance}
    model = model.model if isinstance(model, Swap) else model
    plan, followed = _settled(model, plan, to, example_inputs, settings, wanted=True)
    prepared = _proven(model, plan, followed, check, verdict, probe)
    new_model, new_optimizer = copy_model(model, optimizer)
    result = _carry_out(new_model, prepared, new_optimizer)
    result.original = model
    return result


def convert_(
    model: nn.Module | Swap,
    plan: ConversionPlan | None = None,
    *,
    to: str | None = None,
    groups: int | Literal["auto"] = "auto",
    eps: float | None = None,
    keep: Sequence[str] = (),
    set: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    as_graph: bool = False,
    balance: bool = True,
    check: bool = True,
    verdict: bool = True,
    probe: Any = None,
    example_inputs: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    values: bool = True,
) -> Conversion:
    """``convert`` in place: saves the copy's memory, and changes ``model`` and ``optimizer`` themselves.

    ``values=False`` makes the new structure only, for weights that are loaded into it next: nothing is checked.
    """
    settings = {"groups": groups, "eps": eps, "keep": keep, "set": set, "as_graph": as_graph, "balance": balance}
    model = model.model if isinstance(model, Swap) else model
    plan, followed = _settled(model, plan, to, example_inputs, settings, wanted=values)
    if not values:
        _check_fit(model, plan)
        return _carry_out(model, Proven(plan), optimizer, values)
    return _carry_out(model, _proven(model, plan, followed, check, verdict, probe), optimizer)


@dataclass
class Proven:
    """A plan that was proven, and what was found out about the model's features: before anything is changed."""

    plan: ConversionPlan
    followed: Followed = field(default_factory=Followed)
    probes: dict[str, FeatureProbe] = field(default_factory=dict)
    check: Check | None = None
    reference: verdicts.Reference | None = None


def proven(model: nn.Module, plan: ConversionPlan) -> Proven:
    """What ``convert`` finds out before it changes anything: a plan without what the check takes back, and probes.

    :raises ConversionError: a plan that was made for another model.
    """
    plan, followed = _settled(model, plan, None, None, {}, wanted=True)
    return _proven(model, plan, followed, checked=True, judged=False, probe=None)


def _proven(
    model: nn.Module, plan: ConversionPlan, followed: Followed, checked: bool, judged: bool, probe: Any
) -> Proven:
    _check_fit(model, plan)
    proof = None
    if checked:
        decisions, proof = check(model, plan.decisions, followed)
        plan = replace(plan, decisions=tuple(decisions))
    probes = _probes(model, plan, followed)
    plan = replace(plan, decisions=tuple(replace(d, balanced=d.balanced and d.name in probes) for d in plan.decisions))
    reference = None
    if judged and plan.counts["converted"] and why_valueless(model) is None:
        reference = verdicts.reference(model, followed, as_call(probe) if probe is not None else None)
    return Proven(plan, followed, probes, proof, reference)


def _carry_out(
    model: nn.Module, prepared: Proven, optimizer: torch.optim.Optimizer | None, values: bool = True
) -> Conversion:
    plan = prepared.plan
    modules = dict(model.named_modules())
    replacements: dict[nn.Module, nn.Module] = {}
    stand_ins: dict[str, StandIn] = {}
    touched: list[nn.Parameter] = []
    gained: dict[nn.Parameter, nn.Parameter] = {}
    with torch.no_grad():
        for decision in plan.decisions:
            if decision.status != "converted" or decision.site.functional:
                continue
            old = modules[decision.name]
            producer = modules[decision.site.producer] if decision.site.producer and decision.folds else None
            had_bias = producer is not None and producer.bias is not None
            new = new_layer_(old, decision, producer, values, prepared.probes.get(decision.name))
            replacements[old] = new.layer
            if new.stand_in is not None:
                stand_ins[decision.name] = new.stand_in
            if producer is not None:
                touched.extend(producer.parameters(recurse=False))
                if not had_bias:
                    gained[producer.weight] = producer.bias
    replace_modules_(model, replacements, optimizer, touched=touched, gained=gained)
    verdict = None
    if prepared.reference is not None:
        verdict = verdicts.judge(prepared.reference, model, stand_ins, prepared.followed, len(plan.decisions))
    if plan.request.as_graph:
        model = _as_graph(model, plan, tuple({type(new) for new in replacements.values()}))
    return Conversion(model, plan, optimizer=optimizer, check=prepared.check, verdict=verdict)


def _settled(
    model: nn.Module,
    given: ConversionPlan | None,
    to: str | None,
    example_inputs: Any,
    settings: dict[str, Any],
    wanted: bool,
) -> tuple[ConversionPlan, Followed]:
    """The plan to carry out, and, where it is ``wanted``, how the model can be called."""
    if given is not None:
        named = [key for key, value in settings.items() if value != DEFAULTS[key] and value not in ([], {})]
        if to is not None or named:
            raise UsageError(f"a plan says it all: leave out {', '.join(filter(None, [to and 'to', *named]))}")
        require_plain(model)
        followed = given.followed
        if wanted and (followed is None or example_inputs is not None):
            followed = replace(trace(model, example_inputs).followed, records=[])
        return given, followed or Followed()
    if to is None:
        raise UsageError("say what to convert to: a plan, or to='gn'")
    made = plan(model, to, example_inputs=example_inputs, **settings)
    return made, made.followed or Followed()


def _check_fit(model: nn.Module, plan: ConversionPlan) -> dict[str, nn.Module]:
    """The model's modules by path, once every decision of the plan has been found in it."""
    require_plain(model)
    modules = dict(model.named_modules())
    other = f"the plan was made for another model ({one_short_line(plan.model, 60)})"
    for decision in plan.decisions:
        if decision.site.functional:
            continue
        found = modules.get(decision.name)
        if found is None or not batchnorm.is_batch_norm(found):
            what = "is not there" if found is None else f"is a {type(found).__name__}"
            raise ConversionError(
                f"{other}: {one_short_line(decision.name, 60)}, there a "
                f"{one_short_line(decision.site.class_name, 60)}, {what} in this {type(model).__name__}; "
                "make a new plan"
            )
        channels = batchnorm.read(found).channels
        if channels != decision.site.channels:
            raise ConversionError(
                f"{other}: {one_short_line(decision.name, 60)} has {channels} channels in "
                f"this {type(model).__name__}, and {decision.site.channels} in the plan; make a new plan"
            )
        if decision.folds and not _can_fold(modules.get(decision.site.producer or ""), channels):
            named = one_short_line(decision.site.producer or "nothing", 60)
            raise ConversionError(f"{other}: it folds into {named}, which is no such layer here; make a new plan")
    return modules


def _can_fold(layer: nn.Module | None, channels: int) -> bool:
    """Whether a layer is one that a norm of so many channels can be folded into."""
    return (
        isinstance(layer, (nn.Linear, _ConvNd))
        and {"weight", "bias"} <= set(layer._parameters)
        and out_channels(layer) == channels
    )


def _probes(model: nn.Module, plan: ConversionPlan, followed: Followed) -> dict[str, FeatureProbe]:
    """What balancing needs to know of the sites that the plan balances."""
    names = [d.name for d in plan.decisions if d.balanced]
    if not names or why_valueless(model) is not None:
        return {}
    return probe_features(model, names, (call for call, _ in synthetic_calls(model, followed)))


@torch.no_grad()
def _as_graph(model: nn.Module, plan: ConversionPlan, leaves: tuple[type[nn.Module], ...]) -> fx.GraphModule:
    """The converted model as a GraphModule, its functional batch norms replaced by layers, too."""
    graph_module = fx.GraphModule(model, symbolic_trace(model, leaves), class_name=type(model).__name__)
    functional = {d.name: d for d in plan.decisions if d.site.functional and d.status == "converted"}
    for node in list(graph_module.graph.nodes):
        decision = functional.get(node.name)
        if decision is None or not is_functional_batch_norm(node):
            continue
        arguments = batch_norm_arguments(node)
        mean = arguments.get("running_mean")
        held = isinstance(mean, fx.Node) and mean.op == "get_attr"
        channels = len(attrgetter(str(mean.target))(graph_module)) if mean is not None and held else 0
        if channels != decision.site.channels:
            raise ConversionError(
                f"the plan was made for another model: {one_short_line(node.name, 60)} has {channels or 'no known'} "
                f"channels here, and {decision.site.channels} in the plan; make a new plan"
            )
        stand_in = nn.BatchNorm2d(channels, eps=decision.site.eps)
        for key in ("running_mean", "running_var", "weight", "bias"):
            source = arguments.get(key)
            value = attrgetter(str(source.target))(graph_module) if isinstance(source, fx.Node) else None
            if key in stand_in._buffers:
                stand_in._buffers[key] = value
            else:
                stand_in._parameters[key] = value
        layer = new_layer_(stand_in, decision, None).layer
        graph_module.add_submodule(f"converted_{node.name}", layer.train(model.training))
        with graph_module.graph.inserting_after(node):
            call = graph_module.graph.call_module(f"converted_{node.name}", (arguments["input"],))
        node.replace_all_uses_with(call)
        graph_module.graph.erase_node(node)
    for kept in ("pretrained_cfg", "_normsurgeon_origin"):  # what a checkpoint and pre-processing need
        if hasattr(model, kept):
            setattr(graph_module, kept, getattr(model, kept))
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module
