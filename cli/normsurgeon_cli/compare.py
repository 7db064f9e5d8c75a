"""normsurgeon compare: which norm to take for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from normsurgeon.distributed import is_main_process
from normsurgeon.errors import UsageError
from normsurgeon_cli import options
from normsurgeon_cli.console import out, print_json, print_message, program, progress
from normsurgeon_cli.network import Network, takes_network

EXAMPLES = (
    "normsurgeon compare resnet50",
    "normsurgeon compare resnet50 --data FOLDER --to gn,ln,rms --groups auto,8,16,32 --html norms.html",
)


@takes_network
def compare(
    *,
    network: Network,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Images to measure the damage on. Default: synthetic images, norm by norm."),
    ] = None,
    to: Annotated[str, typer.Option(metavar="TARGETS", help="Norms, with commas between; gn:8 sets groups.")] = (
        "rms,ln,gn"
    ),
    groups: Annotated[str, typer.Option(metavar="N,…", help="Groups of gn, with commas between: auto,8,16.")] = "auto",
    eps: Annotated[str | None, typer.Option(metavar="E,…", help="Softenings of the norms: 0.3,1.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the comparison as one page.")] = None,
    force: options.Force = False,
    labels: options.Labels = "by-name",
    batch_size: options.BatchSize = 32,
    max_images: Annotated[int, typer.Option(min=2, metavar="N", help="At most this many, spread evenly.")] = 300,
    input_shape: options.InputShape = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Compare conversions of MODEL: function kept, parameters, time, and what to do next.

    Without data each norm's own error is measured on synthetic features; with --data the network's outputs are.
    """
    if html is not None:
        if html.suffix != ".html":
            raise UsageError(f"{html}: the comparison is a page, and its name must end in .html")
        options.check_output(html, force, network.inputs)
    counts: list[Any] = [options.number_of_groups(text) for text in _parts(groups)]
    softenings: list[float | None] = [_softening(text) for text in _parts(eps)] if eps is not None else [None]
    example = options.example_inputs(input_shape)
    from normsurgeon.data.label_ways import check_way

    way = check_way(labels)
    made = network.load()
    import normsurgeon as ns
    from normsurgeon.render.terminal import print_document

    with progress("comparing") as on_progress:
        found = ns.compare(
            made,
            data,
            to=_parts(to),
            groups=counts,
            eps=softenings,
            labels=way,
            batch_size=batch_size,
            max_images=max_images,
            device=options.device_or_default(device),
            example_inputs=example,
            name=network.model,
            on_progress=on_progress,
        )
    if html is not None and is_main_process():
        found.save(html)
        print_message(f"wrote {html}")
    if json:
        print_json(found.to_dict())
        return
    print_document(found.document(), out())
    best = found.conversions[0].target.partition(",")[0]
    target, _, number = best.partition(":")
    more = f" --groups {number}" if number else ""
    print_message(f"next: {program()} convert {network.model} --to {target}{more} -o FILE.safetensors")


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _softening(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--eps takes numbers with commas between, as in 0.3,1, not {text!r}") from None
