"""Whether the layer that feeds a batch norm can absorb a per-channel scale and shift, and if not, why.

It can when it is a convolution or linear layer that is linear in its weight and bias, whose parameters are its own, and
whose output nothing but that batch norm reads: in every recorded way of calling the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from normsurgeon.graph.linearity import channel_axis, is_linear_in_its_weights
from normsurgeon.graph.moves import Move
from normsurgeon.graph.recording import LayerCall, Record, Value
from normsurgeon.norms.batchnorm import is_batch_norm


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


@dataclass(frozen=True)
class _Fed:
    """What one call of a norm is fed by: the layer's output, or why it is none that nothing else reads."""

    source: Value | None
    reason: str | None
    moves: tuple[Move, ...] = ()


class ProducerFinder:
    """Answers for every batch norm of one model; the facts about shared tensors are gathered once."""

    def __init__(self, model: nn.Module, records: Sequence[Record]) -> None:
        self.records = records
        self.modules = dict(model.named_modules())
        self.owners: dict[object, set[str]] = {}
        for name, module in self.modules.items():
            for tensor in module._parameters.values():
                if tensor is not None:
                    for key in _identities(tensor):
                        self.owners.setdefault(key, set()).add(name)

    def find(self, norm: str) -> Producer:
        """The producer of the batch norm at the path ``norm``, as all records that reach it have it."""
        found: Producer | None = None
        for record in self.records:
            if record.calls.get(norm):
                seen = self._find_in(record, norm)
                if not seen.foldable:
                    return seen if record is self.records[0] else _in_words(seen, record.how)
                if found is not None and found.name != seen.name:
                    return Producer(found.name, found.class_name, f"in {record.how} it follows {seen.name}")
                found = seen
        if found is None or found.name is None:
            return Producer(None, None, "not reached by a forward pass")
        for record in self.records:
            if not record.calls.get(norm) and record.calls.get(found.name):
                why = f"in {record.how}, {found.name} is called without it"
                return Producer(found.name, found.class_name, why)
        return Producer(found.name, found.class_name, self._why_not(self.modules[found.name], found.name))

    def _find_in(self, record: Record, norm: str) -> Producer:
        calls = record.calls[norm]
        fed = [self._fed(call) for call in calls]
        first = fed[0].source
        name = first.layer if first is not None else None
        producer = Producer(name, type(self.modules[name]).__name__ if name is not None else None, None)
        for each in fed:
            if each.reason is not None:
                at = f"one of its {len(calls)} calls: " if len(calls) > 1 else ""
                return Producer(producer.name, producer.class_name, at + each.reason)
        assert name is not None
        others = {each.source.layer for each in fed if each.source is not None} - {name}
        if others:
            why = f"it is called {len(calls)} times, behind {name} and {sorted(map(str, others))[0]}"
            return Producer(name, producer.class_name, why)
        sources = {id(each.source) for each in fed}
        elsewhere = [call for call in record.calls.get(name, ()) if id(call.made) not in sources]
        if elsewhere:
            times = len(record.calls[name])
            return Producer(name, producer.class_name, f"{name} is called {times} times, not always for this norm")
        return Producer(name, producer.class_name, self._why_misaligned(name, fed))

    def _fed(self, call: LayerCall) -> _Fed:
        """Follow one call's input back through dimension moves, as long as nothing else reads it on the way."""
        value, reader = call.given, None
        if value is None:
            return _Fed(None, "its input is a constant")
        moves: list[Move] = []
        while True:
            others = [
                label for label, by, made in value.readers if not (by is call if reader is None else made is reader)
            ]
            if others:
                who = f"{value.layer}'s output" if value.layer is not None else "its input"
                return _Fed(value if value.layer else None, f"{who} is also read by {others[0]}")
            if value.layer is not None or value.move is None or value.source is None:
                break
            moves.append(value.move)
            reader, value = value, value.source
        if value.layer is None:
            return _Fed(None, f"follows {value.label}")
        layer = self.modules[value.layer]
        if is_batch_norm(layer):
            return _Fed(value, f"follows {type(layer).__name__} ({value.layer})")
        return _Fed(value, None, tuple(reversed(moves)))

    def _why_misaligned(self, name: str, fed: Sequence[_Fed]) -> str | None:
        """The producer's channels must arrive in dimension 1 of the norm's input."""
        layer = self.modules[name]
        for each in fed:
            assert each.source is not None
            if not each.source.shape:  # a traced graph knows no shapes
                if isinstance(layer, _ConvNd) and not each.moves:
                    continue
                return "its shape is unknown: pass example_inputs"
            axis: int | None = channel_axis(layer, len(each.source.shape))
            for move in each.moves:
                axis = move.axis(axis) if axis is not None else None
            if axis is None:
                return "its channels are flattened away before the norm"
            if axis != 1:
                return "its channels are not the norm's channels"
        return None

    def _why_not(self, layer: nn.Module, name: str) -> str | None:
        if parametrize.is_parametrized(layer):
            return f"{name} is parametrized"
        if "weight" not in layer._parameters or "bias" not in layer._parameters:
            return f"{name}'s weight is computed on the fly"
        for tensor in layer._parameters.values():
            for key in _identities(tensor) if tensor is not None else ():
                if len(self.owners[key]) > 1:
                    return f"{name} shares its parameters with {sorted(self.owners[key] - {name})[0]}"
        for record in self.records:
            if name in record.read:
                what, reader = record.read[name]
                return f"{name}'s {what} is also read directly, by {reader}"
        if not is_linear_in_its_weights(layer):
            return f"{name} is not linear in its weight and bias ({type(layer).__name__})"
        return None


def _in_words(producer: Producer, how: str) -> Producer:
    return Producer(producer.name, producer.class_name, f"in {how}, {producer.reason}")


def _identities(tensor: Tensor) -> list[object]:
    """What two parameters have in common if they are one: the object, or the memory."""
    if nn.parameter.is_lazy(tensor) or tensor.is_meta or not tensor.numel():
        return [id(tensor)]
    return [id(tensor), ("at", tensor.data_ptr())]
