"""Which responses the page shows, each with all that the tables know of it, joined by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from vapo.errors import UserError
from vapo.schemas import EXPERIENCE, REWARDS, ROLLOUTS
from vapo.tables import check_joined, flat, read_table, rows


@dataclass(frozen=True)
class Response:
    """One response; `tokens` and the arrays have one entry per response token."""

    rollout_id: str
    prompt: str
    ground_truth: str
    text: str
    finish_reason: str
    extracted: str
    verdict: str
    correct: bool
    reward: float
    lambda_policy: float
    tokens: list[str]
    logprobs: np.ndarray
    values: np.ndarray
    value_targets: np.ndarray
    advantages: np.ndarray


def read_responses(
    rollouts: Path, rewards: Path, experience: Path, prompts: pa.Table, tokenizer: Tokenizer, count: int
) -> list[Response]:
    """Choose `count` responses of an iteration, right and wrong ones by turns, and join what is known of them.

    Raises:
        UserError: rows of the tables do not join, or a row has not one number per token.
    """
    table = read_table(rollouts, ROLLOUTS)
    graded = read_table(rewards, REWARDS)
    credited = read_table(experience, EXPERIENCE)
    check_joined(rewards, graded, table)
    check_joined(experience, credited, table)
    tokens = rows(table, "response_tokens")
    ragged = {"rollout_logprobs": rows(table, "rollout_logprobs")}
    ragged |= {name: rows(credited, name) for name in ("values", "value_targets", "advantages")}
    row_of = {prompt_id: row for row, prompt_id in enumerate(prompts.column("prompt_id").to_pylist())}
    found = []
    for row in choose(flat(graded, "correct"), count):
        rollout, reward, credit = (t.slice(row, 1).to_pylist()[0] for t in (table, graded, credited))
        for name, arrays in ragged.items():
            if len(arrays[row]) != len(tokens[row]):
                path = rollouts if name in table.column_names else experience
                raise UserError(
                    f"{path}: column {name}: {rollout['rollout_id']}: "
                    f"expected {len(tokens[row])} values as in response_tokens, found {len(arrays[row])}"
                )
        if rollout["prompt_id"] not in row_of:
            raise UserError(f"{rollouts}: column prompt_id: {rollout['prompt_id']!r} is not in the table PROMPTS")
        problem = prompts.slice(row_of[rollout["prompt_id"]], 1).to_pylist()[0]
        found.append(
            Response(
                rollout["rollout_id"],
                problem["prompt"],
                problem["ground_truth"],
                rollout["response"],
                rollout["finish_reason"],
                reward["extracted"],
                reward["verdict"],
                reward["correct"],
                reward["reward"],
                credit["lambda_policy"],
                token_texts(tokenizer, tokens[row].tolist()),
                *(ragged[name][row] for name in ("rollout_logprobs", "values", "value_targets", "advantages")),
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


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds, decoded behind the token before it so that its leading space is kept."""
    texts = []
    for at, token in enumerate(ids):
        before = list(ids[max(at - 1, 0) : at])
        known = tokenizer.decode(before, skip_special_tokens=False)
        text = tokenizer.decode([*before, token], skip_special_tokens=False)[len(known) :]
        # A part of a character decodes to nothing: then the vocabulary's own spelling is shown.
        texts.append(text or tokenizer.id_to_token(token) or f"[{token}]")
    return texts


def _spread(rows_: np.ndarray, count: int) -> list[int]:
    """`count` of the rows, evenly spaced."""
    return [int(rows_[i * len(rows_) // count]) for i in range(count)]
