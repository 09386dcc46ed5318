"""A chart: a title, what to look for, and the dicts that Plotly draws; colours are names of CSS variables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

PALETTE = ("--blue", "--orange", "--green", "--purple", "--sky", "--red", "--yellow", "--grey")
CLEAR = "rgba(0,0,0,0)"


@dataclass(frozen=True)
class Figure:
    """One chart; `traces` and `layout` are Plotly's, and `note` says what a healthy one looks like."""

    title: str
    note: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    wide: bool = False


def axes(x: dict[str, Any], y: dict[str, Any], *, height: int = 240, **more: Any) -> dict[str, Any]:
    """The layout every chart shares; ranges are fixed so that a finger scrolls the page, not the chart."""
    axis = {"gridcolor": "--grid", "linecolor": "--grid", "zeroline": False, "fixedrange": True}
    return {
        "height": height,
        "margin": {"l": 52, "r": 10, "t": 6, "b": 40},
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "--soft"},
        "xaxis": {**axis, "showgrid": False, "showline": True, **x},
        "yaxis": {**axis, "automargin": True, "nticks": 6, **y},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hovermode": "x unified",
        "hoverlabel": {"bgcolor": "--card", "bordercolor": "--grid", "font": {"color": "--ink"}},
        "dragmode": False,
        **more,
    }


def title(text: str) -> dict[str, Any]:
    """The title of an axis."""
    return {"title": {"text": text, "standoff": 6, "font": {"size": 12}}}


def card(figure: Figure, index: int) -> str:
    """The place on the page where the script draws figure number `index`."""
    return (
        f'<figure class="card{" wide" if figure.wide else ""}"><figcaption><h3>{escape(figure.title)}</h3>'
        f"<p>{escape(figure.note)}</p></figcaption>"
        f'<div class="plot" data-figure="{index}" style="height:{figure.layout["height"]}px"></div></figure>'
    )


def as_json(figures: Sequence[Figure]) -> str:
    """All figures for the script; `<` is written as an escape, so that no text can end the script element."""
    drawn = [{"data": figure.traces, "layout": figure.layout} for figure in figures]
    return json.dumps(drawn, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
