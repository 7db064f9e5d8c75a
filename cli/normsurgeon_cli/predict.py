"""normsurgeon predict: what a model sees on images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from normsurgeon.render.document import Column, Table, Value
from normsurgeon_cli import options
from normsurgeon_cli.console import out, print_json, print_message, print_table, progress
from normsurgeon_cli.network import Network, takes_network

if TYPE_CHECKING:
    from normsurgeon import Predictions

EXAMPLES = (
    "normsurgeon predict resnet50 photo.jpg",
    "normsurgeon predict best.safetensors photos --classes FOLDER --top 3",
)


@takes_network
def predict(
    *,
    network: Network,
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE", help="Image files, and folders of them."),
    ],
    top: Annotated[int, typer.Option(min=1, metavar="N", help="How many classes an image.")] = 5,
    classes: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Class folders to take the names from, where the model's own classes are not known by name.",
        ),
    ] = None,
    batch_size: options.BatchSize = 32,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Show the most probable classes of each IMAGE, with their probabilities."""
    from normsurgeon._util.imports import explained_imports

    with explained_imports():
        from normsurgeon.inference.predict import image_files
    files = image_files(images)  # before the model: it may take minutes to fetch
    model, made = network.model, network.load()
    import normsurgeon as ns

    with progress("predicting") as on_progress:
        result = ns.predict(
            made,
            files,
            top=top,
            classes=classes,
            batch_size=batch_size,
            device=options.device_or_default(device),
            on_progress=on_progress,
        )
    if json:
        print_json({**result.to_dict(), "model": model})
    else:
        columns = (Column("image"), Column("class", "count"), Column("name"), Column("probability", "percent"))
        print_table(Table(columns, _rows(result)))
    if classes is not None and result.named_by == "model":
        print_message(f"--classes {classes} was not needed: the network's classes are known by name")
    if result.skipped:
        print_message(f"{len(result.skipped)} of {len(files)} images skipped:")
        for image in result.skipped:
            print_message(f"  {image.file} {image.reason}")


def _rows(result: Predictions) -> tuple[tuple[Value, ...], ...]:
    """A row a class. In a pipe every row names its image, for grep; at a terminal the first of each is enough."""
    terminal = out().is_terminal
    return tuple(
        ("" if terminal and place else image.file, number, image.names[place], image.probabilities[place])
        for image in result
        for place, number in enumerate(image.classes)
    )
