"""HISTORY becomes curves over the iterations: each chart says what it is and what a healthy one does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vapo.report.figures import PALETTE, Figure, axes, title

Point = tuple[int, float]  # iteration, value
History = Mapping[tuple[str, str], list[Point]]  # (stage, name) -> its points in order of iteration
DASHES = ("solid", "dash", "dot", "dashdot")  # a curve is told apart without its colour, too
SYMBOLS = ("circle", "diamond", "square", "cross")


@dataclass(frozen=True)
class Chart:
    """What one chart draws: `series` are (label, sources), a source being (stage, name)."""

    title: str
    note: str
    series: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    unit: str = ""  # "%": a share; "log": positive values over several orders of magnitude
    wide: bool = False


def _one(label: str, stage: str, name: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return label, ((stage, name),)


CHARTS = (
    Chart(
        "Accuracy",
        "Held-out accuracy, with its confidence interval, rises with training accuracy; a gap that opens between them "
        "is over-fitting.",
        (
            _one("held-out avg@k", "evaluation", "accuracy"),
            _one("held-out pass@k", "evaluation", "pass_at_k"),
            _one("held-out cons@k", "evaluation", "cons_at_k"),
            _one("training", "verification", "accuracy"),
        ),
        "%",
        wide=True,
    ),
    Chart("Mean reward", "Rises, then levels off.", (_one("reward", "verification", "reward_mean"),)),
    Chart(
        "Response length, tokens",
        "Settles or grows slowly; a collapse or a run to the limit is a warning.",
        (_one("mean", "rollout", "length_mean"), _one("longest", "rollout", "length_max")),
    ),
    Chart(
        "Truncated responses",
        "Stays near zero: a response cut at the limit earns nothing.",
        (_one("truncated", "rollout", "truncated_share"),),
        "%",
    ),
    Chart(
        "Entropy, nats per token",
        "Falls slowly; a plunge to zero means that exploration is over.",
        (_one("entropy", "ppo_update", "entropy"),),
    ),
    Chart(
        "Explained variance of the critic",
        "Above zero after value-pretraining and rising; zero is no better than a constant.",
        (
            (
                "explained variance",
                (("value_pretraining", "explained_variance"), ("advantages", "explained_variance")),
            ),
        ),
    ),
    Chart(
        "Mean lambda of the policy",
        "Follows the response length where lambda is length-adaptive.",
        (_one("lambda", "advantages", "lambda_policy_mean"),),
    ),
    Chart(
        "Clipped tokens",
        "A small, steady share; growth means that updates are too large.",
        (
            _one("clipped low", "ppo_update", "clip_fraction_low"),
            _one("clipped high", "ppo_update", "clip_fraction_high"),
        ),
        "%",
    ),
    Chart(
        "Groups with correct and wrong responses",
        "Where advantages come from groups only these teach; near zero the problems are too easy or too hard.",
        (_one("informative", "advantages", "informative_share"), _one("trained on", "advantages", "trained_share")),
        "%",
    ),
    Chart(
        "Padding",
        "Share of the update's positions that are computed for nothing; a few per cent.",
        (_one("padding", "ppo_update", "padding_share"),),
        "%",
    ),
    Chart(
        "Approximate KL per update",
        "Small and steady; a spike is an update that went too far.",
        (_one("KL", "ppo_update", "approx_kl"),),
    ),
    Chart(
        "Policy losses",
        "The clipped loss hovers around zero; the positive-example loss falls.",
        (
            _one("clipped policy loss", "ppo_update", "policy_loss"),
            _one("positive-example LM loss", "ppo_update", "positive_lm_loss"),
        ),
    ),
    Chart(
        "Value loss",
        "Falls, then follows the spread of the rewards.",
        (_one("value loss", "ppo_update", "value_loss"),),
    ),
    Chart(
        "Logprob gap, rollout and trainer",
        "Rounding error only; a gap that grows means that the two disagree about the policy.",
        (_one("mean", "ppo_update", "logprob_gap_mean"), _one("largest", "ppo_update", "logprob_gap_max")),
        "log",
    ),
)


def history_of(rows: Iterable[Mapping[str, Any]]) -> History:
    """HISTORY's rows by (stage, name), ordered by iteration; values that are not finite are left out.

    Where one iteration was measured more than once the last row counts: a repeated stage replaces its result.
    """
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        if math.isfinite(row["value"]):
            found.setdefault((row["stage"], row["name"]), {})[row["iteration"]] = row["value"]
    return {key: sorted(points.items()) for key, points in found.items()}


def curves(history: History) -> list[Figure]:
    """One figure per chart that has points."""
    history = {**history, **_at_k(history)}
    drawn = [(chart, _traces(chart, history)) for chart in CHARTS]
    return [Figure(c.title, c.note, traces, _layout(c, traces), c.wide) for c, traces in drawn if traces]


def pretraining_curves(steps: Iterable[Mapping[str, Any]]) -> list[Figure]:
    """The two figures of PRETRAINING's rows: value loss and explained variance by optimiser step.

    None where no step was taken: one point is no curve.
    """
    rows, figures = list(steps), []
    if not any(row["step"] for row in rows):
        return []
    for name, heading, note in (
        (
            "value_loss",
            "Value-pretraining: value loss",
            "Held-out loss falls, then levels off; a rise is over-fitting.",
        ),
        ("explained_variance", "Value-pretraining: explained variance", "Held-out explained variance rises above 0."),
    ):
        traces = []
        for at, of_rows in enumerate(("held-out", "mini-batch")):
            points = [(row["step"], row[name]) for row in rows if row["rows"] == of_rows and math.isfinite(row[name])]
            if points:
                traces.append(_trace(of_rows, points, at))
        if traces:
            y = {"rangemode": "tozero"} if name == "value_loss" else {}
            figures.append(
                Figure(heading, note, traces, axes({**title("optimiser step"), "tickformat": "d"}, y, showlegend=True))
            )
    return figures


def _trace(label: str, points: list[Point], at: int) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": label,
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
        "line": {"color": PALETTE[at], "width": 2, "dash": DASHES[at]},
        "marker": {"size": 5, "symbol": SYMBOLS[at]},
        "hovertemplate": "%{y:.4g}",
    }


def _traces(chart: Chart, history: History) -> list[dict[str, Any]]:
    traces = []
    for at, (label, sources) in enumerate(chart.series):
        points = sorted(point for source in sources for point in history.get(source, []))
        if not points:
            continue
        trace = _trace(label, points, at)
        if chart.unit == "%":
            trace["hovertemplate"] = "%{y:.1%}"
        if whiskers := _whiskers(points, sources, history):
            trace["error_y"] = whiskers
        traces.append(trace)
    return traces


def _at_k(history: History) -> dict[tuple[str, str], list[Point]]:
    """pass@k and cons@k for the k that was sampled, under names that do not hold it; with k = 1 both are avg@k."""
    found = {}
    for kind in ("pass_at_", "cons_at_"):
        names = [name.removeprefix(kind) for stage, name in history if stage == "evaluation"]
        sizes = [int(name) for name in names if name.isdigit()]
        if max(sizes, default=1) > 1:
            found["evaluation", f"{kind}k"] = history["evaluation", f"{kind}{max(sizes)}"]
    return found


def _whiskers(points: list[Point], sources: Iterable[tuple[str, str]], history: History) -> dict[str, Any]:
    """Plotly's error bars from the points' confidence intervals; nothing where none is known."""
    lows, highs = (
        {x: y for stage, name in sources for x, y in history.get((stage, f"{name}_{end}"), [])}
        for end in ("low", "high")
    )
    if not lows:
        return {}
    return {
        "type": "data",
        "symmetric": False,
        "array": [highs.get(x, y) - y for x, y in points],
        "arrayminus": [y - lows.get(x, y) for x, y in points],
        "thickness": 1,
        "width": 3,
    }


def _layout(chart: Chart, traces: list[dict[str, Any]]) -> dict[str, Any]:
    values = [value for trace in traces for value in trace["y"]]
    y: dict[str, Any] = {}
    if chart.unit == "%":
        y = {"tickformat": ".0%" if max(values) >= 0.05 else ".2~%", "rangemode": "tozero"}
    elif chart.unit == "log" and min(values) > 0:
        decades = [math.floor(math.log10(min(values))), math.floor(math.log10(max(values))) + 1]
        y = {"type": "log", "exponentformat": "e", "dtick": 1, "range": decades}
    last = max(x for trace in traces for x in trace["x"])
    ticks = {"dtick": 1} if last <= 8 else {"nticks": 9}
    return axes(
        {**title("iteration"), "tickformat": "d", **ticks},
        y,
        height=320 if chart.wide else 240,
        showlegend=len(chart.series) > 1,
    )
