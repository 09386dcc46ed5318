"""The PPO-update stage: several optimiser steps of policy and critic on one iteration's experience."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vapo import recipe
from vapo.progress import Progress
from vapo.schemas import EXPERIENCE, ROLLOUTS
from vapo.seeds import derive
from vapo.tables import check_joined, flat, read_table, rows
from vapo.train.batches import scatter
from vapo.train.checkpoints import Learner, save
from vapo.train.checks import check_critic, check_fits, memory_advice
from vapo.train.engine import Engine, Reader, reader_of
from vapo.train.experience import Rollouts, named, read_rollouts
from vapo.train.mini_batch import SUMS, Experience, accumulate_policy, accumulate_value, mini_batches
from vapo.train.models import Checkpoint, Forward, load_policy
from vapo.train.ranks import add_up, together


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
    """Write the next policy and critic with their training states; returns the losses and diagnostics.

    The actor takes all its steps before the critic is loaded: neither reads the other, so the result is that of
    taking turns, and only one of them is in memory. Nothing is stored before both are done.

    Args:
        reference: the policy that the KL term keeps near; read only if kl_coef > 0.
        critic: None where advantages need none (then there is no `new_critic`).

    Raises:
        UserError: the critic belongs to another policy or tokenizer, a text is too long for the models, a loss or
            gradient is not finite, or memory is out.
    """
    data = read_rollouts(rollouts, rewards)
    table = read_table(experience, EXPERIENCE)
    check_joined(experience, table, read_table(rollouts, ROLLOUTS))
    trained = flat(table, "trained")
    generator = np.random.default_rng(derive(seed, "ppo_update", iteration))
    orders = [np.flatnonzero(trained)[generator.permutation(int(trained.sum()))] for _ in range(section.epochs)]
    epochs = [mini_batches(order, section.mini_batch) for order in orders]
    settings = _settings(section)
    with ExitStack() as stack:
        stack.enter_context(memory_advice("ppo_update", section))
        folders = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2)]
        actor_source, critic_source = stack.enter_context(Checkpoint(policy, "policy")), None
        if critic is not None:
            critic_source = stack.enter_context(Checkpoint(critic, "critic"))
            check_critic(actor_source, critic_source)
            check_fits(data, critic_source)
        check_fits(data, actor_source)
        at_reference = _reference_logprobs(section, reference, data, epochs[0])
        actor = Learner("policy", actor_source, section.train, seed=seed, lr=section.actor_lr, **settings)
        old = logprobs_of(actor.engine, data, epochs[0], section.token_budget)
        batch = Experience(
            data,
            trained,
            rows(table, "advantages"),
            rows(table, "value_targets"),
            rows(table, "values"),
            old,
            at_reference,
        )
        total, norms = _steps(accumulate_policy, section, actor.engine, batch, epochs)
        actor_steps, critic_steps, critic_norms = actor.engine.steps, 0, 0.0
        _finish(actor, folders[0], seed, iteration)
        if critic_source is not None:
            value_model = Learner("critic", critic_source, section.train, seed=seed, lr=section.critic_lr, **settings)
            of_values, critic_norms = _steps(accumulate_value, section, value_model.engine, batch, epochs)
            total["value_loss"] = of_values["value_loss"]
            critic_steps = value_model.engine.steps
            _finish(value_model, folders[1], seed, iteration)
        facts: dict[str, Any] = {"steps": actor_steps, "parent": actor_source.manifest.digest}
        saved = save(folders[0], new_policy, kind="policy", store=store, facts=facts)
        if critic_source is not None:
            assert new_critic is not None
            facts = {"steps": critic_steps, "policy": saved.digest}
            save(folders[1], new_critic, kind="critic", store=store, facts=facts)
    steps = sum(map(len, epochs))
    metrics = {
        **_means(section, total, steps, has_critic=critic is not None),
        "actor_grad_norm": norms / steps,
        "critic_grad_norm": critic_norms / steps if critic is not None else None,
        "padding_share": 1.0 - total["real_positions"] / total["positions"],
        "steps": actor_steps,
    }
    gap = np.abs(np.concatenate([old[r] - data.logprobs[r] for r in np.flatnonzero(trained)]))
    return {**metrics, "logprob_gap_mean": float(gap.mean()), "logprob_gap_max": float(gap.max())}


def _settings(section: recipe.PpoUpdate) -> dict[str, Any]:
    """Of both optimisers."""
    return {
        "weight_decay": section.weight_decay,
        "warmup_steps": section.warmup_steps,
        "max_grad_norm": section.max_grad_norm,
    }


def _finish(learner: Learner, folder: Path, seed: int, iteration: int) -> None:
    """Write a model that is done with its training state, and free its memory for the next one."""
    learner.write(folder)
    learner.write_state(folder, seed=seed, iteration=iteration)
    learner.close()


@torch.no_grad()
def logprobs_of(policy: Reader, data: Rollouts, parts: Sequence[np.ndarray], token_budget: int) -> list[np.ndarray]:
    """A model's logprobs of the responses: B x [T_i], empty for rows that are in none of the `parts`.

    Given the mini-batches of the first epoch, each is cut as the update cuts it, and each rank takes what it takes in
    the update: then the forward passes are the same, and the first step's ratio is 1 to the last bit.
    """
    out = [np.empty(0, np.float32)] * len(data)
    for part in parts:
        for turn in policy.turns(data.prompts, data.responses, part, token_budget):
            logprobs = policy(turn)[0]
            if turn.counts:
                scatter(logprobs, turn.batch, data.lengths, out)
    return together(out, data.lengths)


def _reference_logprobs(
    section: recipe.PpoUpdate, reference: Path, data: Rollouts, parts: Sequence[np.ndarray]
) -> list[np.ndarray] | None:
    if section.kl_coef == 0:
        return None
    with Checkpoint(reference, "policy", state=False) as source:
        model = reader_of(Forward(load_policy(source.folder), "policy"), section.train)
        found = logprobs_of(model, data, parts, section.token_budget)
        model.close()
        return found


def _steps(
    accumulate: Callable[..., None],
    section: recipe.PpoUpdate,
    engine: Engine,
    experience: Experience,
    epochs: Sequence[Sequence[np.ndarray]],
) -> tuple[dict[str, float], float]:
    """One optimiser step for each mini-batch: (sums over all of them and all ranks, and of the gradients' norms)."""
    data, total, norm = experience.data, dict.fromkeys(SUMS, 0.0), 0.0
    chosen_rows = [chosen for epoch in epochs for chosen in epoch]
    progress = Progress("optimiser steps", len(chosen_rows))
    for step, chosen in enumerate(chosen_rows, start=1):
        accumulate(section, engine, experience, chosen, step, total)
        norm += engine.step(batch=named(data, chosen))
        entropy = total["entropy"] / total["tokens"] if total["tokens"] else None
        progress(step, int(data.lengths[chosen].sum()), entropy=entropy)
    return add_up(total), norm


def _means(section: recipe.PpoUpdate, total: dict[str, float], steps: int, *, has_critic: bool) -> dict[str, float]:
    """Means over steps or tokens."""
    wanted = {
        "value_loss": has_critic,
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
    }
