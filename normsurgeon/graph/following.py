"""The ways of calling a model, and a record of each that can be followed.

One call in eval mode is the base. Values that it holds at a default are alternatives: training mode, each flag turned
round, each optional argument given. The meta device costs no arithmetic and is tried first; a model that looks at
values gets a real pass, on its own weights and an input of random numbers.
"""

from __future__ import annotations

import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normsurgeon._util.one_line import one_line
from normsurgeon.calls import Call
from normsurgeon.errors import UsageError
from normsurgeon.graph.inputs import guesses
from normsurgeon.graph.recording import META_SECONDS, Record, TooSlow, is_layer, is_own_line, record
from normsurgeon.graph.skeleton import HOOKS, shadow_of, tensors_in, why_valueless
from normsurgeon.norms.batchnorm import is_batch_norm

MAX_ALTERNATIVES = 16
"""Ways of calling that are tried besides the base."""

SECONDS_FOR_ALTERNATIVES = 2.0
"""Time for all of them together; or twice what the base took, if that is more."""


@dataclass
class Followed:
    """What came of it.

    records      the base first; empty where no call succeeded
    call         the base call, with tensors of the shapes that were accepted, on the meta device; None without one
    example      the call that the model's owner gave, where it holds values and not shapes alone
    ways         of calling that were followed, besides the base: keyword arguments, and whether in training mode
    unfollowed   the others, each with the reason
    problem      why there is no record, or None
    multiply_adds  of the layers in the base call, for one sample
    """

    records: list[Record] = field(default_factory=list)
    call: Call | None = None
    example: Call | None = None
    ways: list[tuple[str, dict[str, Any], bool]] = field(default_factory=list)
    unfollowed: list[str] = field(default_factory=list)
    problem: str | None = None
    multiply_adds: float = 0.0

    @property
    def notes(self) -> list[str]:
        """What the records do not cover, in words."""
        notes = []
        if self.unfollowed:
            notes.append(f"not followed: {', '.join(self.unfollowed)}; what only these ways read is not known")
        lines = list(dict.fromkeys(line for record in self.records for line in record.branches))
        if lines:
            shown = ", ".join(lines[:3]) + (f" and {len(lines) - 3} more" if len(lines) > 3 else "")
            notes.append(f"Python code looks at a tensor's values ({shown}): one way through it was followed")
        return notes


def follow(model: nn.Module, skeleton: nn.Module, example: Call | None) -> Followed:
    """Record ``model``, which is neither changed nor trained: on its ``skeleton``, or where that fails on a shadow.

    example  what to call it with; default: guesses from its layers

    :raises UsageError: where it does not take the example.
    """
    has_values = example is not None and not any(t.is_meta for t in tensors_in([example.args, dict(example.kwargs)]))
    followed = Followed(example=example if has_values else None)
    hooked = _hooked(model)
    real = why_valueless(model) is None
    for call in [example] if example is not None else guesses(model):
        begin = time.perf_counter()
        runs = [_on_skeleton(skeleton, hooked, META_SECONDS if real else math.inf)] + (
            [_on_shadow(model, hooked)] if real else []
        )
        for run in runs:
            try:
                followed.records.append(run(call, "eval mode", False))
            except Exception as error:  # a foreign forward may raise anything
                followed.problem = followed.problem or f"{one_line(error)}{_line_in_the_model(error)}"
                if not _is_of_the_device(error):
                    break
                continue
            followed.call, followed.problem = call.map(_ghost), None
            followed.multiply_adds = _multiply_adds(followed.records[0], model)
            _follow_alternatives(followed, model, call, runs[runs.index(run) :], time.perf_counter() - begin)
            return followed
    if example is not None and real:
        raise UsageError(f"the model cannot be called with example_inputs ({followed.problem})")
    if followed.problem is None or example is None:
        followed.problem = "no input is known"
    return followed


Run = Callable[[Call, str, bool], Record]


def _on_skeleton(skeleton: nn.Module, hooked: dict[str, str], seconds: float) -> Run:
    def run(call: Call, how: str, training: bool) -> Record:
        return record(skeleton.train(training), call.map(_ghost), how, hooked, seconds)

    return run


def _on_shadow(model: nn.Module, hooked: dict[str, str]) -> Run:
    device = next((t.device for t in itertools.chain(model.parameters(), model.buffers())), torch.device("cpu"))

    def run(call: Call, how: str, training: bool) -> Record:
        return record(shadow_of(model).train(training), call.map(lambda t: filled(t, device)), how, hooked)

    return run


def _multiply_adds(record: Record, model: nn.Module) -> float:
    """Those of the convolutions and linear layers, for one sample: each output takes a row of weights."""
    total, modules = 0.0, dict(model.named_modules())
    for name, calls in record.calls.items():
        weight = modules[name]._parameters.get("weight")  # no attribute: a parametrized one would be computed
        if weight is not None and weight.ndim > 1:
            row = weight.numel() / max(weight.shape[0], 1)
            total += sum(row * math.prod(call.made.shape[1:]) for call in calls if call.made is not None)
    return total


