"""The advantages stage: what every token is worth to the policy and the critic, and which responses are trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from vapo import recipe
from vapo.errors import UserError
from vapo.progress import Progress
from vapo.rl.advantages import decoupled_gae, length_adaptive_lambda, whiten
from vapo.rl.diagnostics import explained_variance
from vapo.rl.groups import group_mean, group_normalised, informative_groups
from vapo.schemas import EXPERIENCE
from vapo.tables import offsets_of, write_table
from vapo.train.checks import check_fits, memory_advice
from vapo.train.engine import reader_of
from vapo.train.experience import Rollouts, named, read_rollouts, values_of
from vapo.train.models import Checkpoint, Forward, load_critic
from vapo.train.ranks import rank


def advantages(
    section: recipe.Advantages,
    *,
    rollouts: Path,
    rewards: Path,
    experience: Path,
    critic: Path | None = None,
    iteration: int,
) -> dict[str, float | None]:
    """Write EXPERIENCE; returns explained variance and the moments of values and advantages.

    Values are frozen here for the whole update. With lambda_critic = 1 the value targets are Monte-Carlo returns.

    Args:
        critic: None where advantages are group-normalised.

    Raises:
        UserError: dynamic sampling finds no group to learn from.
    """
    del iteration  # names the task in records and progress
    data = read_rollouts(rollouts, rewards)
    lengths, offsets = data.lengths, offsets_of(data.lengths)
    _, groups = np.unique(data.prompt_ids, return_inverse=True)
    informative = informative_groups(data.correct, groups)
    trained = _trained(section, data, groups, informative)
    returns = np.repeat(data.rewards, lengths)
    if section.estimator == "gae":
        assert critic is not None
        values = _values(section, critic, data)
        lambdas = _lambdas(section, lengths)
        policy_advantages, targets = decoupled_gae(
            values, offsets, data.rewards, lambdas, section.lambda_critic, threads=torch.get_num_threads()
        )
        variance = explained_variance(values, returns)
    else:
        std = section.estimator == "group_normalised"
        policy_advantages = np.repeat(group_normalised(data.rewards, groups, divide_by_std=std), lengths)
        values = np.repeat(group_mean(data.rewards, groups), lengths).astype(np.float32)
        lambdas, targets, variance = np.ones(len(data)), returns, None
    of_trained = np.repeat(trained, lengths)
    if section.whiten:
        policy_advantages[of_trained] = whiten(policy_advantages[of_trained])
    columns = {
        "rollout_id": data.rollout_ids,
        "trained": trained,
        "lambda_policy": lambdas.astype(np.float32),
        "values": (values, offsets),
        "advantages": (policy_advantages, offsets),
        "value_targets": (targets, offsets),
    }
    if rank() == 0:
        write_table(experience, EXPERIENCE, columns)
    learned_from = policy_advantages[of_trained]
    return {
        "explained_variance": variance,
        "value_mean": float(values.mean()),
        "advantage_mean": float(learned_from.mean()),
        "advantage_std": float(learned_from.std()),
        "lambda_policy_mean": float(np.mean(lambdas)) if critic else None,
        "lambda_policy_min": float(np.min(lambdas)) if critic else None,
        "informative_share": float(informative.mean()),
        "trained_share": float(trained.mean()),
    }


def _values(section: recipe.Advantages, critic: Path, data: Rollouts) -> np.ndarray:
    """V before each token: [N] float32."""
    progress = Progress("responses", len(data))
    with Checkpoint(critic, "critic", state=False) as source:
        check_fits(data, source)
        model = reader_of(Forward(load_critic(source.folder), "critic"), section.train)
    with memory_advice("advantages", section):
        per_row = values_of(model, data, np.arange(len(data)), section.token_budget)
    progress(len(data), int(data.lengths.sum()))
    wrong = np.array([row for row, values in enumerate(per_row) if not np.isfinite(values).all()], int)
    if len(wrong):
        raise UserError(
            f"the critic's values are not finite for {named(data, wrong)}: lower ppo_update.critic_lr or "
            "value_pretraining.lr, and go on from an earlier critic"
        )
    return np.concatenate(per_row).astype(np.float32)


def _lambdas(section: recipe.Advantages, lengths: np.ndarray) -> np.ndarray:
    """lambda_policy of each response: [B]."""
    if section.lambda_policy == "length_adaptive":
        return length_adaptive_lambda(lengths, section.alpha)
    return np.full(len(lengths), section.lambda_policy, np.float64)


def _trained(section: recipe.Advantages, data: Rollouts, groups: np.ndarray, informative: np.ndarray) -> np.ndarray:
    """Which responses the update learns from, [B] bool: dynamic sampling's groups without those that were cut."""
    trained = np.ones(len(groups), bool)
    if section.keep_groups:
        if not informative.any():
            raise UserError(
                f"none of the {len(informative)} groups has both correct and wrong responses, so "
                f"advantages.keep_groups {section.keep_groups} leaves nothing to learn from: raise rollout.prompts or "
                "rollout.samples, or take problems that the policy solves sometimes"
            )
        order = list(dict.fromkeys(groups.tolist()))  # as they were sampled
        trained = np.isin(groups, [group for group in order if informative[group]][: section.keep_groups])
    if section.drop_truncated:
        trained &= ~data.truncated
        if not trained.any():
            raise UserError(
                f"all of the {len(trained)} responses that are left were cut at the limit of generation, and "
                "advantages.drop_truncated is set: raise rollout.max_new_tokens"
            )
    return trained
