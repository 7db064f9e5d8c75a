"""normsurgeon evaluate: how well a model classifies images, and how closely it follows another."""

from __future__ import annotations

from typing import Annotated

import typer

from normsurgeon.data.label_ways import check_way
from normsurgeon.render.document import Column, Table
from normsurgeon_cli import options
from normsurgeon_cli.console import print_json, print_message, print_table, progress, score_rows
from normsurgeon_cli.network import Network, load, takes_network

EXAMPLES = (
    "normsurgeon evaluate resnet50-gn.safetensors --data FOLDER --baseline resnet50",
    "normsurgeon evaluate my_nets:build --weights best.pt --data FOLDER --json",
)


@takes_network
def evaluate(
    *,
    network: Network,
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help="A folder of class folders, demo, digits, fashion-mnist, or a timm data set (torch/…, hfds/…).",
        ),
    ],
    baseline: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Also measure the agreement with this model."),
    ] = None,
    labels: options.Labels = "by-name",
    batch_size: options.BatchSize = 32,
    max_images: options.MaxImages = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Measure MODEL on images: top-1, top-5, mean loss, images a second.

    Under torchrun and accelerate launch the processes share the images.
    """
    way = check_way(labels)
    model, made = network.model, network.load()
    reference = load(baseline) if baseline is not None else None
    import normsurgeon as ns

    with progress("evaluating") as on_progress:
        result = ns.evaluate(
            made,
            data,
            baseline=reference,
            labels=way,
            batch_size=batch_size,
            max_images=max_images,
            device=options.device_or_default(device),
            on_progress=on_progress,
        )
    if json:
        print_json({**result.to_dict(), "model": model})
        return
    rows = [
        ("images", str(result.images)),
        *score_rows("baseline", result),
        ("images a second", f"{result.images_per_second:.1f}"),
    ]
    print_table(Table((Column(""), Column(model)), tuple(rows)))
    if result.skipped:
        print_message(f"{result.skipped} images could not be read and were skipped")
