"""normsurgeon demo: see it work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normsurgeon.render.document import Column, Table
from normsurgeon_cli import options
from normsurgeon_cli.console import out, print_json, print_message, print_table, program, progress

EXAMPLES = ("normsurgeon demo", "normsurgeon demo -o lite0-ln.pt --json")


def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="Where to write the ln conversion.")
    ] = Path("demo-ln.safetensors"),
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Watch a real pretrained network lose its BatchNorm and still recognise photographs. Offline, about a minute.

    EfficientNet-Lite0 with its ImageNet weights; the photographs ship with scikit-image and scikit-learn.
    """
    from dataclasses import asdict

    options.check_output(output, force)
    with progress("converting and comparing") as on_progress:
        from normsurgeon_cli.demonstration import demonstrate

        shown = demonstrate(output, on_progress)
    if json:
        print_json({**asdict(shown), "output": str(output)})
        return
    columns = (
        Column("network"), Column("same answer as BN", "percent"), Column("KL from BN", "number"),
        Column("parameters", "count"), Column("seconds", "number"), Column("verdict without these images"),
    )  # fmt: skip
    rows = tuple(
        (row.network, row.agreement, f"{row.kl:.3f}", f"{row.parameters:,}", f"{row.seconds:.1f}", row.verdict)
        for row in shown.rows
    )
    title = f"EfficientNet-Lite0, real ImageNet weights, {shown.images} views of {len(shown.seen)} photographs"
    print_table(Table(columns, rows, title))
    out().print()
    names = ["photograph", *(row.network for row in shown.rows)]
    listed = [0, *(names.index(name) for name in ("BatchNorm (original)", "plain swap to ln", "ln"))]
    seen = tuple(tuple(line[i] for i in listed) for line in shown.seen)
    print_table(Table(tuple(Column(names[i]) for i in listed), seen, "What they see"))
    out().print(f"wrote {output}", markup=False, soft_wrap=True)
    print_message(
        f"next: {program()} inspect {output}\n"
        f"      {program()} evaluate {output} --data FOLDER --baseline demo\n"
        f"      {program()} analyze {output} --baseline demo --html report.html"
    )
