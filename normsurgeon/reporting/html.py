"""The report as one self-contained page: no request leaves it, nothing in it is code but our own and Plotly's."""

from __future__ import annotations

import functools
import json
import re
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from normsurgeon.reporting.formatting import exact

TEMPLATES = "normsurgeon.reporting", "templates"
_SEVERITIES = ("problem", "warning", "notice", "good")
ICONS = {
    "problem": '<path d="M4.1 0h5.8L14 4.1v5.8L9.9 14H4.1L0 9.9V4.1z"/>',
    "warning": '<path d="M7 .5 14 13.5H0z"/>',
    "notice": '<circle cx="7" cy="7" r="6.2"/>',
    "good": '<path d="M1 7.6 3 5.4l2.6 2.5L11.2 2 13.2 4l-7.6 8z"/>',
}


@functools.cache
def environment() -> Environment:
    """The templates, with every value escaped."""
    made = Environment(
        loader=PackageLoader(*TEMPLATES), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    made.filters |= {
        "breakable": breakable,
        "lower_first": lambda text: text if text[:2].isupper() else text[:1].lower() + text[1:],
        "minus": minus,
        "exact": lambda value: minus(exact(value)),
        "words": lambda text: str(text).replace("_", " "),
        "severity": lambda text: text if text in _SEVERITIES else "notice",
    }
    return made


def minus(text: str) -> str:
    """Text whose numbers have the sign for minus and not a hyphen."""
    return re.sub(r"(?<![\w)])-(?=\d)|(?<=\de)-(?=\d)", "−", text)


def breakable(text: Any) -> Markup:
    """Escaped text in which a long dotted or slashed name may be broken after a dot."""
    return Markup(re.sub(r"(?<=[\w)])([./_:])(?=[A-Za-z_])", r"\1<wbr>", str(escape(text))))


def embedded(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


@functools.cache
def asset(name: str) -> Markup:
    """One of our own style sheets or scripts, as it is."""
    return Markup(resources.files("normsurgeon.reporting").joinpath("templates", name).read_text(encoding="utf-8"))


@functools.cache
def plotly() -> Markup:
    """Plotly's script, as it ships."""
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())
