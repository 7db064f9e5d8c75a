"""The studies that come with the package."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from normsurgeon.errors import UsageError

FOLDER = Path(__file__).parent / "configs"


def names() -> list[str]:
    """The files there are.

    >>> names()
    ['activations.yaml', 'batch-size.yaml', 'preprocessing.yaml', 'quick.yaml']
    """
    return sorted(path.name for path in FOLDER.glob("*.yaml"))


def find(config: str | os.PathLike[str]) -> Path:
    """A file of the user's; where there is none, the shipped study of that name, with or without its ending.

    :raises UsageError: neither.

    >>> find("quick").name
    'quick.yaml'
    """
    path = Path(config)
    if path.exists() and not (path.is_dir() and f"{path}.yaml" in names()):
        return path
    for name in (str(path), f"{path}.yaml"):
        if name in names():
            return FOLDER / name
    near = difflib.get_close_matches(path.name, names(), 1)
    offer = f"did you mean {near[0]}?" if near else f"give the YAML file of a study, or one of {', '.join(names())}"
    raise UsageError(f"there is no file {config}; {offer}")
