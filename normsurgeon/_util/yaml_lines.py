"""YAML files as plain values, with the line of each, for errors that name it.

Scalars are read as YAML 1.2 has them (https://yaml.org/spec/1.2.2/#103-core-schema): ``no`` and ``12:30`` are texts,
``1e-4`` is a number.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from normsurgeon.errors import UsageError

Path = tuple[str | int, ...]
"""Where a value is: ``("training", "epochs")``, ``("norms", 2)``; () is the whole document."""

MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class Document:
    """A YAML file as plain values: dicts with texts as keys, lists, texts, numbers, booleans, None.

    file   as the user wrote it
    lines  the line, from 1, of every key and of every entry of a list
    """

    file: str
    value: Any
    lines: dict[Path, int]

    def line(self, path: Path) -> int:
        """The line of a value; of the nearest thing around it if it has none of its own.

        >>> Document("a.yaml", {"norms": "bn"}, {(): 1, ("norms",): 4}).line(("norms", 0))
        4
        """
        while path not in self.lines and path:
            path = path[:-1]
        return self.lines.get(path, 1)


def read_yaml(path: str | os.PathLike[str]) -> Document:
    """A file's one YAML document. Nothing in it is ever run: tags, anchors and aliases are refused.

    :raises UsageError: if the file cannot be read, is not YAML, or has a key twice; with the line.
    """
    file = os.fspath(path)
    try:
        if stat.S_IFMT(os.stat(file).st_mode) not in (stat.S_IFREG, stat.S_IFDIR):  # a pipe may never say anything
            raise UsageError(f"{file} is no regular file (a pipe, a socket or a device); give a YAML file")
        with open(file, "rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise UsageError(f"{file} has more than {MAX_BYTES:,} bytes; is it the right file?")
        return parse_yaml(raw.decode("utf-8-sig"), file)
    except FileNotFoundError as error:
        raise UsageError(f"there is no file {file}; give a YAML file") from error
    except IsADirectoryError as error:
        raise UsageError(f"{file} is a folder; give a YAML file, such as {File(file, 'study.yaml')}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UsageError(f"{file}, line {line}: not a text in UTF-8; is it the right file?") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise UsageError(f"{file} cannot be read ({getattr(error, 'strerror', None) or error})") from error


def parse_yaml(text: str, file: str = "study.yaml") -> Document:
    """The same from a text.

    :raises UsageError: as ``read_yaml``.

    >>> parse_yaml("lr: 1e-4\\nnorms: [bn,\\n  no]").value
    {'lr': 0.0001, 'norms': ['bn', 'no']}
    """
    lines: dict[Path, int] = {}
    try:
        # Nodes and not values: a node has its line and its tag, and nothing has been made of it yet.
        root = YAML(typ="safe", pure=True).compose(text)
        return Document(file, None if root is None else _value(root, (), lines), lines)
    except _Refused as error:
        raise UsageError(f"{file}, line {error.line}: {error}") from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UsageError(f"{file}, line {mark.line + 1 if mark else 1}: not YAML: {_problem(error)}") from error
    except ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise UsageError(
            f"{file}, line {line}: not YAML: the character U+{error.character:04X} is not allowed"
        ) from error
    except RecursionError as error:
        raise UsageError(f"{file} is nested too deeply; simplify it") from error


class _Refused(Exception):
    """YAML that is not read here."""

    def __init__(self, node: Any, text: str) -> None:
        super().__init__(text)
        self.line = node.start_mark.line + 1


def _value(node: Any, path: Path, lines: dict[Path, int]) -> Any:
    """The value of a node, the lines of all that is in it noted."""
    lines.setdefault(path, node.start_mark.line + 1)
    if node.anchor:  # ten lines of them can stand for 10^9 values
        raise _Refused(node, "anchors and aliases (& and *) are not read here; write the value out")
    kind = str(node.tag).removeprefix("tag:yaml.org,2002:")
    if isinstance(node, SequenceNode) and kind == "seq":
        return [_value(child, (*path, index), lines) for index, child in enumerate(node.value)]
    if isinstance(node, MappingNode) and kind == "map":
        found: dict[str, Any] = {}
        for key, child in node.value:
            if not isinstance(key, ScalarNode):
                raise _Refused(key, "a key must be a name, and this one is a list or a mapping")
            place = (*path, key.value)
            if key.value in found:
                raise _Refused(key, f"the key {key.value!r} comes twice; it is on line {lines[place]} already")
            lines[place] = key.start_mark.line + 1
            found[key.value] = _value(child, place, lines)
        return found
    if isinstance(node, ScalarNode):
        try:
            if kind in ("str", "timestamp"):
                return node.value
            if kind in ("int", "float", "bool", "null"):
                return _scalar(kind, node.value)
        except ValueError as error:  # an explicit tag (!!int x), or more digits than Python reads
            raise _Refused(node, f"{node.value[:40]!r} is not a number") from error
    raise _Refused(node, f"the tag {node.tag} is not read here; leave it out")


def _scalar(kind: str, text: str) -> Any:
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() in ("true", "yes", "on")  # the latter two after %YAML 1.1 alone
    if kind == "int":
        return int(text, 10 if text.lstrip("+-").isdigit() else 0)
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _problem(error: MarkedYAMLError) -> str:
    """The parser's own words, in one line; tabs get plainer ones."""
    problem = error.problem or error.context or "it cannot be parsed"
    if "'\\t'" in problem:
        return "there is a tab; indent with spaces"
    context = ""
    if error.context and error.problem:
        since = f" from line {error.context_mark.line + 1} on" if error.context_mark else ""
        context = f"{error.context}{since}: "
    return " ".join(f"{context}{problem}".split())
