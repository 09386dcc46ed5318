"""The PPO-update stage: several optimiser steps of policy and critic on one iteration's experience."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vapo import recipe
from vapo.errors import UserError
from vapo.progress import Progress
from vapo.rl.diagnostics import approx_kl, clipped_tokens
from vapo.rl.losses import clipped_policy_loss, positive_lm_loss, token_weights, value_loss
from vapo.schemas import EXPERIENCE, ROLLOUTS
from vapo.seeds import derive
from vapo.store import OPTIMIZER
from vapo.tables import check_joined, read_table, rows
from vapo.train.batches import MicroBatch, gather, micro_batches, scatter
from vapo.train.experience import Rollouts, read_rollouts
from vapo.train.models import (
    Checkpoint,
    check_same_tokenizer,
    load_critic,
    load_policy,
    response_logprobs,
    response_values,
    save_model,
)
from vapo.train.optimizer import Optimizer


@dataclass(frozen=True)
class Experience:
    """What an update learns from; lists over B rows of arrays [T_i]."""

    data: Rollouts
    advantages: list[np.ndarray]
    value_targets: list[np.ndarray]
    values: list[np.ndarray]  # at rollout time, for the value clip
    old_logprobs: list[np.ndarray]  # the trainer's own forward before the first step


def ppo_update(
    section: recipe.PpoUpdate,
    *,
    rollouts: Path,
    rewards: Path,
    experience: Path,
    policy: Path,
    critic: Path,
    new_policy: Path,
    new_critic: Path,
    iteration: int,
    seed: int,
    store: str,
) -> dict[str, float | None]:
    """Write the next policy and critic with their optimiser states; returns the losses and diagnostics.

    Raises:
        UserError: the critic belongs to another policy or tokenizer, or a loss or gradient is not finite.
    """
    data = read_rollouts(rollouts, rewards)
    table = read_table(experience, EXPERIENCE)
    check_joined(experience, table, read_table(rollouts, ROLLOUTS))
    with Checkpoint(policy, "policy") as actor_source, Checkpoint(critic, "critic") as critic_source:
        check_same_tokenizer(actor_source, critic_source)
        _check_critic(actor_source, critic_source)
        actor, value_model = load_policy(actor_source.folder), load_critic(critic_source.folder)
        actor_optimizer = _optimizer(section, actor, section.actor_lr, actor_source.folder)
        critic_optimizer = _optimizer(section, value_model, section.critic_lr, critic_source.folder)
        old = _old_logprobs(actor, data, section.token_budget)
        batch = Experience(data, rows(table, "advantages"), rows(table, "value_targets"), rows(table, "values"), old)
        generator = np.random.default_rng(derive(seed, "ppo_update", iteration))
        metrics = _update(section, actor, value_model, actor_optimizer, critic_optimizer, batch, generator)
        saved = save_model(
            actor,
            new_policy,
            kind="policy",
            store=store,
            tokenizer=actor_source.folder,
            facts={"steps": actor_optimizer.steps, "parent": actor_source.manifest.digest},
            optimizer=actor_optimizer,
        )
        save_model(
            value_model,
            new_critic,
            kind="critic",
            store=store,
            tokenizer=critic_source.folder,
            facts={"steps": critic_optimizer.steps, "policy": saved.digest},
            optimizer=critic_optimizer,
        )
    gap = np.abs(np.concatenate(old) - np.concatenate(data.logprobs))
    return {**metrics, "logprob_gap_mean": float(gap.mean()), "logprob_gap_max": float(gap.max())}


def _check_critic(policy: Checkpoint, critic: Checkpoint) -> None:
    belongs = critic.manifest.facts.get("policy")
    if belongs != policy.manifest.digest:
        raise UserError(
            f"the critic was trained for policy {str(belongs)[:12]}, this policy is {policy.manifest.digest[:12]}: "
            "pretrain a critic for it, or take both from the same iteration"
        )


def _optimizer(section: recipe.PpoUpdate, model: nn.Module, lr: float, folder: Path) -> Optimizer:
    optimizer = Optimizer(
        model,
        lr=lr,
        weight_decay=section.weight_decay,
        warmup_steps=section.warmup_steps,
        max_grad_norm=section.max_grad_norm,
    )
    optimizer.load(folder / OPTIMIZER)
    return optimizer


@torch.no_grad()
def _old_logprobs(actor: nn.Module, data: Rollouts, budget: int) -> list[np.ndarray]:
    """The trainer's own logprobs at rollout weights: B x [T_i]; with them the first step's ratio is exactly 1."""
    out = [np.empty(0, np.float32)] * len(data)
    for batch in micro_batches(data.prompts, data.responses, np.arange(len(data)), budget):
        scatter(response_logprobs(actor, batch)[0], batch, data.lengths, out)
    return out


def _update(
    section: recipe.PpoUpdate,
    actor: nn.Module,
    critic: nn.Module,
    actor_optimizer: Optimizer,
    critic_optimizer: Optimizer,
    batch: Experience,
    generator: np.random.Generator,
) -> dict[str, float | None]:
    """`epochs` passes in mini-batches of responses; returns means over tokens or steps."""
    data, total = batch.data, defaultdict[str, float](float)
    per_epoch = math.ceil(len(data) / section.mini_batch)
    progress = Progress("optimiser steps", section.epochs * per_epoch)
    steps = 0
    for _ in range(section.epochs):
        order = generator.permutation(len(data))
        for start in range(0, len(data), section.mini_batch):
            mini_batch = order[start : start + section.mini_batch]
            tokens = _mini_batch(section, actor, critic, batch, mini_batch, total)
            total["actor_grad_norm"] += actor_optimizer.step()
            total["critic_grad_norm"] += critic_optimizer.step()
            steps += 1
            progress(steps, tokens, entropy=total["entropy"] / total["tokens"])
    per_step = ("policy_loss", "positive_lm_loss", "value_loss", "actor_grad_norm", "critic_grad_norm")
    per_token = ("entropy", "approx_kl", "clip_fraction_low", "clip_fraction_high")
    return {
        **{name: total[name] / steps for name in per_step},
        **{name: total[name] / total["tokens"] for name in per_token},
        "padding_share": 1.0 - total["real_positions"] / total["positions"],
        "steps": actor_optimizer.steps,
    }


def _mini_batch(
    section: recipe.PpoUpdate,
    actor: nn.Module,
    critic: nn.Module,
    experience: Experience,
    chosen: np.ndarray,
    total: dict[str, float],
) -> int:
    """Accumulate the gradient of one mini-batch in both models and its sums in `total`; returns its tokens."""
    data = experience.data
    lengths = torch.from_numpy(data.lengths)
    weight_of = torch.zeros(len(data))
    weight_of[chosen] = token_weights(lengths[chosen], section.loss_aggregation)
    value_weight_of = torch.zeros(len(data))
    value_weight_of[chosen] = token_weights(lengths[chosen], "token")
    positive_tokens = int(data.lengths[chosen][data.correct[chosen]].sum())
    for micro in micro_batches(data.prompts, data.responses, chosen, section.token_budget):
        repeats = lengths[micro.rows]
        expand = torch.from_numpy(micro.rows).repeat_interleave(repeats)
        old = gather(experience.old_logprobs, micro)
        advantages = gather(experience.advantages, micro)
        logprobs, entropy = response_logprobs(actor, micro)
        policy_loss = clipped_policy_loss(
            logprobs, old, advantages, weight_of[expand], section.clip_low, section.clip_high
        )
        positive = torch.from_numpy(data.correct.copy())[expand]
        lm_loss = positive_lm_loss(logprobs, positive, positive_tokens)
        critic_loss = value_loss(
            response_values(critic, micro),
            gather(experience.value_targets, micro),
            value_weight_of[expand],
            gather(experience.values, micro),
            section.value_clip,
        )
        _check_finite(data, micro, policy=policy_loss, positive_lm=lm_loss, value=critic_loss)
        (policy_loss + section.positive_lm_coef * lm_loss).backward()
        critic_loss.backward()
        with torch.no_grad():
            low, high = clipped_tokens(logprobs, old, advantages, section.clip_low, section.clip_high)
            total["approx_kl"] += float(approx_kl(logprobs, old))
        total["policy_loss"] += policy_loss.item()
        total["positive_lm_loss"] += lm_loss.item()
        total["value_loss"] += critic_loss.item()
        total["entropy"] += float(entropy.sum())
        total["clip_fraction_low"] += low
        total["clip_fraction_high"] += high
        total["tokens"] += len(micro)
        total["positions"] += micro.tokens.numel()
        total["real_positions"] += int(sum(len(data.prompts[r]) + len(data.responses[r]) for r in micro.rows))
    return int(data.lengths[chosen].sum())


def _check_finite(data: Rollouts, micro: MicroBatch, **terms: Tensor) -> None:
    for name, term in terms.items():
        if not torch.isfinite(term):
            ids = ", ".join(data.rollout_ids[r] for r in micro.rows[:5])
            raise UserError(
                f"the {name} loss is {term.item()} in a batch with rollouts {ids}: lower the learning rate or look "
                "at these rows; the last checkpoint is kept"
            )
