"""Settings: pydantic models that are checked when they are made, and whose errors are one line."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from typing_extensions import Self

from normsurgeon._util.suggest import suggest
from normsurgeon.errors import UsageError


class SettingError(UsageError, ValueError):
    """A setting that does not exist, or a value that it cannot have; ``path`` leads to it.

    A ValueError, so that pydantic adds the way to where a validator raises it.
    """

    def __init__(self, text: str, path: tuple[str | int, ...] = ()) -> None:
        super().__init__(text)
        self.path = path


class Config(BaseModel):
    """A frozen record of settings. Numbers are not made of texts, and flags are no numbers.

    >>> class Small(Config):
    ...     what = "this example"
    ...     lr: float = setting(0.1, "Learning rate.", gt=0)
    >>> Small(lr=1)
    Small(lr=1.0)
    >>> Small(lr=-1)
    Traceback (most recent call last):
    normsurgeon._util.config.SettingError: lr=-1 must be a number above 0
    >>> Small(rl=1)
    Traceback (most recent call last):
    normsurgeon._util.config.SettingError: this example has no setting 'rl'; did you mean lr?
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)
    what: ClassVar[str] = "this"
    """Of what these are the settings, for messages."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _one_line(type(self), values, error) from None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """The settings among a function's arguments, as its ``locals()`` gives them."""
        return cls(**{name: arguments[name] for name in cls.model_fields})

    def replace(self, **changes: Any) -> Self:
        """These settings with some of them changed, checked like new ones.

        :raises SettingError: if a setting does not exist, or cannot have that value.
        """
        return type(self)(**{**dict(self), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain types that JSON keeps as they are."""
        return self.model_dump(mode="json")


def setting(
    default: Any, description: str, *, panel: str | None = None, must_be: str | None = None, **limits: Any
) -> Any:
    """A field of a ``Config``.

    panel    the heading that its option stands under in the command line's help
    must_be  how an error describes the values that are allowed; default: from the type and the limits
    limits   pydantic's ``ge``, ``gt``, ``le``
    """
    extra: dict[str, Any] = {key: value for key, value in (("panel", panel), ("must_be", must_be)) if value is not None}
    return Field(default, description=description, json_schema_extra=extra or None, **limits)


def extra_of(field: FieldInfo, name: str) -> str | None:
    """What ``setting`` was given as ``panel`` or ``must_be``."""
    extra = field.json_schema_extra
    return str(extra[name]) if isinstance(extra, dict) and name in extra else None


def required_type(field: FieldInfo) -> Any:
    """The type of a field's values other than None.

    >>> class Small(Config):
    ...     steps: int | None = setting(None, "Updates.")
    >>> required_type(Small.model_fields["steps"])
    <class 'int'>
    """
    kind = field.annotation
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(each for each in get_args(kind) if each is not type(None))
    return kind


def _one_line(config: type[Config], values: Mapping[str, Any], error: ValidationError) -> SettingError:
    """The first of pydantic's errors."""
    first = error.errors(include_url=False)[0]
    path = first["loc"]
    if (cause := cause_of(first)) is not None:
        return cause
    name = str(path[0]) if path else ""
    if first["type"] == "extra_forbidden":
        return SettingError(f"{config.what} has no setting {name!r}; {suggest(name, config.model_fields)}", path)
    if name not in config.model_fields:  # of all settings together
        return SettingError(first["msg"].removeprefix("Value error, "), path)
    field = config.model_fields[name]
    kind = required_type(field)
    if get_origin(kind) is Literal:
        choices = [str(each) for each in get_args(kind)]
        return SettingError(f"{name}={values.get(name)!r} is unknown; {suggest(str(values.get(name)), choices)}", path)
    return SettingError(f"{name}={values.get(name)!r} must be {extra_of(field, 'must_be') or _allowed(field)}", path)


def cause_of(found: ErrorDetails) -> SettingError | None:
    """The SettingError behind one of pydantic's errors, if that is what it is, with the whole path."""
    cause = found.get("ctx", {}).get("error")
    return SettingError(str(cause), (*found["loc"], *cause.path)) if isinstance(cause, SettingError) else None


_KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}


def _allowed(field: FieldInfo) -> str:
    """What a setting's values must be: its type and its limits in words."""
    limits = {key: getattr(each, key) for each in field.metadata for key in ("ge", "gt", "le") if hasattr(each, key)}
    kind = required_type(field)
    words = _KINDS.get(kind, "a list" if get_origin(kind) is tuple else "another value")
    if "le" in limits:
        return f"{words} from {limits.get('ge', -math.inf):g} to {limits['le']:g}"
    if "gt" in limits:
        return f"{words} above {limits['gt']:g}"
    if "ge" in limits:
        return f"{words} of at least {limits['ge']:g}"
    return "a finite number" if kind is float else words
