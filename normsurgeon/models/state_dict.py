"""State dicts: read from files without unpickling code, fitted to a model, written whole."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from normsurgeon.errors import CheckpointError
from normsurgeon.models.file_checks import check_pickle, check_safetensors, check_tensors
from normsurgeon.models.foreign_files import read_index, weights_in, what_it_is
from normsurgeon.models.prefixes import find, is_batch_counter, nearest, several
from normsurgeon.models.stand_ins import harmless_types, is_array
from normsurgeon.patterns import shorten

StateDict = dict[str, Tensor]

KEY = "normsurgeon"
"""The key of what normsurgeon writes in addition to the tensors."""

_PICKLE_HEADS = (b"PK", b"\x80")
_WITHIN_NAMES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
"""What torch's wrappers (compile, activation checkpointing, FSDP) put into the names of the modules that they wrap."""
_DEEPEST = 4
"""Dictionaries within dictionaries in which tensors are looked for."""


def read_file(path: str | os.PathLike[str]) -> tuple[StateDict, dict[str, Any]]:
    """The tensors of a ``.safetensors`` or pickled file, and everything else in it.

    Of a file that normsurgeon did not write these are all tensors, also those in dictionaries within it, by their whole
    names: ``state_dict.net.conv1.weight``. A folder of Hugging Face stands for the file of weights in it, and an index
    for its shards.

    :raises CheckpointError: no such file, truncated, not a checkpoint, or a pickle that holds code.
    """
    path = weights_in(Path(path))
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if not head:
        raise CheckpointError(f"{path} is empty: writing or copying it was cut short")
    if path.name.endswith(".index.json"):
        parts = [read_file(shard) for shard in read_index(path)]
        return OrderedDict(item for state, _ in parts for item in state.items()), {}
    other = what_it_is(path, head)
    if other is not None:
        raise CheckpointError(f"{path} is {other}")
    # By content where the name does not say: a header length of eight bytes, then JSON.
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return _read_safetensors(path)
    if not head.startswith(_PICKLE_HEADS):
        raise CheckpointError(f"{path} is not a checkpoint: it begins neither like safetensors nor like torch.save")
    return _read_pickle(path)


def load_state_dict_into(
    model: nn.Module,
    state: Mapping[str, Tensor],
    where: str,
    on_message: Callable[[str], None],
    prefix: str | None = None,
) -> None:
    """Load a state dict into ``model``, strictly.

    :raises CheckpointError: as ``fit_state_dict``.
    """
    fitting = fit_state_dict(model, state, where, on_message, prefix)
    restore_(model, {**model.state_dict(), **fitting}, versions_of(fitting))


def fit_state_dict(
    model: nn.Module,
    state: Mapping[str, Tensor],
    where: str,
    on_message: Callable[[str], None],
    prefix: str | None = None,
) -> StateDict:
    """A state dict's tensors under the names that ``model`` has for them. Reads and allocates no values.

    The model's tensors are those under the one prefix that covers all of its names. Keys that differ only in name are
    matched in order when every shape agrees. ``on_message`` is called with what was left out, or matched in order.

    prefix  of several networks in the file, the one to take

    :raises CheckpointError: tensors are missing, left over, or of another shape; several networks in the file fit.
    """
    own = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    fitted = fit(own, state, where, on_message, prefix)
    missing, extra = [k for k in own if k not in fitted], [k for k in fitted if k not in own]
    if missing or extra:
        parts = [
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
            for keys, what in ((missing, "missing"), (extra, "left over"))
            if keys
        ]
        raise CheckpointError(
            f"{where} does not fit {type(model).__name__}: tensors {' and '.join(parts)}; is it another architecture?"
        )
    for key, tensor in own.items():
        problem = _problem(key, fitted[key], tensor)
        if problem is not None:
            raise CheckpointError(f"{where} does not fit {type(model).__name__}: {problem}")
    return fitted


