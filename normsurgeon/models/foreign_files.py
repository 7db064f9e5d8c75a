"""Files and folders that stand for weights (a folder of Hugging Face, an index of shards), and those that cannot be.

What a file is, is read from its first bytes and, of an archive, from the names in it; nothing is unpickled here.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from normsurgeon.errors import CheckpointError

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The files of weights that a folder of Hugging Face has, the better ones first."""
_MAX_JSON = 64 * 2**20
_MAX_SHARDS = 1000

_HEADS = (
    (b"version https://git-lfs", "a pointer of Git LFS, and the weights were not fetched; try: git lfs pull"),
    (b"<", "a page of the web, not weights: the download needs another address, or a login"),
    (b"\x89HDF", "an HDF5 file, as Keras writes it; PyTorch's weights are needed"),
    (b"GGUF", "a GGUF file, which holds quantized language models"),
    (b"\x1f\x8b", "compressed with gzip; try: gunzip, and give what comes out"),
    (b"\x93NUMPY", "one array of NumPy, and a state dict was expected"),
)
_TORCH_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The magic number with which torch.save began its files before it wrote archives."""


def weights_in(path: Path) -> Path:
    """The file of weights that a folder holds; a path that is no folder is given back.

    :raises CheckpointError: a folder with none.
    """
    if not path.is_dir():
        return path
    for name in WEIGHTS:
        if (path / name).is_file():
            return path / name
    if (path / ".metadata").is_file():
        raise CheckpointError(
            f"{path} is a folder of torch.distributed.checkpoint; "
            f"try: python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} weights.pt"
        )
    if (path / "zero_to_fp32.py").is_file():
        raise CheckpointError(f"{path} is a folder of DeepSpeed; try: the zero_to_fp32.py in it, and what that writes")
    inside = [entry.name for entry in _listed(path) if entry.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt")]
    hint = f"; try: {path / inside[0]}" if inside else ""
    raise CheckpointError(f"{path} is a folder, and a file of weights was expected{hint}")


def _listed(folder: Path) -> list[Path]:
    """What is in a folder, by name; nothing where that cannot be seen."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def read_index(path: Path) -> list[Path]:
    """The shards that an index of Hugging Face names; files beside it, and no others.

    :raises CheckpointError: a damaged index, or one that names files elsewhere.
    """
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{path} is no index of shards: it has no weight_map")
    names = list(dict.fromkeys(places.values()))
    if len(names) > _MAX_SHARDS or any(Path(name).name != name or name.endswith(".json") for name in names):
        raise CheckpointError(f"{path} is damaged: its shards must be files beside it")
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} of {len(names)} shards are not there ({missing[0]})")
    return [path.parent / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    :raises CheckpointError: for any other.
    """
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read(_MAX_JSON))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON file ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds a {type(content).__name__}, and an object was expected")
    return content


def what_it_is(path: Path, head: bytes) -> str | None:
    """What a file is that holds no state dict, and what to try; None for one that may."""
    for start, text in _HEADS:
        if head.startswith(start):
            return text
    if head.startswith(b"PK"):
        return _of_archive(path)
    if head.startswith(b"\x80") and not head.startswith(_TORCH_PICKLE) and _mentions(path, b"__author__"):
        return (
            "a pickle of Detectron2, with NumPy arrays under names of its own; "
            "try: load it with Detectron2, then torch.save(model.state_dict(), FILE)"
        )
    return None


def _of_archive(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return None  # a torch.save file that was cut short
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript program, which is code; try: torch.save(model.state_dict(), FILE) of the Python model"
    if any("serialized_exported_program" in name or name.endswith("/models/model.json") for name in names):
        return "a program of torch.export; try: torch.save(model.state_dict(), FILE) of the Python model"
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays; try: torch.from_numpy on each, then torch.save"
    if not any(name.endswith("data.pkl") for name in names):
        return "a ZIP archive and no checkpoint; try: unpack it, and give the file of weights in it"
    return None


def _mentions(path: Path, word: bytes, most: int = 4096) -> bool:
    """Whether a word is near the beginning or the end of a file."""
    with open(path, "rb") as file:
        beginning = file.read(most)
        file.seek(max(0, path.stat().st_size - most))
        return word in beginning or word in file.read(most)
