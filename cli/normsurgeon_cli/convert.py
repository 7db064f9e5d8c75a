"""normsurgeon convert: replace a model's batch norms and write the result."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normsurgeon.distributed import is_main_process
from normsurgeon.errors import UsageError
from normsurgeon.recovery.config import ReconstructionConfig
from normsurgeon.render.document import Column, Table
from normsurgeon_cli import options
from normsurgeon_cli.console import out, print_json, print_message, print_table, program, progress, status
from normsurgeon_cli.network import Network, takes_network
from normsurgeon_cli.schema import with_settings

PROBE_IMAGES = 64

if TYPE_CHECKING:
    from normsurgeon.surgery.plan import ConversionPlan

EXAMPLES = (
    "normsurgeon convert resnet50 --to gn -o resnet50-gn.safetensors",
    "normsurgeon convert resnet50 --to ln --calibrate FOLDER -o resnet50-ln.safetensors",
)


@takes_network
@with_settings(ReconstructionConfig, only=("steps", "minutes"))
def convert(
    *,
    network: Network,
    to: Annotated[
        str,
        typer.Option(metavar="TARGET", help="gn, ln, ln2d, in, rms, rms2d, affine or fold."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Where to write: .safetensors, .pt or .pth."),
    ] = None,
    force: options.Force = False,
    groups: Annotated[
        str,
        typer.Option(metavar="N|auto", help="Groups of gn. auto: at most 32, at least 16 channels in each."),
    ] = "auto",
    eps: Annotated[
        float | None,
        typer.Option(metavar="E", help="Soften the norm towards the fixed affine (see the README)."),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Leave these batch norms alone. Repeatable.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="GLOB=TARGET", help="Another target for these; gn:8 sets groups. Repeatable."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="BUDGET",
            help="Convert as many sites as may be for this loss: 1% of top-1, kl=0.05 nats, error=5% of the outputs.",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Images that --budget is kept on; their labels count.")
    ] = None,
    among: Annotated[
        str | None,
        typer.Option(
            metavar="TARGETS",
            help="With --budget: what other sites may get, and other groups: ln,gn:4. Default: affine.",
        ),
    ] = None,
    balance: Annotated[
        bool,
        typer.Option(
            "--balance/--no-balance",
            help="Also choose a sign and weight for each channel, from synthetic images: keeps more.",
        ),
    ] = True,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Unlabelled images to match the new norms' outputs on: seconds, with at most 512 of them unless "
            "--max-images is larger. A folder, demo, digits, …",
        ),
    ] = None,
    reconstruct: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Unlabelled images to fit the network to the original on: minutes."),
    ] = None,
    settings: dict[str, Any],
    probe: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Unlabelled images to measure on what is left of the function, instead of synthetic ones: 64 of them.",
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Prove that nothing but the new norms' own statistics changes what the network computes.",
        ),
    ] = True,
    input_shape: options.InputShape = None,
    batch_size: options.BatchSize = 32,
    max_images: options.MaxImages = None,
    device: options.Device = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show the plan, one line a site; fetch no weights, write nothing."),
    ] = False,
    json: options.Json = False,
) -> None:
    """Convert the BatchNorm layers of MODEL to another norm and keep what the network computes.

    Without data, the norm's input is whitened by folding the running statistics into the layer before it. Unlabelled
    images bring back more: --calibrate in seconds, --reconstruct in minutes. Under torchrun and accelerate launch the
    processes share the images of --calibrate; the rest is the first's.
    """
    if output is not None and output.suffix not in (".safetensors", ".pt", ".pth"):
        raise UsageError(f"{output}: the ending says the format, and must be .safetensors, .pt or .pth")
    if settings and reconstruct is None:
        name, value = next(iter(settings.items()))
        raise UsageError(f"--{name} {value} is of --reconstruct: add --reconstruct DATA, or leave it out")
    for option, images in (("--calibrate", calibrate), ("--reconstruct", reconstruct)):
        if images is not None and output is None and not dry_run:
            raise UsageError(f"{option} {images} would be lost: add -o FILE, or --dry-run to see the plan alone")
    if budget is None and (data is not None or among is not None):
        raise UsageError("--data and --among are of --budget: add --budget 1%, or leave them out")
    if budget is not None and data is None:
        raise UsageError(f"--budget {budget} has to be kept on images: add --data DATA")
    if budget is not None and (dry_run or not balance):
        raise UsageError("--budget runs the network: leave out --dry-run and --no-balance")
    ReconstructionConfig(**settings)  # raises before minutes of download
    number = options.number_of_groups(groups)
    example = options.example_inputs(input_shape)
    overrides = [_pair(text) for text in set_ or []]
    from normsurgeon.norms.target_names import check_target

    check_target(to)  # before minutes of download
    if output is not None and not dry_run:
        options.check_output(output, force, (*network.inputs, data, calibrate, reconstruct, probe))
    for source in dict.fromkeys(filter(None, (data, calibrate, reconstruct, probe))):
        _look_for(source)
    import normsurgeon as ns

    model, random_init = network.model, network.random_init
    made = network.load(random_init=random_init or (dry_run and network.weights is None))
    # Random weights compute nothing worth following closely.
    asked: dict[str, Any] = {"name": model, "groups": number, "eps": eps, "keep": keep or [], "example_inputs": example}
    curve = None
    if budget is not None:
        with progress("choosing sites") as on_progress:
            curve = ns.trade_off(
                made,
                str(data),
                to=to,
                among=[part.strip() for part in (among or "affine").split(",") if part.strip()],
                budget=budget,
                must=overrides,
                batch_size=batch_size,
                max_images=max_images or 300,
                device=options.device_or_default(device),
                on_progress=on_progress,
                **asked,
            )
        plan = curve.plan(budget)
    else:
        with status("planning …"):
            plan = ns.plan(made, to, set=overrides, balance=balance and not random_init, **asked)
    for note in plan.notes:
        print_message(note)
    written = None
    proofs: dict[str, Any] = {}
    records: list[Any] = []
    if not dry_run:
        followed = calibrate is not None or reconstruct is not None  # the original is then needed afterwards
        with status("converting …"):
            looked_at = probe or data  # what a budget was kept on says more than synthetic images
            probed = _images(looked_at, made) if looked_at is not None else None
            carry_out = ns.convert if followed else ns.convert_
            result = carry_out(made, plan, check=check, verdict=not random_init, probe=probed)
        plan = result.plan or plan
        proofs = {name: getattr(result, name) for name in ("check", "verdict")}
        where = options.device_or_default(device)
        if calibrate is not None:
            with progress("calibrating") as on_progress:
                ns.calibrate_(
                    result,
                    calibrate,
                    batch_size=batch_size,
                    max_images=max_images,
                    device=where,
                    on_progress=on_progress,
                )
        if reconstruct is not None and is_main_process():
            with progress("reconstructing") as on_progress:
                ns.reconstruct_(
                    result,
                    reconstruct,
                    batch_size=batch_size,
                    max_images=max_images,
                    device=where,
                    on_progress=on_progress,
                    **settings,
                )
        records = result.history
        if output is not None and is_main_process():
            with status(f"writing {output} …"):
                written = ns.save(result, output, on_message=print_message)
    if json:
        document = plan.to_dict()
        document["trade_off"] = curve.to_dict() if curve is not None else None
        document.update((name, proof.to_dict() if proof is not None else None) for name, proof in proofs.items())
        print_json(
            {
                **document,
                "output": str(written) if written else None,
                "dry_run": dry_run,
                "history": [record.to_dict() for record in records],
            }
        )
        return
    if curve is not None:
        from normsurgeon.render.terminal import print_document

        print_document(curve.document(), out())
    _show(plan, each_site=dry_run)
    for name, proof in proofs.items():
        if proof is not None:
            out().print(f"{name}: {proof}", markup=False, soft_wrap=True)
    for record in records:
        out().print(record.summary, markup=False, soft_wrap=True)
    if written is not None:
        out().print(f"wrote {written} ({written.stat().st_size / 1e6:.1f} MB)", markup=False, soft_wrap=True)
        evaluate = f"{program()} evaluate {written} --data FOLDER --baseline {model}"
        print_message(f"next: {program()} inspect {written}   or   {evaluate}")
    elif dry_run:
        print_message("dry run: nothing was written")
    else:
        print_message("nothing was written: -o FILE.safetensors writes the converted model")


def _look_for(data: str) -> None:
    """Fail on data that is not there before the weights are fetched."""
    from normsurgeon._util.imports import explained_imports

    with explained_imports():
        from normsurgeon.data.splitting import open_split
    open_split(data, None, training=True, labels="none")


def _images(data: str, network: Any) -> Any:
    """64 images, spread evenly over the data, as the network takes them."""
    from normsurgeon.inference.views import open_views
    from normsurgeon.recovery.matching import held_images

    return held_images(open_views(data, [network], max_images=PROBE_IMAGES, classifiers=False, labels="none"))[0]


def _pair(text: str) -> tuple[str, str]:
    pattern, equals, target = text.rpartition("=")
    if not equals or not pattern or not target:
        raise UsageError(f"--set takes GLOB=TARGET, as in --set 'layer4.*=ln', not {text!r}")
    return pattern, target


def _show(plan: ConversionPlan, each_site: bool) -> None:
    if each_site:
        print_table(plan.table)
    else:
        alike: Counter[tuple[Any, ...]] = Counter(
            (d.site.class_name, d.status, d.target, d.groups, d.whitening, _gist(d.reason)) for d in plan.decisions
        )
        titles = ("sites", "from", "status", "to", "groups", "whitening", "reason")
        rows = tuple((number, *key) for key, number in alike.most_common())
        print_table(Table(tuple(map(Column, titles)), rows))
    out().print(plan.summary, markup=False, soft_wrap=True)


def _gist(reason: str | None) -> str | None:
    """A reason short enough to be shared by the sites of a group."""
    if reason and "is also read by" in reason:
        return "its input has another reader"
    return reason
