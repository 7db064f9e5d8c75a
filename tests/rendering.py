"""What a terminal of some width shows."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

from rich.console import Console


def terminal(
    show: Callable[[Any, Console], None], it: Any, width: int, colours: str | None = "truecolor", **options: Any
) -> str:
    file = io.StringIO()
    console = Console(
        file=file, force_terminal=True, width=width, color_system=colours, legacy_windows=False, **options
    )
    show(it, console)
    return file.getvalue()


def visible(text: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
