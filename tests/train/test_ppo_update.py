"""The update: gradients that no split changes, a first ratio of exactly 1, and steps in the right direction."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vapo.errors import UserError
from vapo.recipe import Advantages, PpoUpdate
from vapo.schemas import EXPERIENCE
from vapo.store import model_only, open_checkpoint, save_checkpoint
from vapo.tables import ragged, read_table, rows, write_table
from vapo.train.advantages import advantages
from vapo.train.batches import micro_batches
from vapo.train.experience import values_of
from vapo.train.models import response_logprobs, response_values
from vapo.train.ppo_update import Experience, _mini_batch, _old_logprobs, ppo_update

from .conftest import LENGTHS, World

ALL = np.arange(len(LENGTHS))
# One micro-batch, three, and one for each of eight responses.
CHOSEN = np.array([8, 0, 4, 11, 1, 6, 2, 9])
BUDGETS = {1: 10**6, 3: 42, 8: 1}


def section(**changed: Any) -> PpoUpdate:
    return PpoUpdate(**{"mini_batch": 6, "actor_lr": 1e-2, "critic_lr": 1e-2, "warmup_steps": 0, **changed})


def run(world: World, iteration: int = 1, **changed: Any) -> dict[str, float | None]:
    """Update `policy` and `critic` into `new_policy` and `new_critic`."""
    parameters = {
        "seed": 0,
        "policy": world.policy,
        "critic": world.critic,
        "new_policy": world.new_policy_path,
        "new_critic": world.new_critic_path,
    }
    parameters |= {name: changed.pop(name) for name in list(changed) if name in parameters}
    return ppo_update(
        section(**changed),
        rollouts=world.rollouts,
        rewards=world.rewards,
        experience=world.experience,
        iteration=iteration,
        store=world.objects,
        **parameters,  # type: ignore[arg-type]
    )


@pytest.fixture(autouse=True)
def _experience(world: World) -> None:
    """EXPERIENCE of the world's critic."""
    estimate(world)


def estimate(world: World) -> None:
    advantages(
        Advantages(alpha=0.3),
        rollouts=world.rollouts,
        rewards=world.rewards,
        critic=world.critic,
        experience=world.experience,
        iteration=1,
    )


def experience(world: World, noise: float = 0.3) -> Experience:
    """What an update learns from, with old logprobs some way off, so that some tokens are clipped."""
    table, data = read_table(world.experience, EXPERIENCE), world.data
    generator = np.random.default_rng(0)
    old = _old_logprobs(world.model("policy"), data, 10**6)
    old = [o + generator.normal(0, noise, len(o)).astype(np.float32) for o in old]
    return Experience(data, rows(table, "advantages"), rows(table, "value_targets"), rows(table, "values"), old)


def gradients(world: World, batch: Experience, budget: int, **changed: Any) -> tuple[Tensor, Tensor, Counter[str]]:
    """Accumulated gradients of actor and critic for one mini-batch, and its sums."""
    actor, critic, total = world.model("policy"), world.model("critic"), Counter[str]()
    tokens = _mini_batch(section(token_budget=budget, **changed), actor, critic, batch, CHOSEN, total)
    assert tokens == total["tokens"] == batch.data.lengths[CHOSEN].sum()

    def flat(model: torch.nn.Module) -> Tensor:
        return torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
        )

    return flat(actor), flat(critic), total


