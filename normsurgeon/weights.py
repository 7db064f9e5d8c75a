"""State dicts: reading them from files without unpickling code, fitting them to a model, writing them whole."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from normsurgeon.errors import CheckpointError

StateDict = dict[str, Tensor]

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "module")
_PREFIXES = ("module.", "_orig_mod.")


def read_file(path: str | os.PathLike[str]) -> tuple[StateDict, dict[str, Any]]:
    """The tensors of a ``.safetensors`` or pickled file, and everything else that stands beside them.

    :raises CheckpointError: no such file, truncated, not a checkpoint, or a pickle that holds code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file" if path.exists() else f"there is no file {path}")
    return _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path)


def fit(model: nn.Module, state: Mapping[str, Tensor], where: str, say: Callable[[str], None]) -> None:
    """Load a state dict into ``model``, strictly.

    Keys that differ only in name are matched in order when every shape agrees; ``say`` is told.

    :raises CheckpointError: tensors are missing, left over, or of another shape.
    """
    own = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    state = dict(state)
    if set(state) != set(own):
        renamed = _in_order(own, state)
        if renamed is not None:
            say(f"{where}: the names differ, so all {len(renamed)} tensors were matched in order (every shape agrees)")
            state = renamed
    missing, extra = [k for k in own if k not in state], [k for k in state if k not in own]
    if missing or extra:
        parts = [f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
                 for keys, what in ((missing, "missing"), (extra, "left over")) if keys]
        raise CheckpointError(
            f"{where} does not fit {type(model).__name__}: tensors {' and '.join(parts)}; is it another architecture?"
        )
    for key, tensor in own.items():
        if state[key].shape != tensor.shape:
            raise CheckpointError(
                f"{where} does not fit {type(model).__name__}: {key} has shape {tuple(state[key].shape)} in the file "
                f"and {tuple(tensor.shape)} in the model; another number of classes or channels?"
            )
    model.load_state_dict(state, strict=True)


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to disk, and rename it into place.

    Whatever happens, ``path`` holds either what it held or all of the new file.

    :raises CheckpointError: when the folder is missing or not writable, or the disk is full.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
        temporary = None
        _sync_folder(path.parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        text = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise CheckpointError(f"cannot write {path}: {text}; nothing was written") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_safetensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and header; tensors that share memory are written as copies."""
    seen: set[int] = set()
    tensors = {}
    for key, tensor in state.items():
        tensor = tensor.detach()
        address = tensor.untyped_storage().data_ptr()
        tensors[key] = tensor.clone() if address in seen else tensor.contiguous()
        seen.add(address)
    save_file(tensors, path, metadata=dict(metadata))


def check_writable(path: str | os.PathLike[str]) -> None:
    """Fail before the work and not after it.

    :raises CheckpointError: when a file could not be written at ``path``.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise CheckpointError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise CheckpointError(f"cannot write {path}: permission denied")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_safetensors(path: Path) -> bool:
    """By content where the name does not say: a header length of eight bytes, then JSON."""
    with open(path, "rb") as file:
        head = file.read(9)
    return path.suffix == ".safetensors" or (len(head) == 9 and head[8:] == b"{")


def _read_safetensors(path: Path) -> tuple[StateDict, dict[str, Any]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error})") from error


def _read_pickle(path: Path) -> tuple[StateDict, dict[str, Any]]:
    try:
        # timm's training script keeps its arguments in a Namespace: plain data, and the only class let in.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises nearly anything
        text = str(error)
        if "WeightsUnpickler" in text or "Unsupported" in text or "weights_only" in text:
            raise CheckpointError(
                f"{path} holds pickled code or is no checkpoint, and is not opened: code in a pickle runs when it is "
                "read; save model.state_dict() instead, or use safetensors"
            ) from error
        raise CheckpointError(f"{path} is truncated or not a checkpoint ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, and a state dict was expected")
    rest = {key: value for key, value in content.items() if not isinstance(value, Tensor)}
    for wrapper in _WRAPPERS:
        inner = content.get(wrapper)
        if isinstance(inner, dict) and any(isinstance(value, Tensor) for value in inner.values()):
            rest.pop(wrapper, None)
            content = inner
            break
    state = {_plain(str(key)): value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(f"{path} holds no tensors, and a state dict was expected")
    return state, rest


def _plain(key: str) -> str:
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _in_order(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> StateDict | None:
    """The file's tensors under the model's names, when they agree in number and shape one by one."""
    # Counters of seen batches come and go with the torch version that wrote a file.
    counted = any(key.endswith("num_batches_tracked") for key in state)
    names = [key for key in own if counted or not key.endswith("num_batches_tracked")]
    if len(names) != len(state):
        return None
    pairs = list(zip(names, state.values(), strict=True))
    if any(own[name].shape != tensor.shape for name, tensor in pairs):
        return None
    counters = {key: own[key] for key in own if key not in dict(pairs)}
    return {**dict(pairs), **counters}
