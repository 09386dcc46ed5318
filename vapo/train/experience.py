"""What training stages read: an iteration's rollouts and rewards as ragged rows, joined and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vapo.schemas import REWARDS, ROLLOUTS
from vapo.tables import check_joined, flat, read_table, rows
from vapo.train.batches import scatter
from vapo.train.engine import Reader
from vapo.train.ranks import together


@dataclass(frozen=True)
class Rollouts:
    """B responses: views into the mapped tables."""

    prompt_ids: list[str]
    rollout_ids: list[str]
    prompts: list[np.ndarray]  # B x int32 [P_i]
    responses: list[np.ndarray]  # B x int32 [T_i]
    logprobs: list[np.ndarray]  # B x float32 [T_i], the rollout engine's
    rewards: np.ndarray  # [B] float32
    correct: np.ndarray  # [B] bool
    truncated: np.ndarray  # [B] bool, cut at the limit of generation

    @property
    def lengths(self) -> np.ndarray:
        """Response lengths in tokens: [B]."""
        return np.array([len(r) for r in self.responses])

    def __len__(self) -> int:
        return len(self.rollout_ids)


def read_rollouts(rollouts: Path, rewards: Path) -> Rollouts:
    """Read ROLLOUTS and REWARDS; refuse them if their rows are not the same responses."""
    table, graded = read_table(rollouts, ROLLOUTS), read_table(rewards, REWARDS)
    check_joined(rewards, graded, table)
    return Rollouts(
        table["prompt_id"].to_pylist(),
        table["rollout_id"].to_pylist(),
        rows(table, "prompt_tokens"),
        rows(table, "response_tokens"),
        rows(table, "rollout_logprobs"),
        flat(graded, "reward"),
        flat(graded, "correct"),
        np.array([reason == "length" for reason in table["finish_reason"].to_pylist()], bool),
    )


def named(data: Rollouts, chosen: np.ndarray, most: int = 5) -> str:
    """Rows as a person finds them again: their rollout IDs, the first few by name."""
    ids = ", ".join(data.rollout_ids[row] for row in chosen[:most])
    return f"rollouts {ids}" + (f" and {len(chosen) - most} more" if len(chosen) > most else "")


@torch.no_grad()
def values_of(critic: Reader, data: Rollouts, rows_: np.ndarray, budget: int) -> list[np.ndarray]:
    """V before each token of the given rows: a list over all B rows, empty arrays for rows not asked for.

    Each rank computes its share, and every rank has the result.
    """
    out = [np.empty(0, np.float32)] * len(data)
    for turn in critic.turns(data.prompts, data.responses, rows_, budget):
        values = critic(turn)
        if turn.counts:
            scatter(values, turn.batch, data.lengths, out)
    return together(out, data.lengths)
