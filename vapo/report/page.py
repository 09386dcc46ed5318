"""Put the run on one page: outcome, curves, timings, responses with their token credit, the resolved recipe."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from tokenizers import Tokenizer

from vapo.errors import UserError
from vapo.recipe import Report
from vapo.report import credit, figures, timings
from vapo.report.credit import Scale
from vapo.report.curves import curves, history_of, pretraining_curves
from vapo.report.heldout import by_difficulty, outcome
from vapo.report.look import SCRIPT, STYLE
from vapo.report.responses import Response, read_responses
from vapo.schemas import EVALUATION, HISTORY, PRETRAINING, PROMPTS
from vapo.tables import read_table, write_text

WITH_CRITIC = (
    "blue went better than the critic expected, orange went worse. The curve is the critic's value before each token."
)
WITHOUT_CRITIC = (
    "blue responses did better than the others to their prompt, orange ones worse. "
    "The curve is the mean reward of these responses."
)


def report(
    section: Report,
    *,
    history: Path,
    prompts: Path,
    tokenizer: Path,
    first_rollouts: Path,
    first_rewards: Path,
    first_experience: Path,
    last_rollouts: Path,
    last_rewards: Path,
    last_experience: Path,
    evaluation: Path,
    recipe: str,
    page: Path,
    pretraining: Path | None = None,
) -> dict[str, float]:
    """Write `page`, one HTML file that needs nothing besides itself; the same inputs give the same bytes.

    Args:
        tokenizer: a tokenizer.json.
        recipe: the resolved recipe as JSON text.
        pretraining: how the first critic learned; None where there is no critic.

    Raises:
        UserError: a table is absent or does not join, the tokenizer or the recipe is not JSON.
    """
    measured = read_table(history, HISTORY).to_pylist()
    heldout = read_table(evaluation, EVALUATION)
    problems = read_table(prompts, PROMPTS)
    words = read_tokenizer(tokenizer)
    last = read_responses(last_rollouts, last_rewards, last_experience, problems, words, section.samples)
    first = read_responses(first_rollouts, first_rewards, first_experience, problems, words, (section.samples + 1) // 2)
    # A run of one iteration has one and the same first and last.
    shown = [("last iteration", last)]
    if first and last and _iteration(first) != _iteration(last):
        shown.append(("first iteration", first))

    points, runs = history_of(measured), timings.runs_of(measured)
    steps = read_table(pretraining, PRETRAINING).to_pylist() if pretraining else []
    drawn = [*curves(points), *pretraining_curves(steps)]
    charts = "".join(figures.card(figure, at) for at, figure in enumerate(drawn))
    if figure := by_difficulty(heldout):
        charts += figures.card(figure, len(drawn))
        drawn.append(figure)
    times = ""
    if runs:
        times = _section(
            "Time",
            "The work of the stages, without the time that the pipeline takes to start them.",
            f"{figures.card(timings.bars(runs), len(drawn))}{timings.table(runs)}",
        )
        drawn.append(timings.bars(runs))
    body = (
        f"<header><h1>{escape(section.title)}</h1>"
        f'<p class="lead">{escape(outcome(points, heldout, timings.total_seconds(runs)))}</p></header>'
        + _section(
            "Curves",
            "Everything is measured per iteration, and iteration 0 is before the first update, unless the axis says "
            "otherwise.",
            f'<div class="grid">{charts}</div>',
        )
        + _credit(shown, has_critic=pretraining is not None)
        + times
        + _section(
            "Recipe",
            "Every setting of the run, resolved.",
            f"<details><summary>show the resolved recipe</summary><pre>{escape(_pretty(recipe))}</pre></details>",
        )
    )
    write_text(page, document(section.title, body, figures.as_json(drawn)))
    return {"bytes": float(page.stat().st_size)}


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json; that it is there and JSON is checked first, for its own errors say little."""
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a tokenizer.json: {error}") from None
    return Tokenizer.from_str(text)


def document(title: str, body: str, data: str) -> str:
    """The HTML file: only the two scripts written here may run, and nothing may be fetched.

    The policy in its head names them by digest, so that even a text which slipped through unescaped stays text.
    """
    plotly = files("plotly").joinpath("package_data/plotly.min.js").read_text(encoding="utf-8")
    scripts = [plotly.replace("</script", "<\\/script"), SCRIPT]
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"style-src 'unsafe-inline'; img-src data: blob:; script-src {allowed}"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n"
        f'<body><main>{body}</main><div id="tip" role="tooltip" hidden></div>\n'
        f'<script type="application/json" id="figures">{data}</script>\n'
        + "".join(f"<script>{script}</script>\n" for script in scripts)
        + "</body></html>\n"
    )


def _credit(shown: Sequence[tuple[str, list[Response]]], *, has_critic: bool) -> str:
    """The responses of each iteration behind a tab of its own; tabs are radio buttons and need no script."""
    responses = [response for _, of_iteration in shown for response in of_iteration]
    if not responses:
        return ""
    scale = Scale.of(responses)
    tabs = "".join(
        f'<input class="when" type="radio" name="when" id="when-{at}"{"" if at else " checked"}>'
        f'<label class="tab" for="when-{at}">{label} ({escape(_iteration(of_iteration))})</label>'
        for at, (label, of_iteration) in enumerate(shown)
    )
    panels = "".join(
        f'<div class="panel panel-{at} grid pairs">'
        + "".join(credit.card(response, scale) for response in of_iteration)
        + "</div>"
        for at, (_, of_iteration) in enumerate(shown)
    )
    return _section(
        "Token credit",
        f"Each token is coloured by its advantage: {WITH_CRITIC if has_critic else WITHOUT_CRITIC} "
        "Point at a token, or at the curve, for its numbers.",
        f'<div class="tabs">{tabs}{credit.legend(scale)}{panels}</div>',
    )


def _iteration(responses: Sequence[Response]) -> str:
    return responses[0].rollout_id.split("/")[0] if responses else "none"


def _section(title: str, about: str, content: str) -> str:
    return f'<section><h2>{escape(title)}</h2><p class="about">{escape(about)}</p>{content}</section>'


def _pretty(recipe: str) -> str:
    try:
        return json.dumps(json.loads(recipe), indent=2, ensure_ascii=False)
    except ValueError as error:
        raise UserError(f"the resolved recipe is not JSON: {error}") from None


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
