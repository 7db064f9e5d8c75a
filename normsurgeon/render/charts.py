"""Plotly figures in the house style: lines with bands or whiskers, heat maps, bars, intervals, and a choice of several.

Colours are readable on light and on dark; everything else that differs between the two stands in the templates, which
the page swaps. Plotly takes labels for HTML, so each text goes through ``label``.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from normsurgeon.render.document import Matrix, Number
from normsurgeon.render.formatting import plus_minus, short_name

if TYPE_CHECKING:
    from plotly import graph_objects as go

TONES = ("#1f83c9", "#d9661a", "#0f9670", "#bb5c98", "#a1851a", "#7d6fdc", "#777d87", "#cc5555")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "x", "star")
MAX_TICKS = 9
_GREY = "#777d87"


def template(ink: str, muted: str, line: str, surface: str) -> dict[str, Any]:
    """A plotly template in a page's colours."""
    axis = {
        "gridcolor": line, "linecolor": line, "zerolinecolor": line, "tickcolor": line, "automargin": True,
        "title": {"font": {"color": muted, "size": 12}, "standoff": 8}, "tickfont": {"color": muted, "size": 11},
    }  # fmt: skip
    bar = {"tickfont": {"color": muted, "size": 11}}
    layout = {
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "hovermode": "closest",
        "font": {"color": ink, "size": 12}, "xaxis": axis, "yaxis": axis,
        "hoverlabel": {"bgcolor": surface, "bordercolor": muted, "font": {"color": ink, "size": 11}, "align": "left"},
        "legend": {"font": {"color": ink, "size": 11}, "bgcolor": "rgba(0,0,0,0)"},
        "updatemenudefaults": {"bgcolor": surface, "bordercolor": muted, "font": {"color": ink, "size": 11}},
    }  # fmt: skip
    return {"layout": layout, "data": {"heatmap": [{"colorbar": bar}]}}


LIGHT = template("#1b1e23", "#5a616c", "#e2e2dc", "#ffffff")
DARK = template("#e7e8ea", "#a1a8b3", "#2d3239", "#1a1d22")


@dataclass(frozen=True)
class Series:
    """One line: ``y`` over ``x``, with ``low`` and ``high`` edges where it has a band or whiskers; None is a gap.

    ``hover`` holds what is shown at each point, in lines; ``tone`` is the number of a colour; ``name`` stands in the
    legend, once for all series of one name; a ``hidden`` one is drawn when it is chosen there.
    """

    name: str
    x: Sequence[Number]
    y: Sequence[Number]
    low: Sequence[Number] = ()
    high: Sequence[Number] = ()
    hover: Sequence[str] = ()
    tone: int = 0
    dash: str = "solid"
    hidden: bool = False


@dataclass(frozen=True)
class Interval:
    """One row of a forest plot; ``filled`` where it is significant."""

    name: str
    value: float
    low: Number = None
    high: Number = None
    filled: bool = False
    hover: str = ""


def label(text: Any) -> str:
    """A text that plotly shows as it is, line breaks kept."""
    return html.escape(str(text), quote=False).replace("\n", "<br>")


