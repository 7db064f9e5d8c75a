"""Options that are generated from a schema of settings: its names, types, defaults and descriptions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from normsurgeon._util.config import Config, extra_of, required_type


def with_settings(
    config: type[Config],
    *,
    only: Collection[str] | None = None,
    names: Mapping[str, str] = MappingProxyType({}),
    types: Mapping[str, type] = MappingProxyType({}),
    panels: Sequence[str] = (),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's parameter ``settings`` by one option for each setting.

    The command is called with those that were given. Their limits are checked where the settings are used.

    only    these settings; default: all
    names   options that have another name than their setting
    types   options that have another type than their setting
    panels  the order of the headings
    """
    fields = sorted(config.model_fields.items(), key=lambda item: _place(extra_of(item[1], "panel"), panels))
    chosen = {name: field for name, field in fields if only is None or name in only}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            given = {name: arguments.pop(name) for name in chosen}
            command(**arguments, settings={name: value for name, value in given.items() if value not in (None, [])})

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            if parameter.name != "settings":
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
                continue
            for name, field in chosen.items():
                flag = f"--{name.replace('_', '-')}" if field.default is False else None  # --no-compile says nothing
                annotation = _option(field, types.get(name, required_type(field)), names.get(name, flag))
                parameters.append(inspect.Parameter(name, parameter.KEYWORD_ONLY, default=None, annotation=annotation))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _place(panel: str | None, panels: Sequence[str]) -> int:
    return panels.index(panel) if panel in panels else len(panels)


def _option(field: Any, kind: Any, name: str | None) -> Any:
    metavar = None
    if get_origin(kind) is Literal:
        kind, metavar = str, "|".join(get_args(kind))
    elif kind == tuple[str, ...]:
        kind, metavar = list[str], "NAME"
    option = typer.Option(
        *([name] if name else []),
        help=field.description + _default(field.default),
        metavar=metavar,
        rich_help_panel=extra_of(field, "panel"),
    )
    return Annotated[kind | None, option]


def _default(value: Any) -> str:
    if value is None or value == ():
        return ""
    if isinstance(value, tuple):
        return f" Default: {' '.join(f'{part:g}' for part in value)}."
    return f" Default: {('no', 'yes')[value] if isinstance(value, bool) else value}."
