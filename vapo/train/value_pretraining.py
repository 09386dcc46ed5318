"""The value-pretraining stage: before the first update the critic learns the fixed policy's returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vapo import recipe
from vapo.errors import UserError
from vapo.progress import Progress
from vapo.rl.diagnostics import explained_variance
from vapo.rl.losses import token_weights, value_loss
from vapo.schemas import PRETRAINING
from vapo.seeds import derive
from vapo.tables import write_table
from vapo.train.batches import micro_batches, scatter
from vapo.train.experience import Rollouts, named, read_rollouts, values_of
from vapo.train.models import Checkpoint, critic_from_policy, response_values, save_model
from vapo.train.optimizer import Optimizer

Measure = tuple[int, str, float, float | None]  # a row of PRETRAINING: step, rows, value loss, explained variance


def value_pretraining(
    section: recipe.ValuePretraining,
    *,
    rollouts: Path,
    rewards: Path,
    policy: Path,
    critic: Path,
    pretraining: Path,
    seed: int,
    store: str,
) -> dict[str, float | None]:
    """Write the critic that does best on held-out prompts, and PRETRAINING; returns its loss and explained variance.

    VAPO section 4.1.1, VC-PPO section 3.1: responses of a fixed policy, Monte-Carlo returns (lambda = 1) as targets.
    The policy is only read; the critic's manifest holds its digest. The optimiser state is not kept: PPO starts the
    critic's afresh. With max_steps = 0 the critic is what `init` makes it.

    Raises:
        UserError: the critic never beats a constant on the held-out prompts, or a loss or gradient is not finite.
    """
    torch.manual_seed(derive(seed, "value_pretraining", "weights"))
    generator = np.random.default_rng(derive(seed, "value_pretraining", "batches"))
    data = read_rollouts(rollouts, rewards)
    train, heldout = split_by_prompt(data, section.heldout_share, generator)
    with Checkpoint(policy, "policy") as source:
        model = critic_from_policy(source.folder)
        if section.init == "reward_model":
            _reward_model(section, model, data, train, generator)
        measures, kept = _pretrain(section, model, data, train, heldout, generator)
        constant = _loss_of_a_constant(data, train, heldout)
        step, _, loss, variance = kept
        if section.max_steps and section.must_beat_mean and not loss < constant:
            raise UserError(_no_better(section, data, loss, constant, measures[-1][0]))
        columns = zip(*measures, strict=True)
        write_table(pretraining, PRETRAINING, dict(zip(PRETRAINING.names, map(_defined, columns), strict=True)))
        save_model(
            model,
            critic,
            kind="critic",
            store=store,
            tokenizer=source.folder,
            facts={"policy": source.manifest.digest, "steps": 0},
        )
    return {
        "value_loss": loss,
        "explained_variance": variance,
        "value_loss_of_a_constant": constant,
        "kept_step": step,
        "steps": measures[-1][0],
        "heldout_rows": len(heldout),
    }


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


def plateaued(losses: Sequence[float], patience: int, tolerance: float) -> bool:
    """Whether the last `patience` losses are all no lower than (1 - tolerance) times the least one before them."""
    return len(losses) > patience and min(losses[-patience:]) > (1 - tolerance) * min(losses[:-patience])


def _pretrain(
    section: recipe.ValuePretraining,
    model: nn.Module,
    data: Rollouts,
    train: np.ndarray,
    heldout: np.ndarray,
    generator: np.random.Generator,
) -> tuple[list[Measure], Measure]:
    """Train on Monte-Carlo returns until the held-out loss is flat; leave the best weights in `model`.

    Returns:
        Everything that was measured, and the measure of what is kept.
    """
    optimizer = _optimizer(section, model)
    measures: list[Measure] = []
    heldout_losses: list[float] = []
    best: Measure = (0, "held-out", math.inf, None)
    weights: dict[str, torch.Tensor] = {}
    progress = Progress("optimiser steps", section.max_steps)
    for step in range(section.max_steps + 1):
        last = step == section.max_steps
        if step % section.measure_every == 0 or last:
            found = (step, "held-out", *_measure(model, data, heldout, section.token_budget))
            measures.append(found)
            heldout_losses.append(found[2])
            if found[2] < best[2]:
                best, weights = found, {name: tensor.clone() for name, tensor in model.state_dict().items()}
            flat = plateaued(heldout_losses, section.patience, section.tolerance)
            if last or (step >= section.min_steps and flat):
                break
        rows = generator.permutation(train)[: section.mini_batch]
        loss, variance = _step(model, optimizer, data, rows, section.token_budget, last_token_only=False)
        measures.append((step, "mini-batch", loss, variance))
        tokens = int(data.lengths[rows].sum())
        progress(step + 1, tokens, value_loss=loss, explained_variance=variance, heldout_loss=best[2])
    if weights:
        model.load_state_dict(weights)
    return measures, best


def _loss_of_a_constant(data: Rollouts, train: np.ndarray, heldout: np.ndarray) -> float:
    """The held-out loss of predicting the mean return of the training tokens at every token."""
    returns = [np.repeat(data.rewards[rows], data.lengths[rows]).astype(np.float64) for rows in (train, heldout)]
    return 0.5 * float(np.mean((returns[1] - returns[0].mean()) ** 2))


def _no_better(section: recipe.ValuePretraining, data: Rollouts, loss: float, constant: float, steps: int) -> str:
    if np.ptp(data.rewards) == 0:
        return (
            f"value-pretraining has nothing to learn: all {len(data)} responses have reward {data.rewards[0]:g}; "
            "take problems that the policy solves sometimes, or set value_pretraining.must_beat_mean to false"
        )
    return (
        f"value-pretraining never beat a constant: held-out value loss {loss:.4g} at best in {steps} steps, predicting "
        f"the mean has {constant:.4g}; raise value_pretraining.prompts, max_steps {section.max_steps} or lr "
        f"{section.lr:g}, or set value_pretraining.must_beat_mean to false"
    )


def _defined(column: Sequence[float | str | None]) -> list[float | str]:
    return [math.nan if value is None else value for value in column]


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
        loss, _ = _step(model, optimizer, data, rows, section.token_budget, last_token_only=True)
        progress(step + 1, int(data.lengths[rows].sum()), value_loss=loss)


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
) -> tuple[float, float | None]:
    """One optimiser step on a mini-batch: (its value loss before it, explained variance of all its tokens)."""
    lengths, total = data.lengths, 0.0
    counted = np.minimum(lengths[rows], 1) if last_token_only else lengths[rows]
    weight = token_weights(torch.from_numpy(counted), "token")[0]
    predicted = [np.empty(0, np.float32)] * len(data)
    for batch in micro_batches(data.prompts, data.responses, rows, budget):
        targets = torch.from_numpy(np.repeat(data.rewards[batch.rows], lengths[batch.rows]))
        weights = weight.expand(len(batch))
        if last_token_only:
            last = torch.from_numpy(np.cumsum(lengths[batch.rows]) - 1)
            weights = torch.zeros(len(batch)).index_fill_(0, last, float(weight))
        values = response_values(model, batch)
        loss = value_loss(values, targets, weights)
        if not torch.isfinite(loss):
            raise UserError(
                f"the value loss is {loss.item()} at optimiser step {optimizer.steps + 1} of value-pretraining, from "
                f"{named(data, batch.rows)}: lower value_pretraining.lr or look at these rows"
            )
        loss.backward()
        scatter(values.detach(), batch, lengths, predicted)
        total += loss.item()
    optimizer.step(batch=named(data, rows))
    returns = np.repeat(data.rewards[rows], lengths[rows])
    return total, explained_variance(np.concatenate([predicted[row] for row in rows]), returns)


def _measure(model: nn.Module, data: Rollouts, rows: np.ndarray, budget: int) -> tuple[float, float | None]:
    """(0.5 MSE, explained variance) over all tokens of the rows."""
    predicted = values_of(model, data, rows, budget)
    values = np.concatenate([predicted[r] for r in rows])
    targets = np.repeat(data.rewards[rows], data.lengths[rows])
    return 0.5 * float(np.mean((values - targets) ** 2)), explained_variance(values, targets)
