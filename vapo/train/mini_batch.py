"""The gradient of one mini-batch: every term of the loss, however it is split into micro-batches and over ranks.

Axes: B rows of the iteration's tables, T_i tokens of a response, n response tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vapo import recipe
from vapo.errors import UserError
from vapo.rl.diagnostics import approx_kl, clipped_tokens, dual_clipped_tokens
from vapo.rl.losses import (
    clipped_policy_loss,
    entropy_bonus,
    kl_loss,
    positive_lm_loss,
    token_weights,
    truncated_importance_weights,
    value_loss,
)
from vapo.train.batches import MicroBatch, gather
from vapo.train.engine import Engine
from vapo.train.experience import Rollouts, named

SUMS = (  # what is added up: shares of the losses, and counts and sums over tokens
    *("policy_loss", "positive_lm_loss", "value_loss", "kl_loss", "entropy", "approx_kl"),
    *("clip_fraction_low", "clip_fraction_high", "dual_clip_fraction", "importance_weight", "importance_truncated"),
    *("tokens", "positions", "real_positions"),
)


@dataclass(frozen=True)
class Experience:
    """What an update learns from; lists over B rows of arrays [T_i]."""

    data: Rollouts
    trained: np.ndarray  # [B] bool: takes part in the update
    advantages: list[np.ndarray]
    value_targets: list[np.ndarray]  # what the critic learns; not read without one
    values: list[np.ndarray]  # at rollout time, for the value clip; not read without a critic
    old_logprobs: list[np.ndarray]  # the trainer's own forward before the first step
    reference_logprobs: list[np.ndarray] | None  # for the KL term


@dataclass(frozen=True)
class Weights:
    """What a token of each row counts for, and the counts behind it: all of the WHOLE mini-batch."""

    policy: Tensor  # [B]
    value: Tensor  # [B]
    positive_tokens: int


def accumulate_policy(
    section: recipe.PpoUpdate,
    actor: Engine,
    experience: Experience,
    chosen: np.ndarray,
    step: int,
    total: dict[str, float],
) -> None:
    """Add this rank's share of a mini-batch's gradient to the actor, and its sums to `total` (names: SUMS).

    Args:
        chosen: rows of the mini-batch.
        step: the optimiser step that it is for, for errors.

    Raises:
        UserError: a term is not finite; names the step, the term and the rollouts.
    """
    data, weights = experience.data, _weights(section, experience, chosen)
    for turn in actor.turns(data.prompts, data.responses, chosen, section.token_budget):
        found = actor(turn, entropy_gradient=section.entropy_coef > 0)
        if not turn.counts:
            actor.backward(0.0 * (found[0].sum() + found[1].sum()), turn)
            continue
        micro = turn.batch
        actor.backward(_policy_term(section, found, experience, weights, micro, step, total), turn)
        total["tokens"] += len(micro)
        total["positions"] += micro.tokens.numel()
        total["real_positions"] += micro.real_positions


def accumulate_value(
    section: recipe.PpoUpdate,
    critic: Engine,
    experience: Experience,
    chosen: np.ndarray,
    step: int,
    total: dict[str, float],
) -> None:
    """The same for the critic."""
    data, weights = experience.data, _weights(section, experience, chosen)
    for turn in critic.turns(data.prompts, data.responses, chosen, section.token_budget):
        values = critic(turn)
        if not turn.counts:
            critic.backward(0.0 * values.sum(), turn)
            continue
        term = _value_term(section, values, experience, weights, turn.batch)
        _check_finite(data, turn.batch, step, value=term)
        critic.backward(term, turn)
        total["value_loss"] += term.item()


def _weights(section: recipe.PpoUpdate, experience: Experience, chosen: np.ndarray) -> Weights:
    lengths = experience.data.lengths[chosen]
    policy, value = (torch.zeros(len(experience.data)) for _ in range(2))
    policy[chosen] = token_weights(torch.from_numpy(lengths), section.loss_aggregation)
    value[chosen] = token_weights(torch.from_numpy(lengths), "token")
    return Weights(policy, value, int(lengths[experience.data.correct[chosen]].sum()))


def _policy_term(
    section: recipe.PpoUpdate,
    found: tuple[Tensor, Tensor],
    experience: Experience,
    weights: Weights,
    micro: MicroBatch,
    step: int,
    total: dict[str, float],
) -> Tensor:
    """The micro-batch's share of all that the policy is trained on; `found` are its logprobs and entropies."""
    (logprobs, entropies), data, row = found, experience.data, _row_of(experience.data, micro)
    weight, old = weights.policy[row], gather(experience.old_logprobs, micro)
    advantages = gather(experience.advantages, micro)
    importance = None
    if section.importance_cap > 0:
        importance = truncated_importance_weights(old, gather(data.logprobs, micro), section.importance_cap)
        total["importance_weight"] += float(importance.sum())
        total["importance_truncated"] += int((importance >= section.importance_cap).sum())
    policy = clipped_policy_loss(
        logprobs, old, advantages, weight, section.clip_low, section.clip_high, section.dual_clip or None, importance
    )
    positive = torch.from_numpy(data.correct.copy())[row]
    positive_lm = positive_lm_loss(logprobs, positive, weights.positive_tokens)
    loss = policy + section.positive_lm_coef * positive_lm
    terms = {"policy": policy, "positive_lm": positive_lm}
    if experience.reference_logprobs is not None:
        reference = gather(experience.reference_logprobs, micro)
        terms["kl"] = kl_loss(logprobs, reference, weight, section.kl_estimator)
        loss = loss + section.kl_coef * terms["kl"]
    if section.entropy_coef > 0:
        terms["entropy"] = entropy_bonus(entropies, weight)
        loss = loss - section.entropy_coef * terms["entropy"]
    _check_finite(data, micro, step, **terms)
    for name in terms.keys() - {"entropy"}:
        total[f"{name}_loss"] += terms[name].item()
    with torch.no_grad():
        low, high = clipped_tokens(logprobs, old, advantages, section.clip_low, section.clip_high)
        if section.dual_clip > 0:
            total["dual_clip_fraction"] += dual_clipped_tokens(logprobs, old, advantages, section.dual_clip)
        total["approx_kl"] += float(approx_kl(logprobs, old))
    total["clip_fraction_low"] += low
    total["clip_fraction_high"] += high
    total["entropy"] += float(entropies.detach().sum())
    return loss


def _value_term(
    section: recipe.PpoUpdate, values: Tensor, experience: Experience, weights: Weights, micro: MicroBatch
) -> Tensor:
    return value_loss(
        values,
        gather(experience.value_targets, micro),
        weights.value[_row_of(experience.data, micro)],
        gather(experience.values, micro),
        section.value_clip or None,
    )


def _row_of(data: Rollouts, micro: MicroBatch) -> Tensor:
    """The row of each response token: [n]."""
    return torch.from_numpy(np.repeat(micro.rows, data.lengths[micro.rows]))


def _check_finite(data: Rollouts, micro: MicroBatch, step: int, **terms: Tensor) -> None:
    for name, term in terms.items():
        if not torch.isfinite(term):
            raise UserError(
                f"the {name} loss is {term.item()} at optimiser step {step}, from {named(data, micro.rows)}: lower the "
                "learning rate or look at these rows; the last checkpoint is kept"
            )


def mini_batches(rows: np.ndarray, size: int) -> Sequence[np.ndarray]:
    """Rows in their order, `size` at a time; the last one may be smaller."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]
