"""What an evaluation measured, as a table for the page and for the terminal: overall and per family, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from vapo.report.curves import History

Metrics = Mapping[str, float]  # of one evaluation stage, by name


def last_evaluation(history: History) -> Metrics:
    """The metrics of the last evaluation; empty if there was none."""
    found = {name: points[-1] for (stage, name), points in history.items() if stage == "evaluation"}
    last = max((iteration for iteration, _ in found.values()), default=0)
    return {name: value for name, (iteration, value) in found.items() if iteration == last}


def results_table(metrics: Metrics) -> list[list[str]]:
    """Heading and lines: all problems, then each family where there are several."""
    k = f"{metrics['samples_per_prompt']:.0f}"
    columns = [(f"avg@{k}", "accuracy", 100), (f"pass@{k}", f"pass_at_{k}", 100), (f"cons@{k}", f"cons_at_{k}", 100)]
    columns = [*columns, ("truncated", "truncated_share", 100), ("mean length", "length_mean", 1)]
    columns = [(heading, name, scale) for heading, name, scale in columns if name in metrics]
    families = [name.removeprefix("problems") for name in metrics if name.startswith("problems/")]
    lines = [["family", "problems", *(heading for heading, *_ in columns)]]
    for suffix in ["", *families]:
        cells = [number(metrics, name, suffix, scale) if name + suffix in metrics else "" for _, name, scale in columns]
        lines.append([suffix.removeprefix("/") or "all", f"{metrics[f'problems{suffix}']:.0f}", *cells])
    return lines


def number(metrics: Metrics, name: str, suffix: str = "", scale: int = 100) -> str:
    """A measure with its interval, say "82.0% [78.1, 85.7]"; without one where it is undefined."""
    unit = "%" if scale == 100 else ""
    text = f"{scale * metrics[name + suffix]:.1f}{unit}"
    low, high = (metrics.get(f"{name}_{end}{suffix}") for end in ("low", "high"))
    return text if low is None or high is None else f"{text} [{scale * low:.1f}, {scale * high:.1f}]"


def as_html(lines: list[list[str]]) -> str:
    """The table for the page; an interval may go to a line of its own where the window is narrow."""
    heads = "".join(f"<th scope=col>{escape(text)}</th>" for text in lines[0])
    rows = "".join(
        f"<tr><th scope=row>{escape(family)}</th>" + "".join(f"<td>{_cell(text)}</td>" for text in cells) + "</tr>"
        for family, *cells in lines[1:]
    )
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(text: str) -> str:
    value, bracket, interval = text.partition(" [")
    return escape(value) + (f' <span class="interval">[{escape(interval)}</span>' if bracket else "")
