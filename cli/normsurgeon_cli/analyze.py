"""normsurgeon analyze: look inside a network while it sees images."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from normsurgeon.data.label_ways import check_way
from normsurgeon.distributed import is_main_process
from normsurgeon.errors import AnalysisStopped, UsageError
from normsurgeon_cli import options
from normsurgeon_cli.console import out, print_json, print_message, progress
from normsurgeon_cli.network import Network, load, takes_network

EXAMPLES = (
    "normsurgeon analyze resnet50-gn.safetensors --baseline resnet50 --html report.html",
    "normsurgeon analyze resnet50 --data FOLDER --only statistics --csv layers.csv",
)


@takes_network
def analyze(
    *,
    network: Network,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Compare layer by layer with this model."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="A folder of images, demo, digits, fashion-mnist, or a timm data set (torch/…). Default: demo.",
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(metavar="PARTS", help="Any of statistics, similarity (default), sensitivity, swap."),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option("--layers", metavar="GLOB", help="Only these modules. Repeatable."),
    ] = None,
    kinds: Annotated[
        str | None,
        typer.Option(metavar="KINDS", help="Any of norm, convolution, linear, block. Default: all."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Measure sensitivity by taylor, fisher, hessian_trace, noise (default), conductance, "
            "gradient_x_activation, feature_ablation.",
        ),
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Also try other eps, groups and scales of each norm.")] = False,
    swap_to: Annotated[
        str, typer.Option(metavar="TARGET", help="The norm that swap puts in the place of each batch norm.")
    ] = "gn",
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as one page.")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the layer table.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json-file", metavar="FILE", hidden=True)] = None,
    force: options.Force = False,
    labels: options.Labels = "by-name",
    batch_size: options.BatchSize = 16,
    max_images: options.MaxImages = None,
    sensitivity_images: Annotated[
        int, typer.Option(min=1, metavar="N", help="Images that sensitivity is measured with.")
    ] = 32,
    input_shape: options.InputShape = None,
    seed: Annotated[int, typer.Option(help="Of probes, noise and samples.")] = 0,
    device: options.Device = None,
    workers: Annotated[int, typer.Option(min=0, metavar="N", help="Processes that decode images.")] = 0,
    json: Annotated[
        bool,
        typer.Option(
            "--json",
            metavar="[FILE.json]",
            help="One JSON document on standard output, or into the file named after it.",
        ),
    ] = False,
) -> None:
    """Statistics and similarity of MODEL's layers, and sensitivity on request, as a report.

    Under torchrun and accelerate launch the processes share the images; sensitivity is measured by the first.
    """
    # Read when torch is loaded, below: else its idle threads would spin on the cores that statistics run on.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    files = [(path, ending) for path, ending in ((html, ".html"), (csv, ".csv"), (json_file, ".json")) if path]
    for path, ending in files:
        if path.suffix != ending:
            raise UsageError(f"{path}: that file is the report as {ending[1:]}, and its name must end in {ending}")
    for path, _ in files:
        options.check_output(path, force, (*network.inputs, baseline))
    way = check_way(labels)
    model, made = network.model, network.load()
    reference = load(baseline) if baseline is not None else None
    import normsurgeon as ns

    if data is None:
        print_message("no --data given: looking at the demo photographs, a handful of images")
    stopped: AnalysisStopped | None = None
    try:
        with progress() as on_progress:
            report = ns.analyze(
                made,
                data or "demo",
                baseline=reference,
                labels=way,
                **{key: _split(text) for key, text in (("only", only), ("kinds", kinds), ("methods", methods)) if text},
                layers=layers or (),
                sweep=sweep,
                swap_to=swap_to,
                batch_size=batch_size,
                max_images=max_images,
                sensitivity_images=sensitivity_images,
                seed=seed,
                device=options.device_or_default(device),
                workers=workers,
                example_inputs=options.example_inputs(input_shape),
                on_progress=on_progress,
                on_message=print_message,
                name=model,
                baseline_name=baseline,
                command=shlex.join(["normsurgeon", *sys.argv[1:]]),
            )
    except AnalysisStopped as stop:
        stopped, report = stop, stop.report
    for path, _ in files if is_main_process() else ():
        print_message(f"wrote {report.save(path)}")
    if stopped is not None:
        what = "what was done is written" if files else "--html FILE would have kept what was done"
        raise AnalysisStopped(f"{stopped}; {what}", stopped.signal, report)
    if json:
        print_json(report.to_dict())
        return
    from normsurgeon.render.terminal import print_document

    print_document(report.document(), out())
    if html is None:
        print_message("next: --html report.html writes this as a page")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
