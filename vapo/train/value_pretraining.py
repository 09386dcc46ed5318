"""The value-pretraining stage: before the first update the critic learns the fixed policy's returns."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vapo import recipe
from vapo.errors import UserError
from vapo.progress import Progress
from vapo.rl.diagnostics import explained_variance
from vapo.rl.losses import token_weights, value_loss
from vapo.schemas import PRETRAINING
from vapo.seeds import derive
from vapo.tables import write_table
from vapo.train.batches import scatter
from vapo.train.checkpoints import Learner, save
from vapo.train.checks import check_fits, memory_advice
from vapo.train.engine import Engine
from vapo.train.experience import Rollouts, named, read_rollouts, values_of
from vapo.train.models import Checkpoint
from vapo.train.parts import Parts, set_state, state_of
from vapo.train.ranks import add_up, rank, together

RETURNS, REWARD_MODEL = "returns", "reward model"  # what the critic is trained on; the second comes first
Measure = tuple[int, str, float, float | None]  # a row of PRETRAINING: step, rows, value loss, explained variance


def value_pretraining(
    section: recipe.ValuePretraining,
    *,
    rollouts: Path,
    rewards: Path,
    policy: Path,
    critic: Path,
    pretraining: Path,
    partial: Path | None = None,
    seed: int,
    store: str,
) -> dict[str, float | None]:
    """Write the critic that does best on held-out prompts, and PRETRAINING; returns its loss and explained variance.

    VAPO section 4.1.1, VC-PPO section 3.1: responses of a fixed policy, Monte-Carlo returns (lambda = 1) as targets.
    The policy is only read; the critic's manifest holds its digest. The optimiser state is not kept: PPO starts the
    critic's afresh. With max_steps = 0 the critic is what `init` makes it.

    Args:
        partial: a folder for parts of the work, and where some may be already: then it goes on from the last one.

    Raises:
        UserError: the critic never beats a constant on the held-out prompts, or a loss or gradient is not finite.
    """
    torch.manual_seed(derive(seed, "value_pretraining", "weights"))
    generator = np.random.default_rng(derive(seed, "value_pretraining", "batches"))
    data = read_rollouts(rollouts, rewards)
    train, heldout = split_by_prompt(data, section.heldout_share, generator)
    with ExitStack() as stack:
        stack.enter_context(memory_advice("value_pretraining", section))
        source = stack.enter_context(Checkpoint(policy, "policy", state=False))
        check_fits(data, source)
        parts = Parts(partial, section.train.part_seconds)
        part = parts.found.folder if parts.found else None
        learner = Learner("critic", source, section.train, seed=seed, new=True, part=part, **_settings(section))
        if parts.found:
            set_state(generator, parts.found.facts["generator"])
        if section.init == "reward_model":
            _reward_model(section, learner, data, train, generator, parts)
        measures, kept, weights = _pretrain(section, learner, data, train, heldout, generator, parts)
        constant = _loss_of_a_constant(data, train, heldout)
        step, _, loss, variance = kept
        if section.max_steps and section.must_beat_mean and not loss < constant:
            raise UserError(_no_better(section, data, loss, constant, measures[-1][0]))
        columns = zip(*measures, strict=True)
        if rank() == 0:
            write_table(pretraining, PRETRAINING, dict(zip(PRETRAINING.names, map(_defined, columns), strict=True)))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        learner.write(folder, weights)
        facts = {"policy": source.manifest.digest, "steps": 0}
        save(folder, critic, kind="critic", store=store, facts=facts)
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
    learner: Learner,
    data: Rollouts,
    train: np.ndarray,
    heldout: np.ndarray,
    generator: np.random.Generator,
    parts: Parts,
) -> tuple[list[Measure], Measure, dict[str, Tensor] | None]:
    """Train on Monte-Carlo returns until the held-out loss is flat, from the last part on.

    Returns:
        Everything that was measured, the measure of what is kept, and its weights; None: the present ones.
    """
    engine = learner.engine
    measures: list[Measure] = []
    best: Measure = (0, "held-out", math.inf, None)
    weights: dict[str, Tensor] | None = None
    begin = 0
    if parts.found and parts.found.facts["phase"] == RETURNS:
        begin, best = parts.found.facts["step"], _measured(parts.found.facts["best"])
        measures = [_measured(row) for row in parts.found.facts["measures"]]
        weights = parts.found.tensors("best") if rank() == 0 else {}
    heldout_losses = [loss for _, rows, loss, _ in measures if rows == "held-out"]
    progress = Progress("optimiser steps", section.max_steps)
    for step in range(begin, section.max_steps + 1):
        last = step == section.max_steps
        if step % section.measure_every == 0 or last:
            found = (step, "held-out", *_measure(engine, data, heldout, section.token_budget))
            measures.append(found)
            heldout_losses.append(found[2])
            if found[2] < best[2]:
                best, weights = found, {name: tensor.detach().clone() for name, tensor in learner.weights().items()}
            flat = plateaued(heldout_losses, section.patience, section.tolerance)
            if last or (step >= section.min_steps and flat):
                break
        rows = generator.permutation(train)[: section.mini_batch]
        loss, variance = _step(engine, data, rows, section.token_budget, last_token_only=False)
        measures.append((step, "mini-batch", loss, variance))
        tokens = int(data.lengths[rows].sum())
        progress(step + 1, tokens, value_loss=loss, explained_variance=variance, heldout_loss=best[2])
        facts = {"phase": RETURNS, "step": step + 1, "generator": state_of(generator)}
        parts.add(learner.write_part, {**facts, "measures": measures, "best": best}, {"best": weights or {}})
    return measures, best, weights


def _measured(row: Sequence[Any]) -> Measure:
    step, rows, loss, variance = row
    return step, rows, loss, variance


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
    learner: Learner,
    data: Rollouts,
    train: np.ndarray,
    generator: np.random.Generator,
    parts: Parts,
) -> None:
    """Train on the last token alone, as a reward model is: where the papers' critics start, biased on early tokens."""
    begin = 0
    if parts.found:
        if parts.found.facts["phase"] != REWARD_MODEL:
            return
        begin = parts.found.facts["step"]
    progress = Progress("reward-model steps", section.reward_model_steps)
    for step in range(begin, section.reward_model_steps):
        rows = generator.permutation(train)[: section.mini_batch]
        loss, _ = _step(learner.engine, data, rows, section.token_budget, last_token_only=True)
        progress(step + 1, int(data.lengths[rows].sum()), value_loss=loss)
        facts = {"phase": REWARD_MODEL, "step": step + 1, "generator": state_of(generator)}
        parts.add(learner.write_part, facts)
    learner.engine.forget()


