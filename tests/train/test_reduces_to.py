"""One code path: VAPO with neutral switches is PPO, and DAPO is GRPO, to the bit; both are what a textbook writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vapo.recipe import Recipe, load_recipe
from vapo.schemas import EXPERIENCE
from vapo.tables import flat, read_table, rows
from vapo.train.advantages import advantages
from vapo.train.ppo_update import ppo_update
from vapo.train.value_pretraining import value_pretraining

from .conftest import LENGTHS, World

SIZES = ("ppo_update.mini_batch=12", "ppo_update.warmup_steps=0", "ppo_update.actor_lr=1e-3")
FAST = "ppo_update.actor_lr=1e-2"  # within three steps some ratio passes 1.28
VAPO_TO_PPO = (
    "value_pretraining.max_steps=0",
    "advantages.lambda_critic=0.95",
    "advantages.lambda_policy=0.95",
    "ppo_update.clip_high=0.2",
    "ppo_update.loss_aggregation=sample",
    "ppo_update.positive_lm_coef=0",
    "rollout.prompts=512",
    "rollout.samples=1",
)
DAPO_TO_GRPO = (
    "ppo_update.clip_high=0.2",
    "ppo_update.loss_aggregation=sample",
    "advantages.keep_groups=0",
    "verification.overlong_tokens=0",
    "rollout.prompts=64",
    "rollout.draws=1",
)
# The sections that the training stages read; rollout and verification are their inputs here.
SECTIONS = ("value_pretraining", "advantages", "ppo_update")


@pytest.fixture(autouse=True)
def _drifted(world: World) -> None:
    """Some groups with both verdicts, one without; a policy that has moved away from the rollouts' old logprobs."""
    world.write_rollouts(correct=[r in (0, 1, 5, 6, 7, 8) for r in range(12)])


def trained(world: World, recipe: Recipe) -> tuple[str, str, bytes]:
    """First critic, three epochs of updates: digests of policy and critic ("" without one), and EXPERIENCE."""
    critic = None
    if recipe.has_critic:
        critic = world.root / "first_critic"
        value_pretraining(
            recipe.value_pretraining.model_copy(
                update={
                    "must_beat_mean": False,
                    "reward_model_steps": 0,
                    "max_steps": min(2, recipe.value_pretraining.max_steps),
                }
            ),
            rollouts=world.rollouts,
            rewards=world.rewards,
            policy=world.policy,
            critic=critic,
            pretraining=world.root / "pretraining",
            seed=0,
            store=world.objects,
        )
    update(world, recipe, critic)
    digest = world.manifest("new_critic_path").digest if critic else ""
    return world.manifest("new_policy_path").digest, digest, world.experience.read_bytes()


def update(world: World, recipe: Recipe, critic: Path | None, epochs: int = 3) -> None:
    """The advantages stage and the update by a recipe's sections."""
    tables = {"rollouts": world.rollouts, "rewards": world.rewards, "experience": world.experience}
    advantages(recipe.advantages, **tables, critic=critic, iteration=1)
    ppo_update(
        recipe.ppo_update.model_copy(update={"epochs": epochs}),
        **tables,
        policy=world.policy,
        reference=world.policy,
        critic=critic,
        new_policy=world.new_policy_path,
        new_critic=world.new_critic_path if critic else None,
        iteration=1,
        seed=0,
        store=world.objects,
    )


def recipe(name: str, *overrides: str) -> Recipe:
    return load_recipe(name, [*SIZES, *overrides])


def sections(found: Recipe) -> dict[str, Any]:
    return {name: getattr(found, name) for name in SECTIONS}


def test_vapo_with_all_switches_neutral_is_ppo_to_the_bit(world: World) -> None:
    neutral, ppo = recipe("vapo", *VAPO_TO_PPO), recipe("ppo")
    assert sections(neutral) == sections(ppo)
    assert (neutral.rollout, neutral.verification) == (ppo.rollout, ppo.verification)
    assert trained(world, neutral) == trained(world, ppo)


def test_dapo_neutral_is_grpo_to_the_bit(world: World) -> None:
    neutral, grpo = recipe("dapo", *DAPO_TO_GRPO), recipe("grpo")
    assert sections(neutral) == sections(grpo)
    assert (neutral.rollout, neutral.verification.overlong_tokens) == (grpo.rollout, grpo.verification.overlong_tokens)
    assert trained(world, neutral) == trained(world, grpo)


