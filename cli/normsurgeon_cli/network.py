"""MODEL and the options that say how it is made: the same for every command that takes one."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normsurgeon.distributed import from_main_process, own_shard
from normsurgeon.errors import UsageError
from normsurgeon_cli.console import print_message, status

if TYPE_CHECKING:
    from torch import nn

PANEL = "The network"

_ARGUMENT = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A timm name (resnet50, resnet50.a1_in1k, hf-hub:…), torchvision:NAME, a checkpoint file, a folder with "
        "config.json, package.module:callable, or demo.",
        show_default=False,
    ),
]


def _option(name: str, help: str, **more: Any) -> Any:
    return typer.Option(name, help=help, rich_help_panel=PANEL, show_default=False, **more)


_OPTIONS: dict[str, tuple[Any, Any]] = {
    "weights": (
        Annotated[
            Path | None,
            _option("--weights", "A file or folder of weights to load instead of the published ones.", metavar="FILE"),
        ],
        None,
    ),
    "weights_prefix": (
        Annotated[
            str | None,
            _option("--weights-prefix", "Of several networks in the file, the one to load: student.", metavar="NAME"),
        ],
        None,
    ),
    "random_init": (Annotated[bool, _option("--random-init", "The architecture alone, with random weights.")], False),
    "num_classes": (
        Annotated[
            int | None,
            _option("--num-classes", "Its classes, if the weights do not show them.", min=0, metavar="N"),
        ],
        None,
    ),
    "in_chans": (
        Annotated[
            int | None,
            _option("--in-chans", "Its input channels, if the weights do not show them.", min=1, metavar="N"),
        ],
        None,
    ),
    "model_args": (
        Annotated[
            list[str] | None,
            _option("--model-args", "An argument of its constructor: act_layer=silu. Repeatable.", metavar="KEY=VALUE"),
        ],
        None,
    ),
}


@dataclass(frozen=True)
class Network:
    """MODEL as it was asked for: loaded by ``load``."""

    model: str
    weights: Path | None = None
    weights_prefix: str | None = None
    random_init: bool = False
    num_classes: int | None = None
    in_chans: int | None = None
    model_args: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[str | Path, ...]:
        """What is read, where it is a file."""
        return (self.model,) if self.weights is None else (self.model, self.weights)

    def load(self, random_init: bool | None = None) -> nn.Module:
        """The model, with a spinner; what was assumed is printed on standard error.

        random_init  in the place of ``--random-init``, for a command that needs no weights
        """
        if self.weights is not None and self.random_init:
            raise UsageError("--weights and --random-init exclude each other: leave one out")
        arguments = _arguments(self.model_args)
        for name, value in (("num_classes", self.num_classes), ("in_chans", self.in_chans)):
            if value is not None and name in arguments:
                raise UsageError(f"{name} is given twice: leave out --model-args {name}={arguments[name]}")
            arguments |= {} if value is None else {name: value}
        with status(f"loading {self.model} …"):
            import normsurgeon as ns

            random_init = self.random_init if random_init is None else random_init
            if random_init and own_shard().world > 1:
                import torch

                torch.manual_seed(from_main_process(torch.seed()))  # the same network in every process
            return ns.load(
                self.model,
                weights=self.weights,
                weights_prefix=self.weights_prefix,
                pretrained=not random_init,
                on_message=print_message,
                **arguments,
            )


def takes_network(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameter ``network`` by MODEL and its options; the command is called with a ``Network``.

    An option that the command has itself is left to it.
    """
    signature = inspect.signature(command, eval_str=True).parameters
    chosen = {name: option for name, option in _OPTIONS.items() if name not in signature}

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in ("model", *chosen)}
        given["model_args"] = tuple(given["model_args"] or ())
        command(**arguments, network=Network(**given))

    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("model", kind, annotation=_ARGUMENT) if name == "network" else parameter.replace(kind=kind)
        for name, parameter in signature.items()
    ]
    parameters += [
        inspect.Parameter(name, kind, default=default, annotation=annotation)
        for name, (annotation, default) in chosen.items()
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def load(model: str) -> nn.Module:
    """A second model: a baseline, a teacher."""
    return Network(model).load()


def _arguments(pairs: Collection[str]) -> dict[str, Any]:
    """The values of ``--model-args``, as Python writes them; true, false and none in any case; else text."""
    arguments: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--model-args takes KEY=VALUE, as in --model-args drop_rate=0.1, not {pair!r}")
        if key in arguments:
            raise UsageError(f"--model-args {key} is given twice: leave one out")
        word = text.capitalize() if text.lower() in ("true", "false", "none") else text
        try:
            arguments[key] = ast.literal_eval(word)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            arguments[key] = text
    return arguments
