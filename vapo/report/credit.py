"""The token credit view: a response's tokens coloured by advantage, and under them the critic's value curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from vapo.report.responses import Response
from vapo.report.samples import head

HEAD, TAIL = 800, 400  # tokens shown of a longer response: a browser suffers from more
POINTS = 1000  # of a curve
LINE_BREAK = "\u21b5"


@dataclass(frozen=True)
class Scale:
    """What the colours and the axes of all responses on the page share."""

    advantage: float  # the deepest colour; rarer, larger advantages keep it
    low: float  # of the value axis
    high: float

    @classmethod
    def of(cls, responses: Sequence[Response]) -> Scale:
        """A robust maximum (98th percentile of |advantage|) and the range of values and targets, 0 included."""
        size = np.abs(np.concatenate([np.zeros(0), *(r.advantages for r in responses)]))
        values = np.concatenate([np.zeros(1), *(a for r in responses for a in (r.values, r.value_targets))])
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        largest = float(np.nanpercentile(size, 98) or np.nanmax(size)) if len(size) else 0.0
        return cls(largest or 1.0, low, high if high > low else low + 1.0)

    def heights(self, values: np.ndarray) -> np.ndarray:
        """Where values lie on an axis that runs from `high` at 0 down to `low` at 100."""
        return (self.high - np.asarray(values, np.float64)) / (self.high - self.low) * 100


def legend(scale: Scale) -> str:
    """The colour scale, from the most negative advantage to the most positive."""
    return (
        f'<div class="legend"><span>advantage &le; {-scale.advantage:.2g}</span><i></i>'
        f"<span>&ge; {scale.advantage:+.2g}</span></div>"
    )


def card(response: Response, scale: Scale) -> str:
    """One response: its facts, its prompt, its tokens with their credit, its value curve."""
    facts = (
        ("answer", response.extracted or "none"),
        ("expected", response.ground_truth),
        ("reward", f"{response.reward:+.2g}"),
        ("length", f"{len(response.tokens)} tokens"),
        ("finish", response.finish_reason),
        ("lambda", f"{response.lambda_policy:.3f}"),
    )
    return (
        f'<article class="card response" data-n="{len(response.tokens)}">{head(response, facts)}'
        f'<p class="tokens">{_spans(response, scale)}</p>{_curve(response, scale)}'
        f"<details><summary>as plain text</summary><pre>{escape(response.text)}</pre></details></article>"
    )


def _spans(response: Response, scale: Scale) -> str:
    total = len(response.tokens)
    if total <= HEAD + TAIL:
        return "".join(_span(response, at, scale) for at in range(total))
    head = "".join(_span(response, at, scale) for at in range(HEAD))
    tail = "".join(_span(response, at, scale) for at in range(total - TAIL, total))
    return f'{head}<em class="gap"> \u2026 {total - HEAD - TAIL} tokens not shown \u2026 </em>{tail}'


def _span(response: Response, at: int, scale: Scale) -> str:
    """One token; the class holds the sign of its advantage, --a the depth of the colour."""
    token, advantage = response.tokens[at], float(response.advantages[at])
    # A leading space stays outside: colour hanging over the end of a line would look like a token.
    word = token.lstrip(" ") or token
    space = token[: len(token) - len(word)]
    sign = "up" if advantage > 0 else "down" if advantage < 0 else "even"
    name = word.replace("\n", LINE_BREAK) if word.strip(" ") else "space"
    tip = (
        f"token {at + 1}: {name}\nadvantage {advantage:+.4f}\nvalue {response.values[at]:+.4f}\n"
        f"value target {response.value_targets[at]:+.4f}\nrollout logprob {response.logprobs[at]:.4f}"
    )
    depth = min(abs(advantage) / scale.advantage, 1.0) if sign != "even" else 0.0
    drawn = escape(word).replace("\n", LINE_BREAK + "\n")
    return f'{space}<span class="t {sign}" style="--a:{depth:.2f}" data-i="{at}" title="{escape(tip)}">{drawn}</span>'


def _curve(response: Response, scale: Scale) -> str:
    """V(t) with its target over the token index, and the advantages as bars beneath.

    The drawings are stretched to the card's width (preserveAspectRatio none), so their labels are HTML beside them.
    """
    total = len(response.tokens)
    if not total:
        return ""
    (zero,) = scale.heights(np.zeros(1))
    return (
        '<div class="curve"><div class="labels">'
        f'<span style="top:0">{scale.high:.2g}</span><span style="top:100%">{scale.low:.2g}</span></div>'
        f'<div class="area"><svg viewBox="0 0 {total} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="value of each token and its target">'
        f'<line class="zero" x1="0" x2="{total}" y1="{zero:.1f}" y2="{zero:.1f}"/>'
        f'<polyline class="target" points="{_points(scale.heights(response.value_targets))}"/>'
        f'<polyline class="value" points="{_points(scale.heights(response.values))}"/></svg>'
        f'<svg class="bars" viewBox="0 -1 {total} 2" preserveAspectRatio="none" role="img" '
        f'aria-label="advantage of each token">{_bars(response.advantages / scale.advantage)}</svg>'
        f'<div class="cursor"></div></div></div>'
        '<p class="key"><span class="value">value V(t)</span><span class="target">value target</span>'
        '<span class="bars">advantage, by token</span></p>'
    )


def _points(heights: np.ndarray) -> str:
    """Points of a line at the middle of each token; a very long one is thinned."""
    at = np.unique(np.linspace(0, len(heights) - 1, min(len(heights), POINTS)).round().astype(int))
    return " ".join(f"{i + 0.5:g},{heights[i]:.1f}" for i in at)


def _bars(advantages: np.ndarray) -> str:
    """One path per sign: a bar from the middle line for every token whose bar can be seen."""
    size = np.clip(advantages, -1, 1)
    paths = []
    for name, of_sign in (("up", size > 0.02), ("down", size < -0.02)):
        steps = "".join(f"M{i} 0h1v{-size[i]:.2f}h-1z" for i in np.flatnonzero(of_sign))
        paths.append(f'<path class="{name}" d="{steps}"/>' if steps else "")
    return "".join(paths)
