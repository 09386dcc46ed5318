"""The advantages stage: the critic values every token, then decoupled, length-adaptive GAE."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vapo import recipe
from vapo.progress import Progress
from vapo.rl.advantages import gae, length_adaptive_lambda, value_targets, whiten
from vapo.rl.diagnostics import explained_variance
from vapo.schemas import EXPERIENCE
from vapo.tables import offsets_of, write_table
from vapo.train.experience import read_rollouts, values_of
from vapo.train.models import Checkpoint, load_critic


def advantages(
    section: recipe.Advantages, *, rollouts: Path, rewards: Path, critic: Path, experience: Path, iteration: int
) -> dict[str, float | None]:
    """Write EXPERIENCE; returns explained variance and the moments of values and advantages.

    Values are frozen here for the whole update. With lambda_critic = 1 the value targets are Monte-Carlo returns.
    """
    del iteration  # names the task in records and progress
    data = read_rollouts(rollouts, rewards)
    lengths, offsets = data.lengths, offsets_of(data.lengths)
    progress = Progress("responses", len(data))
    with Checkpoint(critic, "critic") as source:
        model = load_critic(source.folder)
    per_row = values_of(model, data, np.arange(len(data)), section.token_budget)
    values = np.concatenate(per_row).astype(np.float32)
    progress(len(data), int(lengths.sum()))
    lambdas = (
        length_adaptive_lambda(lengths, section.alpha)
        if section.lambda_policy == "length_adaptive"
        else np.full(len(data), section.lambda_policy)
    )
    policy_advantages = gae(values, offsets, data.rewards, lambdas)
    if section.whiten:
        policy_advantages = whiten(policy_advantages)
    targets = value_targets(values, offsets, data.rewards, section.lambda_critic)
    write_table(
        experience,
        EXPERIENCE,
        {
            "rollout_id": data.rollout_ids,
            "lambda_policy": lambdas.astype(np.float32),
            "values": (values, offsets),
            "advantages": (policy_advantages, offsets),
            "value_targets": (targets, offsets),
        },
    )
    returns = np.repeat(data.rewards, lengths)
    return {
        "explained_variance": explained_variance(values, returns),
        "value_mean": float(values.mean()),
        "advantage_mean": float(policy_advantages.mean()),
        "advantage_std": float(policy_advantages.std()),
        "lambda_policy_mean": float(np.mean(lambdas)),
        "lambda_policy_min": float(np.min(lambdas)),
    }