def _settings(section: recipe.ValuePretraining) -> dict[str, float | int]:
    return {
        "lr": section.lr,
        "weight_decay": section.weight_decay,
        "warmup_steps": section.warmup_steps,
        "max_grad_norm": section.max_grad_norm,
    }


def _step(
    engine: Engine, data: Rollouts, rows: np.ndarray, budget: int, *, last_token_only: bool
) -> tuple[float, float | None]:
    """One optimiser step on a mini-batch: (its value loss before it, explained variance of all its tokens)."""
    lengths, total = data.lengths, {"loss": 0.0}
    counted = np.minimum(lengths[rows], 1) if last_token_only else lengths[rows]
    weight = token_weights(torch.from_numpy(counted), "token")[0]
    predicted = [np.empty(0, np.float32)] * len(data)
    for turn in engine.turns(data.prompts, data.responses, rows, budget):
        values, batch = engine(turn), turn.batch
        if not turn.counts:
            engine.backward(0.0 * values.sum(), turn)
            continue
        targets = torch.from_numpy(np.repeat(data.rewards[batch.rows], lengths[batch.rows]))
        weights = weight.expand(len(batch))
        if last_token_only:
            last = torch.from_numpy(np.cumsum(lengths[batch.rows]) - 1)
            weights = torch.zeros(len(batch)).index_fill_(0, last, float(weight))
        loss = value_loss(values, targets, weights)
        if not torch.isfinite(loss):
            raise UserError(
                f"the value loss is {loss.item()} at optimiser step {engine.steps + 1} of value-pretraining, from "
                f"{named(data, batch.rows)}: lower value_pretraining.lr or look at these rows"
            )
        engine.backward(loss, turn)
        scatter(values.detach(), batch, lengths, predicted)
        total["loss"] += loss.item()
    engine.step(batch=named(data, rows))
    returns, predicted = np.repeat(data.rewards[rows], lengths[rows]), together(predicted, lengths)
    return add_up(total)["loss"], explained_variance(np.concatenate([predicted[row] for row in rows]), returns)


def _measure(model: Engine, data: Rollouts, rows: np.ndarray, budget: int) -> tuple[float, float | None]:
    """(0.5 MSE, explained variance) over all tokens of the rows."""
    predicted = values_of(model, data, rows, budget)
    values = np.concatenate([predicted[r] for r in rows])
    targets = np.repeat(data.rewards[rows], data.lengths[rows])
    return 0.5 * float(np.mean((values - targets) ** 2)), explained_variance(values, targets)
