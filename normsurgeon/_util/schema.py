"""What is read from files goes through a schema: strict types, ranges, and a line of error that names the field."""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from normsurgeon.errors import CheckpointError
from normsurgeon.printable import printable

MAX_TEXT = 2**24
"""Characters of a header or a plan: Python's objects take up to 24 times as many bytes."""

MAX_DEPTH = 50
_MAX_VALUES = 2**21
_MAX_WHERE = 120

STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
"""Numbers are not made of texts, and an unknown key is an error."""


class Schema(BaseModel):
    """A part of a file: frozen, and checked when it is read."""

    model_config = STRICT


def _printable(text: str) -> str:
    if printable(text, keep="") != text:
        raise ValueError("must have no control characters")
    return text


def _module_path(text: str) -> str:
    if not all(text.split(".")):
        raise ValueError("must be a module path, as in layer1.0.bn1")
    return _printable(text)


Name = Annotated[str, StringConstraints(max_length=200), AfterValidator(_printable)]
ModulePath = Annotated[str, StringConstraints(min_length=1, max_length=500), AfterValidator(_module_path)]
Words = Annotated[str, StringConstraints(max_length=10_000)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Shape = Annotated[tuple[Count, ...], Field(max_length=16)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]

Read = TypeVar("Read", bound=BaseModel)


def parsed(text: str, where: str) -> dict[str, Any]:
    """The JSON object that a text holds.

    :raises CheckpointError: no JSON, something else than an object, or one that is too large, too deep or has numbers
        that nothing can hold.
    """
    if len(text) > MAX_TEXT:
        raise damaged(where, "", f"it has {len(text)} characters, and at most {MAX_TEXT} are read")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(where, "", str(error)) from error
    if not isinstance(values, dict):
        raise damaged(where, "", f"a {type(values).__name__}, and a JSON object was expected")
    return values


def read_as(schema: type[Read], values: dict[str, Any], where: str) -> Read:
    """Plain values as a ``schema``; lists become tuples.

    where  the file, for errors; and which part of it

    :raises CheckpointError: a value that the schema does not allow, by the name of its field.
    """
    wrong = _why_not_plain(values)
    if wrong is not None:
        raise damaged(where, "", wrong)
    try:
        # As JSON: there a list is what a tuple is written as, and nothing is a tensor or an object with methods.
        return schema.model_validate_json(json.dumps(values))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise damaged(where, ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")) from error


def damaged(where: str, field: str, why: str) -> CheckpointError:
    """The error for a file that does not hold what it should: the file, the field, and what is wrong."""
    where = where if len(where) <= _MAX_WHERE else f"…{where[-_MAX_WHERE:]}"
    field = field if len(field) <= 60 else f"{field[:40]}…{field[-19:]}"
    return CheckpointError(f"{where} is damaged: {f'{field}: ' if field else ''}{why[:80]}")


def _why_not_plain(value: Any) -> str | None:
    """What keeps a value from being plain JSON of a bounded size; None if nothing does.

    Counts what is shared each time: a pickle writes a list that holds another twice in a few bytes, thirty times over.
    """
    pending, values, characters = [(value, 1)], 0, 0
    while pending:
        each, depth = pending.pop()
        values += 1
        if depth > MAX_DEPTH:
            return f"values are nested more than {MAX_DEPTH} deep"
        if isinstance(each, dict):
            if not all(isinstance(key, str) for key in each):
                return "a key is no text"
            values += len(each)
            characters += sum(map(len, each))
            pending.extend((inner, depth + 1) for inner in each.values())
        elif isinstance(each, (list, tuple)):
            pending.extend((inner, depth + 1) for inner in each)
        elif isinstance(each, str):
            characters += len(each)
        elif isinstance(each, int):
            if not -(2**63) <= each < 2**63:
                return "a number has more than 64 bits"
        elif not isinstance(each, float) and each is not None:
            return f"it holds a {type(each).__name__}"
        if values + len(pending) > _MAX_VALUES or characters > MAX_TEXT:
            return "it holds too much"
    return None
