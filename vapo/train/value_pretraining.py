"""The value-pretraining stage: before the first update the critic learns the fixed policy's returns."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vapo import recipe
from vapo.errors import UserError
from vapo.progress import Progress
from vapo.rl.diagnostics import explained_variance
from vapo.rl.losses import token_weights, value_loss
from vapo.seeds import derive
from vapo.train.batches import micro_batches
from vapo.train.experience import Rollouts, read_rollouts, values_of
from vapo.train.models import Checkpoint, critic_from_policy, response_values, save_model
from vapo.train.optimizer import Optimizer


def value_pretraining(
    section: recipe.ValuePretraining,
    *,
    rollouts: Path,
    rewards: Path,
    policy: Path,
    critic: Path,
    seed: int,
    store: str,
) -> dict[str, float | None]:
    """Write the critic that does best on held-out prompts; returns loss and explained variance there.

    VAPO section 4.1.1: responses of a fixed policy, Monte-Carlo returns (lambda = 1) as targets. The policy is only
    read. The optimiser state is not kept: PPO starts the critic's afresh.
    """
    torch.manual_seed(derive(seed, "value_pretraining", "weights"))
    generator = np.random.default_rng(derive(seed, "value_pretraining", "batches"))
    data = read_rollouts(rollouts, rewards)
    train, heldout = split_by_prompt(data, section.heldout_share, generator)
    with Checkpoint(policy, "policy") as source:
        model = critic_from_policy(source.folder)
        if section.init == "reward_model":
            _reward_model(section, model, data, train, generator)
        loss, variance, kept_step = _pretrain(section, model, data, train, heldout, generator)
        save_model(
            model,
            critic,
            kind="critic",
            store=store,
            tokenizer=source.folder,
            facts={"policy": source.manifest.digest, "steps": 0},
        )
    return {"value_loss": loss, "explained_variance": variance, "kept_step": kept_step, "heldout_rows": len(heldout)}


def split_by_prompt(
    data: Rollouts, heldout_share: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Rows [.] to train on and rows held out; no prompt is in both."""
    prompts = sorted(set(data.prompt_ids))
    count = min(max(1, round(len(prompts) * heldout_share)), len(prompts) - 1)
    chosen = {prompts[i] for i in generator.permutation(len(prompts))[:count]}
    held = np.array([p in chosen for p in data.prompt_ids])
    if held.all() or not held.any():
        raise UserError(f"value_pretraining.prompts: {len(prompts)} distinct prompts cannot be split: use more")
    return np.flatnonzero(~held), np.flatnonzero(held)


def _pretrain(
    section: recipe.ValuePretraining,
    model: nn.Module,
    data: Rollouts,
    train: np.ndarray,
    heldout: np.ndarray,
    generator: np.random.Generator,
) -> tuple[float, float | None, int]:
    """Train on Monte-Carlo returns and leave the best weights in `model`: (held-out loss, its EV, their step)."""
    optimizer = _optimizer(section, model)
    best, best_variance, best_step, weights = math.inf, None, 0, {}
    progress = Progress("optimiser steps", section.steps)
    variance: float | None = None
    for step in range(section.steps + 1):
        if step % section.measure_every == 0 or step == section.steps:
            loss, variance = _measure(model, data, heldout, section.token_budget)
            if loss < best:
                best, best_variance, best_step = loss, variance, step
                weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if step == section.steps:
            break
        rows = generator.permutation(train)[: section.mini_batch]
        tokens = _step(model, optimizer, data, rows, section.token_budget, last_token_only=False)
        progress(step + 1, tokens, value_loss=best, explained_variance=variance)
    model.load_state_dict(weights)
    return best, best_variance, best_step


def _reward_model(
    section: recipe.ValuePretraining,
    model: nn.Module,
    data: Rollouts,
    train: np.ndarray,
    generator: np.random.Generator,
) -> None:
    """Train on the last token alone, as a reward model is: where the papers' critics start, biased on early tokens."""
    optimizer = _optimizer(section, model)
    progress = Progress("reward-model steps", section.reward_model_steps)
    for step in range(section.reward_model_steps):
        rows = generator.permutation(train)[: section.mini_batch]
        progress(step + 1, _step(model, optimizer, data, rows, section.token_budget, last_token_only=True))


def _optimizer(section: recipe.ValuePretraining, model: nn.Module) -> Optimizer:
    return Optimizer(
        model,
        lr=section.lr,
        weight_decay=section.weight_decay,
        warmup_steps=section.warmup_steps,
        max_grad_norm=section.max_grad_norm,
    )


def _step(
    model: nn.Module, optimizer: Optimizer, data: Rollouts, rows: np.ndarray, budget: int, *, last_token_only: bool
) -> int:
    """One optimiser step on a mini-batch; returns its tokens."""
    lengths = data.lengths
    counted = np.ones_like(lengths[rows]) if last_token_only else lengths[rows]
    weight = token_weights(torch.from_numpy(counted), "token")[0]
    for batch in micro_batches(data.prompts, data.responses, rows, budget):
        targets = torch.from_numpy(np.repeat(data.rewards[batch.rows], lengths[batch.rows]))
        weights = weight.expand(len(batch))
        if last_token_only:
            last = torch.from_numpy(np.cumsum(lengths[batch.rows]) - 1)
            weights = torch.zeros(len(batch)).index_fill_(0, last, float(weight))
        value_loss(response_values(model, batch), targets, weights).backward()
    optimizer.step()
    return int(lengths[rows].sum())


def _measure(model: nn.Module, data: Rollouts, rows: np.ndarray, budget: int) -> tuple[float, float | None]:
    """(0.5 MSE, explained variance) over all tokens of the rows."""
    predicted = values_of(model, data, rows, budget)
    values = np.concatenate([predicted[r] for r in rows])
    targets = np.repeat(data.rewards[rows], data.lengths[rows])
    return 0.5 * float(np.mean((values - targets) ** 2)), explained_variance(values, targets)
