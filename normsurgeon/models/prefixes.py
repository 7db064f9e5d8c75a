"""Which of a file's tensors are a model's: those under the one prefix at which all of the model's names are found.

Training scripts keep a network beside others (``net.`` and ``ema_net.``), a criterion, a metric, or in a dictionary of
their own. Nothing needs to be known of their names: the model's own names say where it begins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from normsurgeon._util.suggest import suggest
from normsurgeon.errors import CheckpointError
from normsurgeon.patterns import shorten

_COUNTERS = ("total_ops", "total_params")
"""What thop's profiler leaves in every module."""
_AVERAGED = ("state_dict_ema", "model_ema")
"""Where timm's and torchvision's training scripts keep the moving average beside the raw weights."""


@dataclass(frozen=True)
class Found:
    """Where a model's tensors are in a file, and what else is there.

    prefix    what stands before each of the model's names: ``""``, ``"module."``, ``"state_dict.net."``
    taken     the file's names under it
    left_out  the file's names elsewhere, and those of counters
    whole     whether the model has all that is taken; if not, the file is of another architecture
    raw       the prefix of the raw weights, where these are their moving average
    """

    prefix: str
    taken: tuple[str, ...]
    left_out: tuple[str, ...]
    whole: bool
    raw: str | None = None

    def under(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What was taken, by the model's names."""
        return {key.removeprefix(self.prefix): state[key] for key in self.taken}

    @property
    def message(self) -> str | None:
        """What was taken and what was left out, where anything was."""
        took = f"took the tensors of {_shown(self.prefix)}" if self.prefix else ""
        if self.raw is not None:
            took = f"took the averaged weights, {_shown(self.prefix)}; the others: --weights-prefix {_shown(self.raw)}"
        if not self.left_out:
            return took if self.raw is not None else None
        groups = dict.fromkeys(_group(name, self.prefix) for name in self.left_out)
        return f"{took}{'; ' if took else ''}left out {shorten(groups, most=4)}"


def is_batch_counter(name: str) -> bool:
    """Counters of seen batches, which come and go with the torch version that wrote a file."""
    return name.endswith("num_batches_tracked")


def find(own: Iterable[str], state: Mapping[str, Tensor], where: str, wanted: str | None = None) -> Found | None:
    """Where all of a model's names are found in a file; None where they are nowhere.

    own     the model's names
    wanted  the prefix that the user chose, or a part of it

    :raises CheckpointError: if they are in several places and ``wanted`` does not choose, or chooses none.
    """
    names = set(own)
    known = {name for name in names if not is_batch_counter(name)}
    counts = _overlaps(known, state)
    covering = [prefix for prefix, count in counts.items() if count == len(known)] if known else [""]
    chosen = covering if wanted is None else _chosen(wanted, covering, state, where)
    places = [_found(prefix, names, state, covering) for prefix in chosen]
    places = [place for place in places if place.whole] or places
    if len(places) > 1:
        return _of_several(places, state, where)
    return places[0] if places else None


def nearest(own: Iterable[str], state: Mapping[str, Tensor]) -> str:
    """The prefix under which most of a model's names are."""
    return max(_overlaps(set(own), state).items(), key=lambda item: item[1], default=("", 0))[0]


def _overlaps(known: set[str], state: Mapping[str, Tensor]) -> Counter[str]:
    """How many of the known names are under each prefix."""
    counts: Counter[str] = Counter()
    for key in state:
        at = 0
        while True:
            if key[at:] in known:
                counts[key[:at]] += 1
            dot = key.find(".", at)
            if dot < 0:
                break
            at = dot + 1
    return counts


def _chosen(wanted: str, covering: list[str], state: Mapping[str, Tensor], where: str) -> list[str]:
    wanted = wanted.strip(".")
    chosen = [prefix for prefix in covering if prefix.rstrip(".") == wanted]
    chosen = chosen or [prefix for prefix in covering if wanted and f".{wanted}." in f".{prefix}"]
    if chosen or (not covering and any(f".{wanted}." in f".{key}" for key in state)):
        return chosen
    there = [_shown(prefix) for prefix in covering] or list(dict.fromkeys(key.partition(".")[0] for key in state))
    raise CheckpointError(f"{where} has no such network under {wanted!r}; {suggest(wanted, there[:8])}")


def _found(prefix: str, names: set[str], state: Mapping[str, Tensor], covering: list[str]) -> Found:
    others = tuple(other for other in covering if other != prefix and other.startswith(prefix))
    own = [key for key in state if key.startswith(prefix) and not key.startswith(others)]
    taken = [key for key in own if key.rpartition(".")[2] not in _COUNTERS or key.removeprefix(prefix) in names]
    among = set(taken)
    elsewhere = [key for key in state if key not in among and not is_batch_counter(key)]
    whole = all(key.removeprefix(prefix) in names or is_batch_counter(key) for key in taken)
    return Found(prefix, tuple(taken), tuple(elsewhere), whole)


def _of_several(places: list[Found], state: Mapping[str, Tensor], where: str) -> Found:
    averaged = [place for place in places if place.prefix.partition(".")[0] in _AVERAGED]
    if len(places) == 2 and len(averaged) == 1:
        (raw,) = (place.prefix for place in places if place is not averaged[0])
        left_out = tuple(key for key in averaged[0].left_out if not key.startswith(raw))
        return replace(averaged[0], left_out=left_out, raw=raw)
    first, *others = (place.under(state) for place in places)
    if all(_same(first, other) for other in others):
        return places[0]
    raise several([place.prefix for place in places], where)


def several(prefixes: list[str], where: str) -> CheckpointError:
    """The error of a file with several networks that fit."""
    names = [_shown(prefix) for prefix in prefixes]
    return CheckpointError(
        f"{where} holds {len(names)} networks that fit: {shorten(names)}; "
        f"say which: --weights-prefix {names[0]} (in Python: weights_prefix={prefixes[0].rstrip('.')!r})"
    )


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        value.shape == other[key].shape and torch.equal(value, other[key]) for key, value in one.items()
    )


def _shown(prefix: str) -> str:
    return prefix.rstrip(".") or '""'


def _group(name: str, prefix: str) -> str:
    """A name that was left out, as far as it differs from the prefix: ``state_dict.criterion`` for its weights."""
    if name.rpartition(".")[2] in _COUNTERS:
        return name.rpartition(".")[2]
    parts, shared = name.split("."), prefix.split(".")
    depth = next((i for i, part in enumerate(parts) if i >= len(shared) or part != shared[i]), 0)
    return ".".join(parts[: depth + 1])
