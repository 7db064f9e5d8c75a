"""YAML with line numbers: plain values, and the line that each of them stands on.

Scalars are read as YAML 1.2 has them (https://yaml.org/spec/1.2.2/#103-core-schema): ``no`` and ``12:30`` are texts,
``1e-4`` is a number. YAML 1.1, which PyYAML follows by itself, has a boolean, 750 and a text.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import yaml

from normsurgeon.errors import UsageError

Path = tuple[str | int, ...]
"""Where a value is: ``("training", "epochs")``, ``("norms", 2)``; () is the whole document."""

MOST_BYTES = 1_000_000


@dataclass(frozen=True)
class Document:
    """A YAML file as plain values.

    file   as the user wrote it
    value  dicts, lists, texts, numbers, booleans, None; keys are texts as they stand
    lines  the line, from 1, of every key and of every entry of a list
    """

    file: str
    value: Any
    lines: dict[Path, int]

    def line(self, path: Path) -> int:
        """The line of a value; of the nearest thing around it, where it has none of its own.

        >>> Document("a.yaml", {"norms": "bn"}, {(): 1, ("norms",): 4}).line(("norms", 0))
        4
        """
        while path not in self.lines and path:
            path = path[:-1]
        return self.lines.get(path, 1)


def read_yaml(path: str | os.PathLike[str]) -> Document:
    """A file's one YAML document. Nothing in it is ever run: tags, anchors and aliases are refused.

    :raises UsageError: a file that cannot be read, or is not YAML, with its line; a key that comes twice.
    """
    file = os.fspath(path)
    try:
        with open(file, "rb") as stream:
            raw = stream.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise UsageError(f"{file} has more than {MOST_BYTES:,} bytes; is it the right file?")
        return parse_yaml(raw.decode("utf-8-sig"), file)
    except FileNotFoundError as error:
        raise UsageError(f"there is no file {file}; give the YAML file of a study") from error
    except IsADirectoryError as error:
        raise UsageError(
            f"{file} is a folder; give the YAML file of a study, such as {File(file, 'study.yaml')}"
        ) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UsageError(f"{file}:{line}: not a text in UTF-8; is it the right file?") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise UsageError(f"{file} cannot be read ({getattr(error, 'strerror', None) or error})") from error


def parse_yaml(text: str, file: str = "study.yaml") -> Document:
    """The same from a text.

    :raises UsageError: as ``read_yaml``.

    >>> parse_yaml("lr: 1e-4\\nnorms: [bn,\\n  no]").value
    {'lr': 0.0001, 'norms': ['bn', 'no']}
    >>> parse_yaml("lr: 1e-4\\nnorms: [bn,\\n  no]").lines
    {(): 1, ('lr',): 1, ('norms',): 2, ('norms', 0): 2, ('norms', 1): 3}
    """
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
        finally:
            loader.dispose()
        if root is None:
            raise UsageError(f"{file} is empty; a study has at least models, norms and datasets")
        lines: dict[Path, int] = {}
        return Document(file, _value(root, (), lines), lines)
    except _Refused as error:
        raise UsageError(f"{file}:{error.line}: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UsageError(f"{file}:{mark.line + 1 if mark else 1}: not YAML: {_problem(error)}") from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise UsageError(f"{file}:{line}: not YAML: the character U+{error.character:04X} is not allowed") from error
    except RecursionError as error:
        raise UsageError(f"{file} is nested too deeply; a study is a mapping of names, numbers and lists") from error


class _Refused(Exception):
    """YAML that is not read here."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line = line


class _Loader(yaml.SafeLoader):
    """PyYAML's safe parser, with the scalars of YAML 1.2 and without anchors."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (replaces that of PyYAML, which is YAML 1.1's)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:  # 10 lines of them can stand for 10^9 values
            raise _Refused(
                event.start_mark.line + 1, "anchors and aliases (& and *) are not read here; write the value out"
            )
        return super().compose_node(parent, index)


_INT, _FLOAT, _BOOL, _NULL = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "null"))
_STR, _SEQ, _MAP = (f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map"))
_Loader.add_implicit_resolver(_NULL, re.compile(r"^(?:~|null|Null|NULL|)$"), [*"~nN", ""])
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"])
_Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?[0-9]+$"), [*"-+0123456789"])
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    [*"-+0123456789."],
)


def _value(node: yaml.Node, path: Path, lines: dict[Path, int]) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    if isinstance(node, yaml.ScalarNode) and node.tag in (_INT, _FLOAT, _BOOL, _NULL, _STR):
        return _scalar(node, line)
    if isinstance(node, yaml.SequenceNode) and node.tag == _SEQ:
        return [_value(child, (*path, index), lines) for index, child in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode) and node.tag == _MAP:
        found: dict[str, Any] = {}
        for key, child in node.value:
            where = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused(where, "a key must be a name, and this one is a list or a mapping")
            place = (*path, key.value)
            if key.value in found:
                raise _Refused(where, f"the key {key.value!r} comes twice; it is on line {lines[place]} already")
            lines[place] = where
            found[key.value] = _value(child, place, lines)
        return found
    raise _Refused(line, f"the tag {node.tag} is not read here; leave it out")


def _scalar(node: yaml.ScalarNode, line: int) -> Any:
    text = node.value
    try:
        if node.tag == _INT:
            return int(text)
        if node.tag == _FLOAT:
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError as error:  # an explicit tag (!!int x), or more digits than Python reads
        raise _Refused(line, f"{text[:40]!r} is not a number") from error
    if node.tag == _BOOL:
        return text.lower() == "true"
    return None if node.tag == _NULL else text


def _problem(error: yaml.MarkedYAMLError) -> str:
    """PyYAML's own words, in one line; tabs get plainer ones."""
    problem = error.problem or error.context or "it cannot be parsed"
    if "'\\t'" in problem:
        return "there is a tab; indent with spaces"
    context = ""
    if error.context and error.problem and error.context_mark:
        context = f"{error.context} from line {error.context_mark.line + 1} on: "
    elif error.context and error.problem:
        context = f"{error.context}: "
    return " ".join(f"{context}{problem}".split())