def lines(
    series: Sequence[Series],
    *,
    x_title: str = "",
    y_title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    percent: bool = False,
    band: bool = True,
    at: Sequence[tuple[float, str]] = (),
    keys: Sequence[tuple[str, str]] = (),
    height: int = 270,
) -> go.Figure:
    """Lines over numbers. ``band``: edges as a shaded band, else as whiskers, next to each other where they coincide.

    at    the ticks of the x axis, as (place, name)
    keys  what the dashes mean, as (dash, meaning): shown in the legend
    """
    figure = _figure(height, showlegend=len({s.name for s in series}) > 1 or bool(keys))
    logged: set[str] = set()
    for i, line in enumerate(series):
        shift = 0.0 if band else i - (len(series) - 1) / 2
        x = _shifted(line.x, shift, log_x)
        y = [v if v is not None and (not log_y or v > 0) else None for v in line.y]
        style = {"legendgroup": label(line.name), "x": x, "visible": "legendonly" if line.hidden else None}
        if band and line.low:
            for edge, fill in ((line.low, None), (line.high, "tonexty")):
                figure.add_scatter(
                    **style, y=list(edge), mode="lines", line_width=0, fill=fill, fillcolor=_faded(line.tone),
                    hoverinfo="skip", showlegend=False,
                )  # fmt: skip
        solid, few = line.dash == "solid", len(line.x) <= 60
        colour = TONES[line.tone % len(TONES)]
        figure.add_scatter(
            **style, y=y, name=label(line.name), showlegend=line.name not in logged,
            mode="lines+markers" if solid or len(line.x) <= 40 else "lines",
            line={"color": colour, "width": 1.8 if solid else 1.4, "dash": line.dash},
            marker={"color": colour, "size": 6 if few else 4,
                    "symbol": SYMBOLS[line.tone % len(SYMBOLS)] + ("" if solid else "-open")},
            text=[label(text) for text in line.hover] or None,
            hovertemplate="%{text}<extra></extra>" if line.hover else None,
            error_y=None if band or not line.low else _whiskers(line.y, line.low, line.high, colour),
        )  # fmt: skip
        logged.add(line.name)
    for dash, meaning in keys:
        figure.add_scatter(x=[None], y=[None], mode="lines", name=label(meaning), line={"color": _GREY, "dash": dash})
    values = [v for line in series for v in line.y if v is not None and not line.hidden]
    figure.update_xaxes(title_text=label(x_title) or None, zeroline=False)
    figure.update_yaxes(title_text=label(y_title) or None, nticks=6, exponentformat="power")
    places = sorted({v for line in series for v in line.x if v is not None})
    if log_x and not at and len(places) <= MAX_TICKS:
        at = [(place, f"{place:g}") for place in places]
    if at:
        figure.update_xaxes(tickmode="array", tickvals=[place for place, _ in at], ticktext=[label(t) for _, t in at])
    if log_x:
        figure.update_xaxes(_log_axis(places))
    if log_y and any(v > 0 for v in values):
        figure.update_yaxes(_log_axis(values))
    elif percent:
        figure.update_yaxes(tickformat=".0%", rangemode="tozero" if band else "normal")
    if values and not band and not log_y:
        figure.update_yaxes(range=_range_around(values, series, percent))
    return figure


def heat(rows: Sequence[str], columns: Sequence[str], values: Matrix, *, low: float = 0.0) -> go.Figure:
    """A matrix as colours from ``low`` to 1, the first row at the top."""
    import numpy as np

    cells = np.array([[np.nan if v is None else v for v in row] for row in values], dtype=np.float32)
    gap = 1 if len(rows) <= 30 else 0
    # A layer called "1" is a name and not a place on the axis: the invisible sign keeps plotly from counting.
    names = [["\u200b" + label(name) for name in axis] for axis in (columns, rows)]
    figure = _figure(480, showlegend=False)
    figure.add_heatmap(
        x=names[0], y=names[1], z=cells, zmin=low, zmax=1, colorscale="Viridis", hoverongaps=False, xgap=gap,
        ygap=gap, hovertemplate="%{y}<br>%{x}<br><b>%{z:.3f}</b><extra></extra>",
        colorbar={"orientation": "h", "thickness": 8, "len": 0.5, "x": 0.5, "xanchor": "center", "yref": "container",
                  "y": 0, "yanchor": "bottom", "outlinewidth": 0, "nticks": 4, "ypad": 6, "xpad": 0},
    )  # fmt: skip
    across, down = ticks(columns, few=16), ticks(rows, few=16)
    square = len(rows) == len(columns)
    figure.update_xaxes(type="category", showgrid=False, constrain="domain", **_array(across, 14))
    figure.update_yaxes(
        type="category", showgrid=False, constrain="domain", autorange="reversed", scaleanchor="x" if square else None,
        **_array(down, 18),
    )  # fmt: skip
    # The script makes it as high as it is wide.
    return figure.update_layout(meta={"aspect": 1.04})


def bars(
    entries: Sequence[tuple[str, float, Number]],
    *,
    unit: str = "",
    tones: Sequence[int] = (),
    keys: Sequence[tuple[int, str]] = (),
) -> go.Figure:
    """Scores as horizontal bars with whiskers of one standard error; ``keys``: what the colours mean."""
    places = list(range(len(entries)))
    figure = _figure(len(entries) * 21 + 90, showlegend=len(keys) > 1, barmode="overlay")
    tones = tones or [0] * len(entries)
    hover = [label(f"{name}\n{plus_minus(value, error)} {unit}") for name, value, error in entries]
    for tone, meaning in keys or [(tone, "") for tone in dict.fromkeys(tones)]:
        chosen = [i for i in places if tones[i] == tone]
        figure.add_bar(
            orientation="h", y=chosen, x=[entries[i][1] for i in chosen], name=label(meaning), width=0.72,
            marker={"color": TONES[tone % len(TONES)], "line": {"width": 0}},
            error_x={"type": "data", "array": [entries[i][2] or 0 for i in chosen], "color": _GREY, "thickness": 1.2,
                     "width": 3, "visible": any(entries[i][2] is not None for i in chosen)},
            text=[hover[i] for i in chosen], textposition="none",
            hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text=label(unit) or None, exponentformat="power", nticks=6)
    return figure.update_yaxes(**_down([name for name, *_ in entries], 34))


