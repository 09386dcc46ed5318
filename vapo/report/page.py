"""Put the run on one page: outcome, curves, timings, responses with their token credit, the resolved recipe."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
from tokenizers import Tokenizer

from vapo.errors import UserError
from vapo.recipe import Report
from vapo.report import credit, figures, results, samples, timings
from vapo.report.credit import Scale
from vapo.report.curves import curves, history_of, pretraining_curves
from vapo.report.heldout import by_difficulty, outcome
from vapo.report.look import SCRIPT, STYLE
from vapo.report.responses import Response, read_responses
from vapo.report.results import Metrics, last_evaluation
from vapo.report.samples import Sample, read_samples
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
    tokenizer: Path,
    evaluation: Path,
    evaluation_prompts: Path,
    evaluation_rollouts: Path,
    evaluation_rewards: Path,
    recipe: str,
    page: Path,
    prompts: Path | None = None,
    first_rollouts: Path | None = None,
    first_rewards: Path | None = None,
    first_experience: Path | None = None,
    last_rollouts: Path | None = None,
    last_rewards: Path | None = None,
    last_experience: Path | None = None,
    pretraining: Path | None = None,
) -> dict[str, float]:
    """Write `page`, one HTML file that needs nothing besides itself; the same inputs give the same bytes.

    Args:
        tokenizer: a tokenizer.json.
        evaluation: of the last evaluation, as are its prompts, rollouts and rewards.
        recipe: the resolved recipe as JSON text.
        prompts: those trained on; None, as the tables of the first and last iteration, where nothing was trained.
        pretraining: how the first critic learned; None where there is no critic.

    Raises:
        UserError: a table is absent or does not join, the tokenizer or the recipe is not JSON.
    """
    measured = read_table(history, HISTORY).to_pylist()
    heldout = read_table(evaluation, EVALUATION)
    sampled = read_samples(
        evaluation_rollouts, evaluation_rewards, read_table(evaluation_prompts, PROMPTS), section.samples
    )
    words = read_tokenizer(tokenizer)
    iterations = ((last_rollouts, last_rewards, last_experience), (first_rollouts, first_rewards, first_experience))
    shown = _responses(iterations, prompts, words, section.samples)

    points, runs = history_of(measured), timings.runs_of(measured)
    steps = read_table(pretraining, PRETRAINING).to_pylist() if pretraining else []
    drawn = [*curves(points), *pretraining_curves(steps)] if prompts else []
    charts = "".join(figures.card(figure, at) for at, figure in enumerate(drawn))
    difficulty = ""
    if figure := by_difficulty(heldout):
        difficulty = figures.card(figure, len(drawn))
        drawn.append(figure)
    times = timings.table(runs) if runs else ""
    if runs and prompts:  # an evaluation alone has one bar
        times = figures.card(timings.bars(runs), len(drawn)) + times
        drawn.append(timings.bars(runs))
    if times:
        times = _section(
            "Time", "The work of the stages, without the time that the pipeline takes to start them.", times
        )
    body = (
        f"<header><h1>{escape(section.title)}</h1>"
        f'<p class="lead">{escape(outcome(points, heldout, timings.total_seconds(runs)))}</p></header>'
    )
    if prompts:
        body += _section(
            "Curves",
            "Everything is measured per iteration, and iteration 0 is before the first update, unless the axis says "
            "otherwise.",
            f'<div class="grid">{charts}{difficulty}</div>',
        )
        difficulty = ""
    body += (
        _evaluated(last_evaluation(points), heldout, sampled, difficulty)
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


def _responses(
    iterations: Sequence[tuple[Path | None, ...]], prompts: Path | None, words: Tokenizer, count: int
) -> list[tuple[str, list[Response]]]:
    """Responses of the last and the first iteration, of that half as many; none where nothing was trained."""
    if not prompts:
        return []
    problems = read_table(prompts, PROMPTS)
    found = []
    for label, of_label, paths in zip(("last", "first"), (count, (count + 1) // 2), iterations, strict=True):
        rollouts, rewards, experience = (path for path in paths if path)
        found.append((f"{label} iteration", read_responses(rollouts, rewards, experience, problems, words, of_label)))
    # A run of one iteration has one and the same first and last.
    (_, last), (_, first) = found
    return found if first and last and _iteration(first) != _iteration(last) else found[:1]


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


def _evaluated(metrics: Metrics, heldout: pa.Table, sampled: Sequence[Sample], chart: str) -> str:
    """What the last evaluation measured, and some of its responses."""
    if "problems" not in metrics:
        return ""
    about = (
        "The last evaluation. pass@k: one of k responses is right, cons@k: the answer that most of them give is; "
        f"in brackets the {100 * metrics['confidence']:.4g}% confidence interval over problems."
    )
    problems = {row["prompt_id"]: row for row in heldout.to_pylist()}
    if unknown := next((sample.rollout_id for sample in sampled if sample.prompt_id not in problems), None):
        raise UserError(f"the response {unknown} is of a problem that is not in the table EVALUATION")
    cards = "".join(samples.card(sample, problems[sample.prompt_id]) for sample in sampled)
    table = results.as_html(results.results_table(metrics))
    grid = f'<div class="grid pairs after">{chart}{cards}</div>' if chart or cards else ""
    return _section("Held-out problems", about, table + grid)


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