def restore_(
    model: nn.Module, state: Mapping[str, Any], versions: Mapping[str, dict[str, int]] = MappingProxyType({})
) -> None:
    """``load_state_dict``, strictly, of values by name, in place.

    versions  of modules' formats, where they are not the model's own; a plain dictionary carries none, and without them
              torchvision's MNASNet refuses what it wrote itself
    """
    new = OrderedDict(state)
    own = versions_of(model.state_dict())
    new._metadata = {name: versions.get(name, version) for name, version in own.items()}  # type: ignore[attr-defined]
    model.load_state_dict(new, strict=True)


def fit(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    where: str,
    on_message: Callable[[str], None],
    prefix: str | None = None,
) -> StateDict:
    """A file's tensors under the model's names, as far as they can be found; shapes are not compared.

    :raises CheckpointError: several networks in the file fit, and ``prefix`` does not choose.
    """
    counters = {k: v for k, v in own.items() if is_batch_counter(k)}
    found = find(own, state, where, prefix)
    if found is not None and found.whole:
        if found.message is not None:
            on_message(f"{where}: {found.message}")
        fitted: StateDict = OrderedDict({**counters, **found.under(state)})
        start, known = found.prefix, versions_of(state)
        fitted._metadata = {  # type: ignore[attr-defined]
            f"{name}.".removeprefix(start).rstrip("."): entry
            for name, entry in known.items()
            if f"{name}.".startswith(start)
        }
        return fitted
    parts = ((start, _in_order(own, part)) for start, part in _parts(state))
    alike = {start: part for start, part in parts if part is not None and prefix in (None, start.rstrip("."))}
    if len(alike) > 1:
        raise several(list(alike), where)
    for renamed in alike.values():
        on_message(
            f"{where}: the names differ, so all {len(renamed)} tensors were matched in order (every shape agrees)"
        )
        return {**counters, **renamed}
    if found is not None:
        return {**counters, **found.under(state)}
    start = nearest(own, state)
    return {**counters, **{key.removeprefix(start): v for key, v in state.items() if key.startswith(start)}}


def write_safetensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and header; tensors that share memory are written as copies."""
    seen: set[int] = set()
    tensors = {}
    for key, tensor in state.items():
        tensor = tensor.detach()
        address = tensor.untyped_storage().data_ptr()
        tensors[key] = tensor.clone(memory_format=torch.contiguous_format) if address in seen else tensor.contiguous()
        seen.add(address)
    save_file(tensors, path, metadata=dict(metadata))


def write_pickle(path: Path, content: Any) -> None:
    """``torch.save``, but the same bytes under every name: into a file that it opens itself it writes the name."""
    with open(path, "wb") as file:
        torch.save(content, file)


def _read_safetensors(path: Path) -> tuple[StateDict, dict[str, Any]]:
    check_safetensors(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            rest = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error})") from error
    if not state:
        raise CheckpointError(f"{path} holds no tensors, and a state dict was expected")
    check_tensors(path, state)
    return state if KEY in rest else _plain_names(state), rest


def _read_pickle(path: Path) -> tuple[StateDict, dict[str, Any]]:
    check_pickle(path)
    try:
        with torch.serialization.safe_globals(list(harmless_types())), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises nearly anything
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if code is None:
            raise CheckpointError(
                f"{path} is truncated, or was not written by torch.save ({type(error).__name__})"
            ) from error
        raise CheckpointError(
            f"{path} holds pickled code ({code[1]}), which would run on reading, and is not opened; "
            "try: save model.state_dict() alone, or use safetensors"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, and a state dict was expected")
    rest = {key: value for key, value in content.items() if not isinstance(value, Tensor)}
    foreign = KEY not in rest
    state: StateDict = OrderedDict()
    versions: dict[str, dict[str, int]] = {}
    for prefix, part in _dictionaries(content if foreign else content.get("state_dict", {}), set()):
        tensors = {key: value for key, value in part.items() if isinstance(value, Tensor) and isinstance(key, str)}
        state.update((prefix + key, value) for key, value in tensors.items())
        versions.update(versions_of(part, prefix))
    state._metadata = versions  # type: ignore[attr-defined]
    if not state:
        raise CheckpointError(f"{path} {_nothing(content)}")
    check_tensors(path, state)
    return _plain_names(state) if foreign else state, rest


def _dictionaries(
    content: Any, seen: set[int], prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """A file's dictionaries, each once, and the prefix of each.

    Not those in lists or under numbers: that is where optimizers keep their state.
    """
    if not isinstance(content, dict) or id(content) in seen or depth > _DEEPEST:
        return
    seen.add(id(content))
    yield prefix, content
    for key, value in content.items():
        if isinstance(key, str):
            yield from _dictionaries(value, seen, f"{prefix}{key}.", depth + 1)


def versions_of(part: Mapping[Any, Any], prefix: str = "") -> dict[str, dict[str, int]]:
    """The versions of modules' formats that a state dict carries, by the modules' names."""
    found = getattr(part, "_metadata", None)
    if not isinstance(found, dict):
        return {}
    numbers = {name: entry.get("version") for name, entry in found.items() if isinstance(entry, dict)}
    return {f"{prefix}{name}": {"version": n} for name, n in numbers.items() if isinstance(n, int)}


def _plain_names(state: StateDict) -> StateDict:
    """The tensors without what torch's wrappers put into the names of modules."""

    def plain(name: str) -> str:
        for part in _WITHIN_NAMES:
            name = name.replace(part, "")
        return name

    renamed: StateDict = OrderedDict((plain(key), value) for key, value in state.items())
    if len(renamed) < len(state):
        return state
    renamed._metadata = {plain(f"{key}.").rstrip("."): entry for key, entry in versions_of(state).items()}  # type: ignore[attr-defined]
    return renamed


