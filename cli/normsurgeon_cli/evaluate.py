"""normsurgeon evaluate: how well a model classifies images, and how closely it follows another."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from normsurgeon.data.label_ways import check_way
from normsurgeon_cli import options
from normsurgeon_cli.console import print_json, print_message, print_table, progress


def evaluate(
    model: options.Model,
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help="A folder of class folders, demo, digits, fashion-mnist, or a timm data set (torch/…, hfds/…).",
            show_default=False,
        ),
    ],
    baseline: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Also measure the agreement with this model.", show_default=False),
    ] = None,
    labels: options.Labels = "by-name",
    batch_size: options.BatchSize = 32,
    max_images: options.MaxImages = None,
    device: options.Device = None,
    weights: options.Weights = None,
    random_init: options.RandomInit = False,
    json: options.Json = False,
) -> None:
    """Measure MODEL on images: top-1, top-5, mean loss, images a second.

    Under torchrun and accelerate launch the processes share the images.
    """
    way = check_way(labels)
    network = options.load(model, weights, random_init)
    reference = options.load(baseline) if baseline is not None else None
    import normsurgeon as ns

    with progress("evaluating") as on_progress:
        result = ns.evaluate(
            network,
            data,
            baseline=reference,
            labels=way,
            batch_size=batch_size,
            max_images=max_images,
            device=options.device_or_default(device),
            on_progress=on_progress,
        )
    document = {**result.to_dict(), "model": model}
    if json:
        print_json(document)
        return
    rows = [(label, text) for label, text in _lines(document) if text is not None]
    print_table(("", model), rows)
    if document["skipped"]:
        print_message(f"{document['skipped']} images could not be read and were skipped")


def _lines(document: dict[str, Any]) -> list[tuple[str, str | None]]:
    def percent(key: str) -> str | None:
        return None if document.get(key) is None else f"{100 * document[key]:.1f} %"

    def number(key: str) -> str | None:
        return None if document.get(key) is None else f"{document[key]:.4f}"

    return [
        ("images", str(document["images"])),
        ("top-1", percent("top1")),
        ("top-5", percent("top5")),
        ("mean loss", number("loss")),
        ("agreement with the baseline", percent("agreement")),
        ("KL from the baseline (nats)", number("kl")),
        ("images a second", f"{document['images_per_second']:.1f}"),
    ]
