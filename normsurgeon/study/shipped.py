"""The studies that come with the package."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "configs"


def names() -> list[str]:
    """The files there are.

    >>> names()
    ['activations.yaml', 'batch-size.yaml', 'preprocessing.yaml', 'quick.yaml']
    """
    return sorted(path.name for path in FOLDER.glob("*.yaml"))


def find(config: str | os.PathLike[str]) -> Path:
    """A file of the user's; where there is none, the shipped study of that name, with or without its ending.

    >>> find("quick").name
    'quick.yaml'
    """
    path = Path(config)
    if not path.is_file():
        for name in (path.name, f"{path.name}.yaml"):
            if str(path) == path.name and name in names():
                return FOLDER / name
    return path