def _nothing(content: Mapping[Any, Any]) -> str:
    """What a file holds that holds no tensors."""
    if "param_groups" in content:
        return "holds the state of an optimizer, and no weights; try the file with the network's state dict"
    arrays = sum(is_array(value) for _, part in _dictionaries(content, set()) for value in part.values())
    if arrays:
        return f"holds {arrays} NumPy arrays, and no tensors; try: torch.from_numpy on each, then torch.save"
    return f"holds no tensors, and a state dict was expected; it has {shorten(map(str, content), most=4)}"


def _problem(key: str, theirs: Tensor, own: Tensor) -> str | None:
    """Why a file's tensor cannot stand for a model's."""
    if theirs.shape != own.shape:
        return (
            f"{key} has shape {tuple(theirs.shape)} in the file and {tuple(own.shape)} in the model; "
            "another number of classes or channels?"
        )
    if theirs.is_complex() and not own.is_complex():
        return f"{key} has complex numbers in the file"
    if own.is_floating_point() and not theirs.is_floating_point():
        return f"{key} is {str(theirs.dtype).removeprefix('torch.')} in the file: quantized weights cannot be loaded"
    return None


def _parts(state: Mapping[str, Tensor], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, StateDict]]:
    """The file as a whole, and what begins alike in it, with the beginnings; what all begins alike is no whole."""
    groups: dict[str, StateDict] = {}
    for key, value in state.items():
        first, dot, rest = key.partition(".")
        if dot and depth < _DEEPEST:
            groups.setdefault(first, {})[rest] = value
    if [len(group) for group in groups.values()] != [len(state)]:
        yield prefix, dict(state)
    for first, group in groups.items():
        yield from _parts(group, f"{prefix}{first}.", depth + 1)


def _in_order(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> StateDict | None:
    """The file's tensors under the model's names, where they agree one by one in shape and role.

    None, too, for a file whose order says nothing: safetensors sorts its tensors by name.
    """
    names, theirs = ([key for key in keys if not is_batch_counter(key)] for keys in (own, state))
    if len(names) != len(theirs) or (theirs == sorted(theirs) and names != sorted(names)):
        return None
    pairs = dict(zip(names, theirs, strict=True))
    for name, other in pairs.items():
        same_role = name.rpartition(".")[2] == other.rpartition(".")[2]  # "weight", "bias", "running_mean", …
        if own[name].shape != state[other].shape or not same_role:
            return None
        if other in own and other != name:  # a name that both know is not to land elsewhere
            return None
    return {name: state[other] for name, other in pairs.items()}