@pytest.mark.parametrize("parts", [3, 8])
@pytest.mark.parametrize("term", ["token", "sample", "positive", "everything"])
def test_a_mini_batchs_gradient_does_not_depend_on_its_split(world: World, parts: int, term: str) -> None:
    """Policy (both aggregations), positive-example and value term, alone and together."""
    batch = experience(world)
    changed: dict[str, Any] = {
        "token": {"positive_lm_coef": 0.0},
        "sample": {"positive_lm_coef": 0.0, "loss_aggregation": "sample"},
        "positive": {"positive_lm_coef": 1.0},
        "everything": {"positive_lm_coef": 0.1, "value_clip": 0.2},
    }[term]
    if term == "positive":
        batch = replace(batch, advantages=[np.zeros_like(a) for a in batch.advantages])
    data = batch.data
    splits = [len(list(micro_batches(data.prompts, data.responses, CHOSEN, BUDGETS[n]))) for n in (1, parts)]
    assert splits == [1, parts]
    whole = gradients(world, batch, BUDGETS[1], **changed)
    split = gradients(world, batch, BUDGETS[parts], **changed)
    for one, other in zip(whole[:2], split[:2], strict=True):
        assert one.abs().max() > 1e-3
        torch.testing.assert_close(other, one, rtol=0, atol=1e-6)
    for name in ("policy_loss", "positive_lm_loss", "value_loss", "entropy", "approx_kl"):
        assert split[2][name] == pytest.approx(whole[2][name], abs=1e-4)
    for name in ("clip_fraction_low", "clip_fraction_high", "tokens", "real_positions"):
        assert split[2][name] == whole[2][name]
    clipped = (whole[2]["clip_fraction_low"] > 0, whole[2]["clip_fraction_high"] > 0)
    assert clipped == (term != "positive", term != "positive")


def test_the_three_terms_add_up(world: World) -> None:
    """policy + mu * positive: linear in mu, and the critic's gradient is its own."""
    batch = experience(world)
    parts = {mu: gradients(world, batch, 10**6, positive_lm_coef=mu) for mu in (0.0, 0.1, 1.0)}
    torch.testing.assert_close(parts[0.1][0], 0.9 * parts[0.0][0] + 0.1 * parts[1.0][0], rtol=0, atol=1e-6)
    assert torch.equal(parts[0.0][1], parts[1.0][1])
    assert parts[0.0][2]["positive_lm_loss"] == parts[1.0][2]["positive_lm_loss"] > 0


@pytest.mark.parametrize("aggregation", ["token", "sample"])
def test_the_losses_are_those_of_plain_sums(world: World, aggregation: str) -> None:
    """Token by token in numpy, over the mini-batch's own counts; the critic's are tokens either way."""
    batch = experience(world)
    _, _, total = gradients(world, batch, 10**6, loss_aggregation=aggregation)
    actor, critic = world.model("policy"), world.model("critic")
    new, values = [np.empty(0)] * 12, [np.empty(0)] * 12
    with torch.no_grad():
        for row in ALL:
            (micro,) = micro_batches(batch.data.prompts, batch.data.responses, np.array([row]), 1)
            new[row], values[row] = response_logprobs(actor, micro)[0].numpy(), response_values(critic, micro).numpy()

    def joined(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([parts[row] for row in CHOSEN]).astype(np.float64)

    ratio, advantage = np.exp(joined(new) - joined(batch.old_logprobs)), joined(batch.advantages)
    terms = -np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.28) * advantage)
    means = [part.mean() for part in np.split(terms, np.cumsum(batch.data.lengths[CHOSEN])[:-1])]
    expected = {"token": terms.mean(), "sample": np.mean(means)}
    assert abs(expected["token"] - expected["sample"]) > 1e-3
    assert total["policy_loss"] == pytest.approx(expected[aggregation], abs=1e-5)
    positive = np.concatenate([new[row] for row in CHOSEN if batch.data.correct[row]])
    assert total["positive_lm_loss"] == pytest.approx(-positive.mean(), abs=1e-5)
    squares = (joined(values) - joined(batch.value_targets)) ** 2
    assert total["value_loss"] == pytest.approx(0.5 * squares.mean(), abs=1e-5)


@pytest.mark.parametrize("budget", [1, 50, 10**6])
def test_old_logprobs_are_the_trainers_own(world: World, budget: int) -> None:
    found, data = _old_logprobs(world.model("policy"), world.data, budget), world.data
    policy = world.model("policy")
    for row in ALL:
        (micro,) = micro_batches(data.prompts, data.responses, np.array([row]), 1)
        with torch.no_grad():
            np.testing.assert_allclose(found[row], response_logprobs(policy, micro)[0], atol=1e-5)


def test_the_first_ratio_is_exactly_1(world: World) -> None:
    """One mini-batch: nothing is clipped, nothing diverges, and the loss is minus the mean advantage, even though
    the rollout engine's logprobs are far off."""
    metrics = run(world, mini_batch=12)
    assert metrics["clip_fraction_low"] == metrics["clip_fraction_high"] == 0
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-10)
    mean = ragged(read_table(world.experience, EXPERIENCE), "advantages")[0].mean()
    assert metrics["policy_loss"] == pytest.approx(-mean, abs=1e-6)
    assert metrics["logprob_gap_max"] > 0.1


