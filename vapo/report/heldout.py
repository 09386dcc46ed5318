"""What came of the run: the sentence on held-out accuracy, and that accuracy by difficulty."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa

from vapo.report.curves import History
from vapo.report.figures import Figure, axes, title
from vapo.report.results import last_evaluation
from vapo.tables import flat

BUCKETS = 6


def outcome(history: History, evaluation: pa.Table, seconds: float) -> str:
    """One sentence: held-out accuracy before and after, iterations, and the seconds that the stages worked."""
    iterations = max((points[-1][0] for points in history.values()), default=0)
    spent = f"{iterations} iteration{'' if iterations == 1 else 's'} and {seconds:,.0f} seconds of work"
    measured = history.get(("evaluation", "accuracy"), [])
    if not measured:
        return f"Held-out accuracy was not measured in {spent}."
    over = interval = ""
    if len(evaluation):
        over = f"avg@{flat(evaluation, 'samples').max()} over {len(evaluation)} held-out problems"
    metrics = last_evaluation(history)
    if "accuracy_low" in metrics:
        low, high, confidence = (metrics[name] for name in ("accuracy_low", "accuracy_high", "confidence"))
        interval = f"{100 * confidence:.4g}% confidence interval {low:.1%} to {high:.1%}"
    (_, before), (_, after) = measured[0], measured[-1]
    facts = _bracketed(over, interval)
    if not iterations:
        return f"Accuracy is {after:.1%}{facts}, measured in {seconds:,.1f} seconds of work."
    if len(measured) == 1:
        return f"Held-out accuracy is {after:.1%}{facts}, measured once in {spent}."
    points = round(100 * after, 1) - round(100 * before, 1)  # of the numbers shown, so that the sentence adds up
    if not points:
        return f"Held-out accuracy stayed at {after:.1%}{facts} in {spent}."
    verb, change = ("rose", "gained") if points > 0 else ("fell", "lost")
    moved = f"{verb} from {before:.1%} to {after:.1%}{_bracketed(interval)}, {abs(points):.1f} points {change}"
    return f"Held-out accuracy {moved}{_bracketed(over)}, in {spent}."


def _bracketed(*facts: str) -> str:
    """The facts that there are, in brackets behind what they are about."""
    known = ", ".join(fact for fact in facts if fact)
    return f" ({known})" if known else ""


def by_difficulty(evaluation: pa.Table) -> Figure | None:
    """Held-out accuracy in buckets of difficulty, or None where no difficulty is known."""
    difficulty = flat(evaluation, "difficulty")
    if not difficulty.any():
        return None
    samples, correct, length = (flat(evaluation, name) for name in ("samples", "correct", "mean_length"))
    labels, shares, hover = [], [], []
    for low, high in _buckets(int(difficulty.min()), int(difficulty.max())):
        within = (difficulty >= low) & (difficulty <= high)
        if not within.any():
            continue
        drawn = max(int(samples[within].sum()), 1)
        labels.append(f"{low}" if low == high else f"{low}\u2013{high}")
        shares.append(float(correct[within].sum() / drawn))
        hover.append(f"{int(within.sum())} problems, {drawn} responses, mean length {length[within].mean():.0f} tokens")
    trace = {
        "type": "bar",
        "x": labels,
        "y": shares,
        "text": [f"{share:.0%}" for share in shares],
        "textposition": "outside",
        "cliponaxis": False,
        "hovertext": hover,
        "hovertemplate": "%{y:.1%}<br>%{hovertext}<extra></extra>",
        "marker": {"color": "--blue"},
    }
    layout = axes(
        {**title("difficulty"), "type": "category"},
        {"tickformat": ".0%", "range": [0, 1.08]},
        hovermode="closest",
        bargap=0.35,
    )
    return Figure(
        "Held-out accuracy by difficulty",
        "At the end of the run; falls as problems get harder.",
        [trace],
        layout,
    )


def _buckets(low: int, high: int) -> list[tuple[int, int]]:
    """At most `BUCKETS` ranges of integers, first and last included, that cover [low, high]."""
    edges = np.unique(np.linspace(low, high + 1, BUCKETS + 1).round().astype(int)).tolist()
    return [(a, b - 1) for a, b in pairwise(edges)]
