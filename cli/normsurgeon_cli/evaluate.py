"""normsurgeon evaluate: how well a model classifies images, and how closely it follows another."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from normsurgeon_cli import options
from normsurgeon_cli.console import print_json, print_message, print_table, progress
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
            show_default=False,
        ),
    ],
    baseline: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Also measure the agreement with this model.", show_default=False),
    ] = None,
    batch_size: options.BatchSize = 32,
    max_images: options.MaxImages = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Measure MODEL on images: top-1, top-5, mean loss, images a second.

    Under torchrun and accelerate launch the processes share the images.
    """
    model, made = network.model, network.load()
    reference = load(baseline) if baseline is not None else None
    import normsurgeon as ns

    with progress("evaluating") as on_progress:
        result = ns.evaluate(
            made,
            data,
            baseline=reference,
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
