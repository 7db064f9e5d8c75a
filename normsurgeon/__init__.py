"""normsurgeon: convert a network's BatchNorm layers to other norms, and keep its function.

    >>> import normsurgeon as ns
    >>> sorted(ns.TARGETS)
    ['affine', 'fold', 'gn', 'in', 'ln', 'ln2d', 'rms', 'rms2d']

Importing this package is cheap: torch and timm come in with the first function that needs them.
"""

from __future__ import annotations

from typing import Any

import lazy_loader

_import, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names are in __init__.pyi


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'normsurgeon' has no attribute {name!r}")
    from normsurgeon._util.imports import explained_imports

    with explained_imports():
        value = _import(name)
    globals()[name] = value
    return value