def test_the_engines_gap_is_measured(world: World) -> None:
    old = _old_logprobs(world.model("policy"), world.data, 10**6)
    world.write_rollouts(logprobs=[o - 0.25 for o in old])
    old[0][0] += 1.0
    metrics = run(world)
    assert metrics["logprob_gap_mean"] == pytest.approx(0.25, abs=1e-4)
    assert metrics["logprob_gap_max"] == pytest.approx(0.25, abs=1e-4)


def logprobs(world: World, name: str) -> list[float]:
    """Mean logprob of each response."""
    return [float(row.mean()) for row in _old_logprobs(world.model(name), world.data, 10**6)]


def write_experience(world: World, of: np.ndarray) -> None:
    """The same advantage on every token of a response."""
    table = read_table(world.experience, EXPERIENCE)
    columns = {name: table[name] for name in table.column_names}
    offsets = ragged(table, "values")[1]
    columns["advantages"] = (np.repeat(of, LENGTHS).astype(np.float32), offsets)  # type: ignore[assignment]
    write_table(world.experience, EXPERIENCE, columns)


def test_the_policy_moves_with_the_advantages_and_the_critic_to_the_targets(world: World) -> None:
    sign = np.where(ALL % 2 == 0, 1.0, -1.0)
    write_experience(world, sign)
    metrics = run(world, mini_batch=12, epochs=4, positive_lm_coef=0.0, actor_lr=3e-3)
    before, after = logprobs(world, "policy"), logprobs(world, "new_policy_path")
    for row in ALL[np.array(LENGTHS) > 3]:
        assert (after[row] - before[row]) * sign[row] > 0
    targets = np.repeat(world.data.rewards, LENGTHS)

    def loss(name: str) -> float:
        return float(np.mean((np.concatenate(values_of(world.model(name), world.data, ALL, 10**6)) - targets) ** 2))

    assert loss("new_critic_path") < loss("critic")
    assert metrics["steps"] == 4


def test_positive_examples_become_likelier_without_any_advantage(world: World) -> None:
    """The LM term alone, and with mu = 0 nothing moves but by weight decay."""
    write_experience(world, np.zeros(12))
    before = logprobs(world, "policy")
    run(world, mini_batch=12, positive_lm_coef=0.1, weight_decay=0.0)
    after = logprobs(world, "new_policy_path")
    correct = world.data.correct
    assert all(after[row] > before[row] for row in ALL[correct])
    run(world, mini_batch=12, positive_lm_coef=0.0, weight_decay=0.0)
    np.testing.assert_array_equal(logprobs(world, "new_policy_path"), before)


def test_no_positive_example_is_no_term_and_no_nan(world: World) -> None:
    world.write_rollouts(correct=[False] * 12)
    estimate(world)
    metrics = run(world)
    assert metrics["positive_lm_loss"] == 0.0
    assert all(np.isfinite(value) for value in metrics.values() if value is not None)


@pytest.mark.parametrize(("mini_batch", "epochs", "steps"), [(12, 1, 1), (6, 1, 2), (5, 1, 3), (5, 2, 6), (100, 1, 1)])
def test_how_many_steps(world: World, mini_batch: int, epochs: int, steps: int) -> None:
    assert run(world, mini_batch=mini_batch, epochs=epochs)["steps"] == steps
    assert world.manifest("new_policy_path").facts["steps"] == steps


def test_padding_is_measured(world: World) -> None:
    world.write_rollouts([6, 6, 6])
    estimate(world)
    assert run(world, mini_batch=3)["padding_share"] == 0.0
    world.write_rollouts([2, 6, 6])  # prompts of 2 tokens: 4 of 24 positions are padding
    estimate(world)
    assert run(world, mini_batch=3)["padding_share"] == pytest.approx(4 / 24)