@pytest.mark.parametrize("left", VAPO_TO_PPO[:6])
def test_every_switch_of_vapo_matters(world: World, left: str) -> None:
    """With one technique left on the result is not PPO's: the equality above is none of nothing."""
    others = [o for o in VAPO_TO_PPO if o != left]
    assert trained(world, recipe("vapo", *others, FAST)) != trained(world, recipe("ppo", FAST))


@pytest.mark.parametrize("left", DAPO_TO_GRPO[:3])
def test_every_switch_of_dapo_matters(world: World, left: str) -> None:
    others = [o for o in DAPO_TO_GRPO if o != left]
    assert trained(world, recipe("dapo", *others, FAST)) != trained(world, recipe("grpo", FAST))


def textbook(world: World, per_token: list[np.ndarray], recipe: Recipe, epochs: int) -> Tensor:
    """The policy after plain PPO steps on all responses at once: one at a time, clipped, mean of means, AdamW."""
    policy: Any = world.model("policy")
    data, section = world.data, recipe.ppo_update
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=section.actor_lr, betas=(0.9, 0.95), weight_decay=section.weight_decay
    )
    old: list[Tensor] = []
    for epoch in range(epochs):
        losses = []
        for row, (prompt, response) in enumerate(zip(data.prompts, data.responses, strict=True)):
            sequence = torch.from_numpy(np.concatenate([prompt, response])).long()
            logits = policy(sequence[None]).logits[0, len(prompt) - 1 : -1]
            logprobs = torch.distributions.Categorical(logits=logits).log_prob(sequence[len(prompt) :])
            if epoch == 0:
                old.append(logprobs.detach())
            ratio = (logprobs - old[row]).exp()
            advantage = torch.from_numpy(per_token[row])
            losses.append(-torch.min(ratio * advantage, ratio.clip(0.8, 1.2) * advantage).mean())
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), section.max_grad_norm)
        optimizer.step()
    return weights(policy)


def weights(model: Any) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def advantages_of(world: World) -> list[np.ndarray]:
    return rows(read_table(world.experience, EXPERIENCE), "advantages")


def test_ppo_is_the_textbooks(world: World) -> None:
    """GAE written as the double sum of its definition, one lambda for advantages and targets."""
    ppo = recipe("ppo")
    update(world, ppo, world.critic)
    table = read_table(world.experience, EXPERIENCE)
    expected = []
    for row, values in enumerate(rows(table, "values")):
        following = np.append(values[1:].astype(np.float64), 0.0)
        reward = np.where(np.arange(LENGTHS[row]) == LENGTHS[row] - 1, float(world.data.rewards[row]), 0.0)
        delta = reward + following - values
        gae = [sum(0.95**k * delta[t + k] for k in range(len(delta) - t)) for t in range(len(delta))]
        expected.append(np.array(gae, np.float32))
        np.testing.assert_allclose(advantages_of(world)[row], expected[-1], atol=1e-6)
        np.testing.assert_allclose(rows(table, "value_targets")[row], values + expected[-1], atol=1e-6)
    found = weights(world.model("new_policy_path"))
    assert (found - weights(world.model("policy"))).abs().max() > 1e-4
    torch.testing.assert_close(found, textbook(world, expected, ppo, 3), rtol=0, atol=2e-5)


def test_grpo_is_the_textbooks(world: World) -> None:
    grpo = recipe("grpo")
    update(world, grpo, None)
    groups = world.data.rewards.astype(np.float64).reshape(4, 3)
    std = groups.std(1, keepdims=True)
    normalised = ((groups - groups.mean(1, keepdims=True)) / np.where(std > 0, std, 1)).ravel()
    expected = [np.full(n, a, np.float32) for n, a in zip(LENGTHS, normalised, strict=True)]
    for found, wanted in zip(advantages_of(world), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert flat(read_table(world.experience, EXPERIENCE), "trained").all()
    torch.testing.assert_close(
        weights(world.model("new_policy_path")), textbook(world, expected, grpo, 3), rtol=0, atol=2e-5
    )
