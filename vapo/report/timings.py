"""Where the time went: HISTORY's `seconds` rows as a table per stage and a stacked bar per iteration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from statistics import median
from typing import Any

from vapo.report.figures import PALETTE, Figure, axes, title

Runs = Mapping[str, list[tuple[int, float]]]  # stage -> (iteration, seconds) of each run, the costliest stage first


def runs_of(rows: Iterable[Mapping[str, Any]]) -> Runs:
    """Every measured run of every stage; stages in order of their total."""
    runs: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["name"] == "seconds":
            runs.setdefault(row["stage"], []).append((row["iteration"], row["value"]))
    return dict(sorted(runs.items(), key=lambda item: (-_total(item[1]), item[0])))


def total_seconds(runs: Runs) -> float:
    """The work of all stages, in seconds."""
    return sum(_total(of_stage) for of_stage in runs.values())


def table(runs: Runs) -> str:
    """Stage, runs, total, median and share of the whole, as HTML; its colours are the legend of the bars."""
    whole = total_seconds(runs) or 1.0
    heads = "".join(f"<th scope=col>{name}</th>" for name in ("stage", "runs", "total s", "median s", "share"))
    colours = _colours(runs)
    lines = "".join(
        f'<tr><th scope=row><i class="dot" style="background:var({colours[stage]})"></i>{_breakable(stage)}</th>'
        f"<td>{len(of_stage)}</td><td>{_total(of_stage):.1f}</td>"
        f"<td>{median(seconds for _, seconds in of_stage):.2f}</td><td>{_total(of_stage) / whole:.1%}</td></tr>"
        for stage, of_stage in runs.items()
    )
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'


def bars(runs: Runs) -> Figure:
    """Seconds per iteration, stacked by stage."""
    traces = [_bar(stage, runs[stage], colour) for stage, colour in _colours(runs).items()]
    layout = axes(
        {**title("iteration"), "tickformat": "d"},
        {**title("seconds"), "rangemode": "tozero"},
        height=340,
        barmode="stack",
        bargap=0.25,
        showlegend=False,
    )
    return Figure(
        "Seconds per iteration",
        "Iteration 0 holds what happens once; after it the bars stay level unless responses grow.",
        traces,
        layout,
        wide=True,
    )


def _bar(name: str, runs: list[tuple[int, float]], colour: str) -> dict[str, Any]:
    seconds: dict[int, float] = {}
    for iteration, value in runs:
        seconds[iteration] = seconds.get(iteration, 0.0) + value
    return {
        "type": "bar",
        "name": name,
        "x": sorted(seconds),
        "y": [seconds[iteration] for iteration in sorted(seconds)],
        "marker": {"color": colour},
        "hovertemplate": "%{y:.2f} s",
    }


def _colours(runs: Runs) -> dict[str, str]:
    """A colour for each of the costliest stages, the last one for all others."""
    return {stage: PALETTE[min(at, len(PALETTE) - 1)] for at, stage in enumerate(runs)}


def _breakable(stage: str) -> str:
    """The name, which may break before a slash or an underscore where the window is narrow."""
    return escape(stage).replace("/", "<wbr>/").replace("_", "<wbr>_")


def _total(runs: list[tuple[int, float]]) -> float:
    return sum(seconds for _, seconds in runs)
