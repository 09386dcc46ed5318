"""What training stages read: an iteration's rollouts and rewards as ragged rows, joined and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vapo.errors import UserError
from vapo.schemas import REWARDS, ROLLOUTS
from vapo.tables import check_joined, flat, read_table, rows
from vapo.train.batches import micro_batches, scatter
from vapo.train.models import Checkpoint, check_same_tokenizer, response_values


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


def check_critic(policy: Checkpoint, critic: Checkpoint) -> None:
    """A critic is for the one policy that it was trained or updated with, and reads text alike.

    Raises:
        UserError: it belongs to another policy, or their tokenizers differ.
    """
    check_same_tokenizer(policy, critic)
    belongs = critic.manifest.facts.get("policy")
    if belongs != policy.manifest.digest:
        raise UserError(
            f"the critic was trained for policy {str(belongs)[:12]}, this policy is {policy.manifest.digest[:12]}: "
            "pretrain a critic for it, or take both from the same iteration"
        )


@torch.no_grad()
def values_of(critic: torch.nn.Module, data: Rollouts, rows_: np.ndarray, budget: int) -> list[np.ndarray]:
    """V before each token of the given rows: a list over all B rows, empty arrays for rows not asked for."""
    out = [np.empty(0, np.float32)] * len(data)
    for batch in micro_batches(data.prompts, data.responses, rows_, budget):
        scatter(response_values(critic, batch), batch, data.lengths, out)
    return out
