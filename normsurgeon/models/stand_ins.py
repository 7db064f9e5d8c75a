"""What a pickled checkpoint may hold beside its tensors: plain data, read as empty stand-ins of it.

Training scripts keep a metric as a NumPy scalar, a path as a ``pathlib.Path``, settings as a dictionary of their own.
None of it is needed, and none of its classes is imported or called: each name is read as a class of this file.
"""

from __future__ import annotations

import argparse
from functools import cache
from typing import Any

_OBJECTS = {
    "numpy": ("dtype", "ndarray", "bool_", "bool", "int32", "int64", "float16", "float32", "float64"),
    "numpy.core.multiarray": ("scalar", "_reconstruct"),
    "numpy._core.multiarray": ("scalar", "_reconstruct"),
    "numpy.core.numeric": ("_frombuffer",),
    "numpy._core.numeric": ("_frombuffer",),
    "numpy.dtypes": tuple(
        f"{kind}DType" for kind in ("Bool", "Int32", "Int64", "Float16", "Float32", "Float64", "Str")
    ),
    "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"),
    "datetime": ("datetime", "date", "time", "timedelta", "timezone"),
    "types": ("SimpleNamespace",),
}

_DICTIONARIES = {
    "collections": ("defaultdict",),
    "lightning.fabric.utilities.data": ("AttributeDict",),
    "lightning_fabric.utilities.data": ("AttributeDict",),
    "pytorch_lightning.utilities.parsing": ("AttributeDict",),
    "easydict": ("EasyDict",),
    "fvcore.common.config": ("CfgNode",),
    "yacs.config": ("CfgNode",),
}

_FACTORIES = {"builtins": ("int", "float", "str", "list", "dict"), "__builtin__": ("int", "float", "list", "dict")}
"""Of a defaultdict: named there, and never called."""


class _Object:
    """Takes what any constructor and any ``__setstate__`` may be given, and keeps nothing."""

    def __new__(cls, *_: Any) -> _Object:
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _Dictionary(_Object):
    """Becomes a plain dictionary, which torch's reader can fill."""

    def __new__(cls, *_: Any) -> Any:
        return {}


def is_array(value: Any) -> bool:
    """Whether a value is what was read of a NumPy array."""
    return isinstance(value, _Object) and type(value).__name__ in ("ndarray", "_reconstruct", "_frombuffer")


@cache
def harmless_types() -> tuple[type, ...]:
    """For ``torch.serialization.safe_globals``: the stand-ins, and the Namespace in which timm keeps its arguments.

    >>> sorted({kind.__module__ for kind in harmless_types()})[:2]
    ['__builtin__', 'argparse']
    """
    stand_ins = [
        type(name, (base,), {"__module__": module})
        for table, base in ((_OBJECTS, _Object), (_FACTORIES, _Object), (_DICTIONARIES, _Dictionary))
        for module, names in table.items()
        for name in names
    ]
    return (argparse.Namespace, *stand_ins)
