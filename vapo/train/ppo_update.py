"""The PPO-update stage: several optimiser steps of policy and critic on one iteration's experience."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vapo import recipe
from vapo.progress import Progress
from vapo.schemas import EXPERIENCE, ROLLOUTS
from vapo.seeds import derive
from vapo.store import OPTIMIZER
from vapo.tables import check_joined, flat, read_table, rows
from vapo.train.batches import micro_batches, scatter
from vapo.train.experience import Rollouts, check_critic, named, read_rollouts
from vapo.train.mini_batch import SUMS, Experience, accumulate, mini_batches
from vapo.train.models import Checkpoint, load_critic, load_policy, response_logprobs, save_model
from vapo.train.optimizer import Optimizer
from vapo.train.ranks import add_up


def ppo_update(
    section: recipe.PpoUpdate,
    *,
    rollouts: Path,
    rewards: Path,
    experience: Path,
    policy: Path,
    reference: Path,
    new_policy: Path,
    critic: Path | None = None,
    new_critic: Path | None = None,
    iteration: int,
    seed: int,
    store: str,
) -> dict[str, float | None]:
    """Write the next policy and critic with their optimiser states; returns the losses and diagnostics.

    Args:
        reference: the policy that the KL term keeps near; read only if kl_coef > 0.
        critic: None where advantages need none (then there is no `new_critic`).

    Raises:
        UserError: the critic belongs to another policy or tokenizer, or a loss or gradient is not finite.
    """
    data = read_rollouts(rollouts, rewards)
    table = read_table(experience, EXPERIENCE)
    check_joined(experience, table, read_table(rollouts, ROLLOUTS))
    trained = flat(table, "trained")
    generator = np.random.default_rng(derive(seed, "ppo_update", iteration))
    orders = [np.flatnonzero(trained)[generator.permutation(int(trained.sum()))] for _ in range(section.epochs)]
    epochs = [mini_batches(order, section.mini_batch) for order in orders]
    with ExitStack() as stack:
        actor_source = stack.enter_context(Checkpoint(policy, "policy"))
        actor = load_policy(actor_source.folder)
        actor_optimizer = _optimizer(section, actor, section.actor_lr, actor_source.folder)
        value_model = critic_optimizer = critic_source = None
        if critic is not None:
            critic_source = stack.enter_context(Checkpoint(critic, "critic"))
            check_critic(actor_source, critic_source)
            value_model = load_critic(critic_source.folder)
            critic_optimizer = _optimizer(section, value_model, section.critic_lr, critic_source.folder)
        old = logprobs_of(actor, data, epochs[0], section.token_budget)
        batch = Experience(
            data,
            trained,
            rows(table, "advantages"),
            rows(table, "value_targets"),
            rows(table, "values"),
            old,
            _reference_logprobs(section, reference, data, epochs[0]),
        )
        metrics = _update(section, actor, value_model, actor_optimizer, critic_optimizer, batch, epochs)
        saved = save_model(
            actor,
            new_policy,
            kind="policy",
            store=store,
            tokenizer=actor_source.folder,
            facts={"steps": actor_optimizer.steps, "parent": actor_source.manifest.digest},
            optimizer=actor_optimizer,
        )
        if value_model is not None:
            assert critic_source is not None
            assert critic_optimizer is not None
            assert new_critic is not None
            save_model(
                value_model,
                new_critic,
                kind="critic",
                store=store,
                tokenizer=critic_source.folder,
                facts={"steps": critic_optimizer.steps, "policy": saved.digest},
                optimizer=critic_optimizer,
            )
    gap = np.abs(np.concatenate([old[r] - data.logprobs[r] for r in np.flatnonzero(trained)]))
    return {**metrics, "logprob_gap_mean": float(gap.mean()), "logprob_gap_max": float(gap.max())}


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
def logprobs_of(policy: nn.Module, data: Rollouts, parts: Sequence[np.ndarray], token_budget: int) -> list[np.ndarray]:
    """A model's logprobs of the responses: B x [T_i], empty for rows that are in none of the `parts`.

    Given the mini-batches of the first epoch, each is cut as the update cuts it: then the forward passes are the same,
    and the first step's ratio is 1 to the last bit.
    """
    out = [np.empty(0, np.float32)] * len(data)
    for part in parts:
        for batch in micro_batches(data.prompts, data.responses, part, token_budget):
            scatter(response_logprobs(policy, batch)[0], batch, data.lengths, out)
    return out


def _reference_logprobs(
    section: recipe.PpoUpdate, reference: Path, data: Rollouts, parts: Sequence[np.ndarray]
) -> list[np.ndarray] | None:
    if section.kl_coef == 0:
        return None
    with Checkpoint(reference, "policy") as source:
        return logprobs_of(load_policy(source.folder), data, parts, section.token_budget)


def _update(
    section: recipe.PpoUpdate,
    actor: nn.Module,
    critic: nn.Module | None,
    actor_optimizer: Optimizer,
    critic_optimizer: Optimizer | None,
    experience: Experience,
    epochs: Sequence[Sequence[np.ndarray]],
) -> dict[str, float | None]:
    """One optimiser step of both models per mini-batch; returns means over tokens or steps."""
    data, total = experience.data, dict.fromkeys(SUMS, 0.0)
    actor_norm = critic_norm = 0.0
    chosen_rows = [chosen for epoch in epochs for chosen in epoch]
    progress = Progress("optimiser steps", len(chosen_rows))
    for step, chosen in enumerate(chosen_rows, start=1):
        accumulate(section, actor, critic, experience, chosen, step, total)
        batch = named(data, chosen)
        actor_norm += actor_optimizer.step(batch=batch)
        if critic_optimizer is not None:
            critic_norm += critic_optimizer.step(batch=batch)
        progress(step, int(data.lengths[chosen].sum()), entropy=total["entropy"] / max(total["tokens"], 1))
    total, steps = add_up(total), len(chosen_rows)
    wanted = {
        "value_loss": critic is not None,
        "kl_loss": section.kl_coef > 0,
        "dual_clip_fraction": section.dual_clip > 0,
        "importance_weight": section.importance_cap > 0,
        "importance_truncated": section.importance_cap > 0,
    }
    per_step = ("policy_loss", "positive_lm_loss", "value_loss", "kl_loss")
    per_token = (
        *("entropy", "approx_kl", "clip_fraction_low", "clip_fraction_high", "dual_clip_fraction"),
        *("importance_weight", "importance_truncated"),
    )
    return {
        **{name: total[name] / steps for name in per_step if wanted.get(name, True)},
        **{name: total[name] / total["tokens"] for name in per_token if wanted.get(name, True)},
        "actor_grad_norm": actor_norm / steps,
        "critic_grad_norm": critic_norm / steps if critic is not None else None,
        "padding_share": 1.0 - total["real_positions"] / total["positions"],
        "steps": actor_optimizer.steps,
    }