def _follow_alternatives(followed: Followed, model: nn.Module, call: Call, runs: list[Run], seconds: float) -> None:
    end = time.perf_counter() + max(SECONDS_FOR_ALTERNATIVES, 2 * seconds)
    for number, (how, choices, training) in enumerate(_alternatives(model, call)):
        if number >= MAX_ALTERNATIVES or time.perf_counter() > end:
            followed.unfollowed.append(how)
            continue
        why = ""
        for kwargs, run in itertools.product(choices, runs):
            try:
                followed.records.append(run(call.with_kwargs(**kwargs), how, training))
            except Exception as error:
                why = why or f" ({one_line(error)}{_line_in_the_model(error)})"
                continue
            followed.ways.append((how, kwargs, training))
            break
        else:
            followed.unfollowed.append(how + (why if training else ""))
    together = {key: value for _, kwargs, training in followed.ways if not training for key, value in kwargs.items()}
    if len(together) > 1 and time.perf_counter() < end:  # a reader may want several of them
        try:
            followed.records.append(runs[0](call.with_kwargs(**together), "all of them at once", False))
            followed.ways.append(("all of them at once", together, False))
        except Exception:  # some exclude one another
            pass


def _alternatives(model: nn.Module, call: Call) -> Iterator[tuple[str, list[dict[str, Any]], bool]]:
    """Each way of calling in words, with keyword arguments to try until one is accepted, and whether it is training."""
    yield "training mode", [{}], True
    parameters = _named_parameters(model)
    positional = [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    given = {*positional[: max(1, len(call.args))], *call.kwargs}
    for parameter in parameters:
        default = parameter.default
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            yield f"what **{parameter.name} may hold", [], False
        elif parameter.name in given or default is parameter.empty:
            continue
        elif isinstance(default, bool):
            yield f"{parameter.name}={not default}", [{parameter.name: not default}], False
        elif default is None:
            annotation = str(parameter.annotation)
            if "bool" in annotation:
                yield f"{parameter.name}=True", [{parameter.name: True}], False
            else:
                yield parameter.name, [{parameter.name: tensor} for tensor in _optional_tensors(call)], False
        else:  # a number, a word: which other values there are is not known
            yield parameter.name, [], False


def _named_parameters(model: nn.Module) -> list[inspect.Parameter]:
    """The parameters of a model's ``forward``; behind ``*args`` and ``**kwargs``, those of the networks inside.

    A ``**kwargs`` is one of them if no network inside says what it may hold.
    """
    try:
        own = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return []
    found = {p.name: p for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    for rest in [p for p in own if p.kind is p.VAR_KEYWORD]:
        inside = [child for child in model.children() if any(map(is_batch_norm, child.modules()))]
        passed_on = [p for child in inside if not is_layer(child) for p in _named_parameters(child)]
        for parameter in passed_on or [rest]:
            found.setdefault(parameter.name, parameter)
    return list(found.values())


def _optional_tensors(call: Call) -> list[Tensor]:
    """What an optional argument may be, for an input (N, C, …): a mask of the positions, or one more such input."""
    first = next((t for t in tensors_in([call.args, dict(call.kwargs)]) if t.ndim > 1), None)
    if first is None:
        return []
    positions = (first.shape[0], *first.shape[2:]) if first.ndim > 2 else first.shape
    return [
        torch.ones(positions, dtype=torch.bool, device=first.device),
        torch.ones((first.shape[0], 1, *first.shape[2:]), dtype=first.dtype, device=first.device),
        torch.ones(first.shape, dtype=first.dtype, device=first.device),
    ]


def filled(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor with values: itself, or, of one on the meta device, normal numbers (ones where it holds integers)."""
    if not tensor.is_meta:
        return tensor.to(device)
    if tensor.is_floating_point():
        generator = torch.Generator().manual_seed(0)
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(device, tensor.dtype)
    return torch.ones(tensor.shape, dtype=tensor.dtype, device=device)


def _ghost(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _hooked(model: nn.Module) -> dict[str, str]:
    """The modules that carry a forward hook, and what to call it."""
    found = {}
    for name, module in model.named_modules():
        for hooks in HOOKS[:2]:
            for hook in getattr(module, hooks).values():
                if not hasattr(hook, "compute_weight"):
                    found[name] = f"a forward hook of {name or 'the model'}"
    return found


def _is_of_the_device(error: Exception) -> bool:
    """Whether a pass failed for being on the meta device and a real one may do (it looks at values, say)."""
    text = str(error).lower()
    return isinstance(error, (TooSlow, NotImplementedError)) or any(
        word in text for word in ("meta", "same device", "data-dependent", "data_dependent", "no data", "tensor.item")
    )


def _line_in_the_model(error: BaseException) -> str:
    """Where in the model's own code an exception came up, as `` at file.py:12``."""
    line, trace = "", error.__traceback__
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if is_own_line(path):
            line = f" at {path.rpartition('/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return line
