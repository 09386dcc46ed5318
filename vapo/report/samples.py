"""Graded responses on the page: verdict, answer and text, some of them right and some wrong."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vapo.errors import UserError
from vapo.schemas import REWARDS, ROLLOUTS
from vapo.tables import check_joined, flat, ragged, read_table

HEAD, TAIL = 4000, 2000  # characters shown of a longer response


@dataclass(frozen=True)
class Sample:
    """One graded response; `length` is in tokens."""

    rollout_id: str
    prompt_id: str
    prompt: str
    ground_truth: str
    text: str
    finish_reason: str
    length: int
    extracted: str
    verdict: str
    correct: bool
    reward: float


def read_samples(rollouts: Path, rewards: Path, prompts: pa.Table, count: int) -> list[Sample]:
    """Choose `count` responses, right and wrong ones by turns.

    Raises:
        UserError: the tables do not join.
    """
    table, graded = read_table(rollouts, ROLLOUTS), read_table(rewards, REWARDS)
    check_joined(rewards, graded, table)
    return join(table, graded, prompts, choose(flat(graded, "correct"), count), rollouts)


def expected(ground_truth: str) -> str:
    """What a person would call the right answer: of a reasoning-gym entry, which is JSON, the answer in it."""
    try:
        entry = json.loads(ground_truth).get("entry", {})
        return str(entry["answer"])
    except (ValueError, AttributeError, KeyError):
        return ground_truth


def join(table: pa.Table, graded: pa.Table, prompts: pa.Table, rows: Sequence[int], path: Path) -> list[Sample]:
    """These rows of ROLLOUTS, which `path` holds, with REWARDS and PROMPTS."""
    row_of = {prompt_id: row for row, prompt_id in enumerate(prompts.column("prompt_id").to_pylist())}
    lengths = np.diff(ragged(table, "response_tokens")[1])
    found = []
    for row in rows:
        rollout, reward = (t.slice(row, 1).to_pylist()[0] for t in (table, graded))
        if rollout["prompt_id"] not in row_of:
            raise UserError(f"{path}: column prompt_id: {rollout['prompt_id']!r} is not in the table PROMPTS")
        problem = prompts.slice(row_of[rollout["prompt_id"]], 1).to_pylist()[0]
        found.append(
            Sample(
                rollout_id=rollout["rollout_id"],
                prompt_id=rollout["prompt_id"],
                prompt=problem["prompt"],
                ground_truth=expected(problem["ground_truth"]),
                text=rollout["response"],
                finish_reason=rollout["finish_reason"],
                length=int(lengths[row]),
                extracted=reward["extracted"],
                verdict=reward["verdict"],
                correct=reward["correct"],
                reward=reward["reward"],
            )
        )
    return found


def choose(correct: np.ndarray, count: int) -> list[int]:
    """Rows to show: half right and half wrong as far as there are, evenly spread over the table, by turns."""
    right, wrong = np.flatnonzero(correct), np.flatnonzero(~correct.astype(bool))
    n_right = min(len(right), max(count // 2, count - len(wrong)))
    n_wrong = min(len(wrong), count - n_right)
    turns = zip_longest(_spread(right, n_right), _spread(wrong, n_wrong))
    return [row for pair in turns for row in pair if row is not None]


def card(sample: Sample, problem: Mapping[str, Any]) -> str:
    """One held-out response; `problem` is its prompt's row of EVALUATION."""
    facts = [
        ("answer", sample.extracted or "none"),
        ("expected", sample.ground_truth),
        ("length", f"{sample.length} tokens"),
        ("finish", sample.finish_reason),
        ("correct", f"{problem['correct']} of {problem['samples']} responses"),
    ]
    if problem["samples"] > 1:
        facts.append(("majority", problem["majority"] or "none"))
    text = escape(sample.text)
    if len(sample.text) > HEAD + TAIL:
        left = f'<em class="gap"> \u2026 {len(sample.text) - HEAD - TAIL} characters not shown \u2026 </em>'
        text = escape(sample.text[:HEAD]) + left + escape(sample.text[-TAIL:])
    return f'<article class="card response">{head(sample, facts)}<p class="tokens">{text}</p></article>'


def head(sample: Sample, facts: Iterable[tuple[str, str]]) -> str:
    """What stands above a response's text: its verdict and ID, facts, and the prompt."""
    listed = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    sort = "right" if sample.correct else "wrong"
    mark = "\u2713" if sample.correct else "\u2717"
    return (
        f'<header><span class="verdict {sort}">{mark} {escape(sample.verdict.replace("_", " "))}</span>'
        f'<code class="id">{escape(sample.rollout_id)}</code></header><dl>{listed}</dl>'
        f'<p class="prompt">{escape(sample.prompt)}</p>'
    )


def _spread(rows: np.ndarray, count: int) -> list[int]:
    """`count` of the rows, evenly spaced."""
    return [int(rows[i * len(rows) // count]) for i in range(count)]
