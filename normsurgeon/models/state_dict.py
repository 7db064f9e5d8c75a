"""State dicts: read from files without unpickling code, fitted to a model, written whole."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from normsurgeon.errors import CheckpointError
from normsurgeon.models.file_checks import check_pickle, check_safetensors, check_tensors

StateDict = dict[str, Tensor]

KEY = "normsurgeon"
"""The key of what normsurgeon writes in addition to the tensors."""

_PICKLE_HEADS = (b"PK", b"\x80")
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "module")
_PREFIXES = ("module.", "_orig_mod.")


def read_file(path: str | os.PathLike[str]) -> tuple[StateDict, dict[str, Any]]:
    """The tensors of a ``.safetensors`` or pickled file, and everything else in it.

    :raises CheckpointError: no such file, truncated, not a checkpoint, or a pickle that holds code.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, and a file of weights was expected")
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if not head:
        raise CheckpointError(f"{path} is empty: writing or copying it was cut short")
    # By content where the name does not say: a header length of eight bytes, then JSON.
    if path.suffix == ".safetensors" or (len(head) == 9 and head[8:] == b"{"):
        return _read_safetensors(path)
    if not head.startswith(_PICKLE_HEADS):
        raise CheckpointError(f"{path} is not a checkpoint: it begins neither like safetensors nor like torch.save")
    return _read_pickle(path)


def load_state_dict_into(
    model: nn.Module, state: Mapping[str, Tensor], where: str, on_message: Callable[[str], None]
) -> None:
    """Load a state dict into ``model``, strictly.

    :raises CheckpointError: as ``fit_state_dict``.
    """
    model.load_state_dict({**model.state_dict(), **fit_state_dict(model, state, where, on_message)}, strict=True)


def fit_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], where: str, on_message: Callable[[str], None]
) -> StateDict:
    """A state dict's tensors under the names that ``model`` has for them. Reads and allocates no values.

    Keys that differ only in name are matched in order when every shape agrees; ``on_message`` is called.

    :raises CheckpointError: tensors are missing, left over, or of another shape.
    """
    own = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    state = _without_prefix(own, state)
    if {k for k in state if not _counts(k)} != {k for k in own if not _counts(k)}:
        renamed = _in_order(own, state)
        if renamed is not None:
            on_message(
                f"{where}: the names differ, so all {len(renamed)} tensors were matched in order (every shape agrees)"
            )
            state = renamed
    state = {**{k: v for k, v in own.items() if _counts(k)}, **state}
    missing, extra = [k for k in own if k not in state], [k for k in state if k not in own]
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
        if state[key].shape != tensor.shape:
            raise CheckpointError(
                f"{where} does not fit {type(model).__name__}: {key} has shape {tuple(state[key].shape)} "
                f"in the file and {tuple(tensor.shape)} in the model; another number of classes or channels?"
            )
        if state[key].is_complex() and not tensor.is_complex():
            raise CheckpointError(f"{where} does not fit {type(model).__name__}: {key} has complex numbers in the file")
    return {key: state[key] for key in own}


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


def _read_safetensors(path: Path) -> tuple[StateDict, dict[str, Any]]:
    check_safetensors(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            rest = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error})") from error
    return _tensors(path, state, KEY not in rest), rest


def _read_pickle(path: Path) -> tuple[StateDict, dict[str, Any]]:
    check_pickle(path)
    try:
        # timm's training script keeps its arguments in a Namespace: plain data, and the only class let in.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
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
    for wrapper in _WRAPPERS:
        inner = content.get(wrapper)
        if isinstance(inner, dict) and any(isinstance(value, Tensor) for value in inner.values()):
            rest.pop(wrapper, None)
            content = inner
            break
    return _tensors(path, content, KEY not in rest), rest


def _tensors(path: Path, content: Mapping[Any, Any], foreign: bool) -> StateDict:
    """The tensors; from a file that normsurgeon did not write, without DDP's and torch.compile's prefixes."""
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(f"{path} holds no tensors, and a state dict was expected")
    check_tensors(path, state)
    while foreign and (prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in state)), None)):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _without_prefix(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> StateDict:
    """The state dict without what all keys begin with ("model." of Lightning), if that makes them fit."""
    known = {key for key in own if not _counts(key)}
    stripped = dict(state)
    while not known <= set(stripped):
        first = {key.partition(".")[0] for key in stripped}
        if len(first) != 1 or not all("." in key for key in stripped):
            return dict(state)
        stripped = {key.partition(".")[2]: value for key, value in stripped.items()}
    return stripped


def _in_order(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> StateDict | None:
    """The file's tensors under the model's names, where they agree one by one in shape and role.

    None, too, for a file whose order says nothing: safetensors sorts its tensors by name.
    """
    names, theirs = ([key for key in keys if not _counts(key)] for keys in (own, state))
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


def _counts(key: str) -> bool:
    """Counters of seen batches, which come and go with the torch version that wrote a file."""
    return key.endswith("num_batches_tracked")