def intervals(rows: Sequence[Interval], *, unit: str = "") -> go.Figure:
    """A forest plot: a dot and an interval a row, filled where significant; zero is marked."""
    figure = _figure(max(2, len(rows)) * (22 if len(rows) > 12 else 34) + 80, showlegend=False)
    values = [row.value for row in rows]
    figure.add_scatter(
        x=values, y=list(range(len(rows))), mode="markers",
        marker={"size": 9, "symbol": ["circle" if row.filled else "circle-open" for row in rows],
                "color": [TONES[0] if row.filled else _GREY for row in rows], "line_width": 1.8},
        error_x=_whiskers(values, [row.low for row in rows], [row.high for row in rows], _GREY),
        text=[label(row.hover or row.name) for row in rows], hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(title_text=label(unit) or None, zeroline=True, zerolinecolor=_GREY, zerolinewidth=1.5, nticks=7)
    return figure.update_yaxes(zeroline=False, **_down([row.name for row in rows], 44))


def histograms(samples: Mapping[str, Sequence[float]], *, x_title: str = "", bins: int = 40) -> go.Figure:
    """Numbers of several samples in the same bins, over each other."""
    import numpy as np

    edges = np.histogram_bin_edges(np.concatenate([np.asarray(values) for values in samples.values()]), bins)
    figure = _figure(320, barmode="overlay")
    for tone, (name, values) in enumerate(samples.items()):
        counts = np.histogram(values, edges)[0]
        figure.add_bar(
            x=((edges[1:] + edges[:-1]) / 2).round(6).tolist(), y=counts.tolist(), width=float(edges[1] - edges[0]),
            name=label(name), opacity=0.55, marker={"color": TONES[tone % len(TONES)], "line": {"width": 0}},
            hovertemplate=f"{label(name)}: %{{y}} near %{{x:.3g}}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text=label(x_title) or None, zeroline=False)
    return figure.update_yaxes(nticks=5)


def tree(
    nodes: Sequence[tuple[str, str, float, str]], *, unit: str = "", low: float = 0.0, high: float = 1.0
) -> go.Figure:
    """A tree of named parts from left to right, coloured by a number: (id, parent's id, number, hover text).

    The first is the root, whose parent is empty; a part is called what stands behind the last dot of its id.
    """
    parents = {parent for _, parent, *_ in nodes}
    leaves = [path for path, *_ in nodes if path not in parents]
    names = [path.rpartition(".")[2] for path, *_ in nodes]
    figure = _figure(max(360, min(1400, 15 * len(leaves))), showlegend=False)
    figure.add_icicle(
        ids=[path for path, *_ in nodes], labels=[label(name) for name in names],
        parents=[parent for _, parent, *_ in nodes], values=[0 if path in parents else 1 for path, *_ in nodes],
        branchvalues="remainder", sort=False, tiling_pad=1,
        marker={"colors": [value for _, _, value, _ in nodes], "colorscale": "Cividis",
                "cmin": low, "cmax": high, "showscale": True, "line_width": 0,
                "colorbar": {"title": {"text": label(unit), "side": "right"}, "thickness": 10, "outlinewidth": 0}},
        text=[label(hover) for *_, hover in nodes], textinfo="label", hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip
    return figure


def choose(figures: Mapping[str, go.Figure]) -> go.Figure:
    """Several figures in the place of one, with a menu; the first is shown at first."""
    (first, *others) = figures.values()
    if not others:
        return first
    count = sum(len(figure.data) for figure in figures.values())
    merged, buttons, start = type(first)(first), [], 0
    for figure in others:
        merged.add_traces([trace.update(visible=False) for trace in figure.data])
    for name, figure in figures.items():
        shown = [start <= i < start + len(figure.data) for i in range(count)]
        start += len(figure.data)
        layout = figure.layout.to_plotly_json()
        kept = {key: layout[key] for key in ("xaxis", "yaxis", "height", "showlegend") if key in layout}
        buttons.append({"label": label(short_name(name, 40)), "method": "update", "args": [{"visible": shown}, kept]})
    row = len(figures) <= 4 and sum(map(len, figures)) <= 30
    menu = {
        "type": "buttons" if row else "dropdown", "direction": "right" if row else "down", "showactive": True,
        "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "pad": {"b": 8}, "buttons": buttons,
    }  # fmt: skip
    top = max(figure.layout.margin.t or 0 for figure in figures.values())
    return merged.update_layout(
        updatemenus=[menu], margin_t=max(top, 60), legend={"yref": "container", "y": 0, "yanchor": "bottom"}
    )


def ticks(names: Sequence[str], few: int = 0) -> list[tuple[int, str]]:
    """Where the network's parts begin, (place, name): as deep in the module tree as gives some of them.

    Up to ``few`` names are all given.
    """
    if len(names) <= few:
        return list(enumerate(names))
    apart = len(names) / (2 * MAX_TICKS)
    for depth in (1, 2, 3):
        parts = [".".join(name.split(".")[:depth]) for name in names]
        begins = [i for i, part in enumerate(parts) if part not in parts[:i]]
        # Of parts that begin close together the longest has the tick.
        sizes = {i: parts.count(parts[i]) for i in begins}
        clear: list[int] = []
        for i in begins:
            if clear and i - clear[-1] < apart:
                if sizes[i] <= sizes[clear[-1]]:
                    continue
                clear.pop()
            clear.append(i)
        if 3 <= len(clear) <= MAX_TICKS:
            return [(i, parts[i]) for i in clear]
    step = max(1, math.ceil(len(names) / MAX_TICKS))
    return [(i, names[i]) for i in range(0, len(names), step)]


def _log_axis(values: Sequence[float]) -> dict[str, Any]:
    """Plotly's, but for ticks at 1, 2 and 5 where it would crowd them, and 0.02 where it would write 2."""
    known = [v for v in values if v > 0]
    crowded = 8 < max(known) / min(known) < 300
    return {"type": "log", "tickformat": "~g", "dtick": "D2" if crowded else None}


def _figure(height: int, **layout: Any) -> go.Figure:
    from plotly import graph_objects as go  # slow: text and terminal need none

    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    margin = {"l": 8, "r": 8, "t": 10, "b": 8}
    return go.Figure(layout={"template": LIGHT, "height": height, "margin": margin, "legend": legend, **layout})


def _array(at: Sequence[tuple[int, str]], width: int) -> dict[str, Any]:
    """Ticks at places, with names of at most that many characters."""
    return {
        "tickmode": "array",
        "tickvals": [i for i, _ in at],
        "ticktext": [label(short_name(n, width)) for _, n in at],
    }


def _down(names: Sequence[str], width: int) -> dict[str, Any]:
    """A vertical axis of names, the first at the top."""
    return {
        "range": [len(names) - 0.4, -0.6],
        "showgrid": False,
        **_array([(i, f"{short_name(n, width)} ") for i, n in enumerate(names)], width + 1),
    }


def _whiskers(y: Sequence[Number], low: Sequence[Number], high: Sequence[Number], colour: str) -> dict[str, Any]:
    def away(edge: Sequence[Number], sign: int) -> list[Number]:
        return [None if a is None or b is None else sign * (b - a) for a, b in zip(y, edge, strict=True)]

    return {"type": "data", "symmetric": False, "color": colour, "thickness": 1.5, "width": 4,
            "array": away(high, 1), "arrayminus": away(low, -1)}  # fmt: skip


def _range_around(values: Sequence[float], series: Sequence[Series], percent: bool) -> list[float]:
    """An interval of few seeds may dwarf all differences: the axis follows the means, and gives whiskers some room."""
    ends = [v for line in series for v in (*line.low, *line.high) if v is not None] or list(values)
    room = 0.6 * (max(values) - min(values)) or 0.1 * abs(values[0]) or 1.0
    low = max(min(*values, *ends), min(values) - room, *([0.0] if percent else []))
    high = min(max(*values, *ends), max(values) + room, *([1.0] if percent else []))
    pad = 0.05 * ((high - low) or room)
    return [low - pad, high + pad]


def _shifted(values: Sequence[Number], shift: float, log: bool) -> list[Number]:
    """Whiskers at one place would hide each other: each line stands a little to the right of the last."""
    known = [v for v in values if v is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    if log and low > 0:
        return [None if v is None else v * (high / low) ** (0.012 * shift) for v in values]
    return [None if v is None else v + 0.008 * shift * (high - low) for v in values]


def _faded(tone: int) -> str:
    red, green, blue = (int(TONES[tone % len(TONES)][i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"
