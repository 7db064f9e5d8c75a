"""Makes docs/demo.svg: what ``normsurgeon demo`` prints, from a real run.

python docs/make_demo_picture.py
"""

from __future__ import annotations

import io
import os
import re
import tempfile
from pathlib import Path
from unittest.mock import patch

from normsurgeon_cli import demo
from rich.console import Console

PICTURE = Path(__file__).resolve().with_name("demo.svg")
COLUMNS = 84
FONTS = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def main() -> None:
    """Run the demo and write the picture."""
    console = Console(
        record=True,
        width=COLUMNS,
        force_terminal=True,
        color_system="truecolor",
        highlight=False,
        file=io.StringIO(),
    )
    console.print("[bold green]$[/] normsurgeon demo")
    # The command's own tables, on a console that records: the picture cannot drift from the program.
    with (
        tempfile.TemporaryDirectory() as folder,
        patch("normsurgeon_cli.console.out", lambda: console),
        patch("normsurgeon_cli.demo.out", lambda: console),
    ):
        os.chdir(folder)  # so that the last line shows no folder
        demo.demo(Path("demo-ln.safetensors"))
        os.chdir(PICTURE.parent)
    svg = without_web_fonts(console.export_svg(title="normsurgeon demo"))
    scratch = PICTURE.with_suffix(".tmp")
    scratch.write_text(svg, encoding="utf-8")
    os.replace(scratch, PICTURE)
    print(f"wrote {PICTURE.name} ({len(svg) / 1000:.0f} KB)")


def without_web_fonts(svg: str) -> str:
    """The picture with the reader's own monospaced font: it then needs no network."""
    svg = re.sub(r"@font-face\s*\{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family:\s*[^;]*;", f"font-family: {FONTS};", svg)
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


if __name__ == "__main__":
    main()
