"""Which of an iteration's responses the page shows, each with all that the tables know of it, joined by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from vapo.errors import UserError
from vapo.report.samples import Sample, choose, join
from vapo.schemas import EXPERIENCE, REWARDS, ROLLOUTS
from vapo.tables import check_joined, flat, read_table, rows


@dataclass(frozen=True)
class Response(Sample):
    """A response with its credit; `tokens` and the arrays have one entry per response token."""

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
    chosen = choose(flat(graded, "correct"), count)
    lambdas = flat(credited, "lambda_policy")
    found = []
    for row, sample in zip(chosen, join(table, graded, prompts, chosen, rollouts), strict=True):
        for name, arrays in ragged.items():
            if len(arrays[row]) != len(tokens[row]):
                path = rollouts if name in table.column_names else experience
                raise UserError(
                    f"{path}: column {name}: {sample.rollout_id}: "
                    f"expected {len(tokens[row])} values as in response_tokens, found {len(arrays[row])}"
                )
        found.append(
            Response(
                **vars(sample),
                lambda_policy=float(lambdas[row]),
                tokens=token_texts(tokenizer, tokens[row].tolist()),
                logprobs=ragged["rollout_logprobs"][row],
                values=ragged["values"][row],
                value_targets=ragged["value_targets"][row],
                advantages=ragged["advantages"][row],
            )
        )
    return found


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