def test_the_same_seed_gives_the_same_models_and_another_one_others(world: World) -> None:
    """Optimiser states included."""
    found = []
    for seed in (0, 0, 1):
        metrics = run(world, seed=seed)
        found.append((metrics, world.manifest("new_policy_path"), world.manifest("new_critic_path")))
    assert found[0] == found[1]
    assert found[0][1].digest != found[2][1].digest


def test_inputs_are_only_read(world: World) -> None:
    inputs = [world.policy, world.critic, world.rollouts, world.rewards, world.experience]
    before, stored = [path.read_bytes() for path in inputs], world.stored()
    run(world)
    assert [path.read_bytes() for path in inputs] == before
    assert {name: world.stored()[name] for name in stored} == stored


def test_the_next_update_continues_this_one(world: World) -> None:
    """Lineage and optimiser steps run on, and moments are taken up: without them the weights come out otherwise."""
    run(world)
    first = world.manifest("new_policy_path")
    assert first.facts == {"steps": 2, "parent": world.manifest("policy").digest}
    assert world.manifest("new_critic_path").facts == {"steps": 2, "policy": first.digest}
    onward = {"policy": world.new_policy_path, "critic": world.new_critic_path}
    places = {"new_policy": world.root / "policy2", "new_critic": world.root / "critic2"}
    assert run(world, iteration=2, **onward, **places)["steps"] == 4
    second = world.manifest("policy2")
    assert second.facts == {"steps": 4, "parent": first.digest}
    bare = world.root / "without-state"
    forget_optimizer(world, "new_policy_path", bare)
    places = {"new_policy": world.root / "policy3", "new_critic": world.root / "critic3"}
    assert run(world, iteration=2, **onward | {"policy": bare}, **places)["steps"] == 2
    assert world.manifest("policy3").digest != second.digest


def forget_optimizer(world: World, name: str, target: Path) -> None:
    """The same model without training state."""
    folder = open_checkpoint(world.manifest(name), target.with_suffix(".files"), model_only)
    save_checkpoint(folder, target, store=world.objects, kind="policy", facts={"steps": 0})


def test_a_critic_of_another_policy_is_refused(world: World) -> None:
    world.new_policy("policy2", seed=5)
    with pytest.raises(UserError, match=r"critic was trained for policy \w{12}, this policy is \w{12}: pretrain"):
        run(world, policy=world.policy2)
    assert not world.new_policy_path.exists()


def test_a_critic_with_another_tokenizer_is_refused(world: World) -> None:
    world.new_policy("policy2", seed=5, words=["some", "other", "words"])
    with pytest.raises(UserError, match="different tokenizers"):
        run(world, policy=world.policy2)


def test_a_critic_that_was_left_behind_is_refused(world: World) -> None:
    """The critic of the iteration before belongs to the policy of the iteration before."""
    run(world)
    with pytest.raises(UserError, match="take both from the same iteration"):
        run(world, policy=world.new_policy_path, new_policy=world.root / "policy2")


def test_experience_of_other_rollouts_is_refused(world: World) -> None:
    before = world.experience.read_bytes()
    world.write_rollouts(LENGTHS[:9])
    world.experience.write_bytes(before)
    with pytest.raises(UserError, match="experience: column rollout_id"):
        run(world)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_rollouts(world: World, value: float) -> None:
    of = np.zeros(12)
    of[8] = value
    write_experience(world, of)
    with pytest.raises(UserError, match=r"the policy loss is (nan|-inf) in a batch with rollouts .*1/p2/2"):
        run(world, token_budget=1)
    assert not world.new_policy_path.exists()
    assert not world.new_critic_path.exists()


def test_value_clip_holds_back_values_that_went_far_enough(world: World) -> None:
    """Every value has gone 0.5 towards its target since the rollout, 0.2 are allowed: no gradient is left."""
    batch = experience(world)
    old = [v - 0.5 * np.sign(t - v) for v, t in zip(batch.values, batch.value_targets, strict=True)]
    moved = replace(batch, values=old)
    assert gradients(world, moved, 10**6, value_clip=None)[1].abs().max() > 1e-3
    assert not gradients(world, moved, 10**6, value_clip=0.2)[1].any()
    free = gradients(world, moved, 10**6, value_clip=None)
    torch.testing.assert_close(gradients(world, moved, 10**6, value_clip=0.6)[1], free[1], rtol=0, atol=1e-7)
