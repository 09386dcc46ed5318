"""The update: gradients that no split changes, a first ratio of exactly 1, and steps in the right direction."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from vapo.errors import UserError
from vapo.recipe import Advantages, PpoUpdate
from vapo.schemas import EXPERIENCE
from vapo.store import model_only, open_checkpoint, save_checkpoint
from vapo.tables import flat, ragged, read_table, rows, write_table
from vapo.train.advantages import advantages
from vapo.train.batches import micro_batches, plan
from vapo.train.engine import Engine, Reader
from vapo.train.experience import Rollouts, values_of
from vapo.train.mini_batch import SUMS, Experience, accumulate_policy, accumulate_value
from vapo.train.models import (
    Checkpoint,
    critic_from_policy,
    load_policy,
    response_logprobs,
    response_values,
)
from vapo.train.ppo_update import logprobs_of, ppo_update
from vapo.train.ranks import add_up, add_up_gradients

from .conftest import LENGTHS, World

ALL = np.arange(len(LENGTHS))
# One micro-batch, three, and one for each of eight responses.
CHOSEN = np.array([8, 0, 4, 11, 1, 6, 2, 9])
BUDGETS = {1: 10**6, 3: 400, 8: 1}


def section(**changed: Any) -> PpoUpdate:
    return PpoUpdate(**{"mini_batch": 6, "actor_lr": 1e-2, "critic_lr": 1e-2, "warmup_steps": 0, **changed})


def run(world: World, iteration: int = 1, **changed: Any) -> dict[str, float | None]:
    """Update `policy` and `critic` into `new_policy` and `new_critic`."""
    parameters = {
        "seed": 0,
        "policy": world.policy,
        "reference": world.policy,
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


def old_logprobs(policy: Reader, data: Rollouts, budget: int = 10**6) -> list[np.ndarray]:
    return logprobs_of(policy, data, [np.arange(len(data))], budget)


def experience(world: World, noise: float = 0.3) -> Experience:
    """What an update learns from, with old logprobs some way off, so that some tokens are clipped."""
    table, data = read_table(world.experience, EXPERIENCE), world.data
    generator = np.random.default_rng(0)
    old = old_logprobs(world.reader("policy"), data)
    old = [o + generator.normal(0, noise, len(o)).astype(np.float32) for o in old]
    return Experience(
        data,
        flat(table, "trained"),
        rows(table, "advantages"),
        rows(table, "value_targets"),
        rows(table, "values"),
        old,
        reference_logprobs=None,
    )


def gradients(world: World, batch: Experience, budget: int, **changed: Any) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Accumulated gradients of actor and critic for one mini-batch, and its sums."""
    actor, critic, total = world.engine("policy"), world.engine("critic"), dict.fromkeys(SUMS, 0.0)
    accumulate_policy(section(token_budget=budget, **changed), actor, batch, CHOSEN, 1, total)
    accumulate_value(section(token_budget=budget, **changed), critic, batch, CHOSEN, 1, total)
    assert total["tokens"] == batch.data.lengths[CHOSEN].sum()
    return gradient_of(actor), gradient_of(critic), total


def gradient_of(engine: Engine) -> Tensor:
    """All parameters' gradients, one after the other."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in engine.module.parameters()]
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("parts", [3, 8])
@pytest.mark.parametrize("term", ["token", "sample", "positive", "everything"])
def test_point_14_a_mini_batchs_gradient_does_not_depend_on_its_split(world: World, parts: int, term: str) -> None:
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
    splits = [len(plan(data.prompts, data.responses, CHOSEN, BUDGETS[n])) for n in (1, parts)]
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
def test_point_17_old_logprobs_are_the_trainers_own(world: World, budget: int) -> None:
    found, data = old_logprobs(world.reader("policy"), world.data, budget), world.data
    policy = world.model("policy")
    for row in ALL:
        (micro,) = micro_batches(data.prompts, data.responses, np.array([row]), 1)
        with torch.no_grad():
            np.testing.assert_allclose(found[row], response_logprobs(policy, micro)[0], atol=1e-5)


def test_point_09_the_first_ratio_is_exactly_1(world: World) -> None:
    """One mini-batch: nothing is clipped, nothing diverges, and the loss is minus the mean advantage, even though
    the rollout engine's logprobs are far off."""
    metrics = run(world, mini_batch=12)
    assert metrics["clip_fraction_low"] == metrics["clip_fraction_high"] == 0
    assert metrics["approx_kl"] == 0.0
    mean = ragged(read_table(world.experience, EXPERIENCE), "advantages")[0].mean()
    assert metrics["policy_loss"] == pytest.approx(-mean, abs=1e-6)
    assert metrics["logprob_gap_max"] > 0.1


def test_point_17_the_engines_gap_is_measured(world: World) -> None:
    old = old_logprobs(world.reader("policy"), world.data)
    world.write_rollouts(logprobs=[o - 0.25 for o in old])
    old[0][0] += 1.0
    metrics = run(world)
    assert metrics["logprob_gap_mean"] == pytest.approx(0.25, abs=1e-4)
    assert metrics["logprob_gap_max"] == pytest.approx(0.25, abs=1e-4)


def logprobs(world: World, name: str) -> list[float]:
    """Mean logprob of each response."""
    return [float(row.mean()) for row in old_logprobs(world.reader(name), world.data)]


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
        return float(np.mean((np.concatenate(values_of(world.reader(name), world.data, ALL, 10**6)) - targets) ** 2))

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


def test_point_15_no_positive_example_is_no_term_and_no_nan(world: World) -> None:
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
    with pytest.raises(UserError, match=r"the policy loss is (nan|-inf) at optimiser step [12], from rollouts 1/p2/2:"):
        run(world, token_budget=1)
    assert not world.new_policy_path.exists()
    assert not world.new_critic_path.exists()


def test_value_clip_holds_back_values_that_went_far_enough(world: World) -> None:
    """Every value has gone 0.5 towards its target since the rollout, 0.2 are allowed: no gradient is left."""
    batch = experience(world)
    old = [v - 0.5 * np.sign(t - v) for v, t in zip(batch.values, batch.value_targets, strict=True)]
    moved = replace(batch, values=old)
    assert gradients(world, moved, 10**6, value_clip=0)[1].abs().max() > 1e-3
    assert not gradients(world, moved, 10**6, value_clip=0.2)[1].any()
    free = gradients(world, moved, 10**6, value_clip=0)
    torch.testing.assert_close(gradients(world, moved, 10**6, value_clip=0.6)[1], free[1], rtol=0, atol=1e-7)


def digests(world: World) -> tuple[str, str]:
    """Of the new policy and the new critic."""
    return world.manifest("new_policy_path").digest, world.manifest("new_critic_path").digest


def test_point_05_the_stop_token_is_trained_and_nothing_after_it(world: World) -> None:
    """An advantage on the last token alone, which is the stop token, makes it likelier; padding plays no part."""
    values, offsets = ragged(read_table(world.experience, EXPERIENCE), "advantages")
    last = np.zeros_like(values)
    last[offsets[1:] - 1] = 1.0
    table = read_table(world.experience, EXPERIENCE)
    columns: dict[str, Any] = {name: table[name] for name in table.column_names} | {"advantages": (last, offsets)}
    write_table(world.experience, EXPERIENCE, columns)
    run(world, mini_batch=12, positive_lm_coef=0.0)
    before, after = (old_logprobs(world.reader(name), world.data) for name in ("policy", "new_policy_path"))
    assert all(new[-1] > old[-1] for old, new in zip(before, after, strict=True))
    policy, data = world.model("policy"), world.data
    (micro,) = micro_batches(data.prompts, data.responses, ALL, 10**6)
    assert len(micro) == sum(LENGTHS)
    padded = torch.ones_like(micro.tokens, dtype=torch.bool)
    for i, row in enumerate(micro.rows):
        padded[i, : len(data.prompts[row]) + len(data.responses[row])] = False
    assert padded.any()
    other = replace(micro, tokens=torch.where(padded, 7, micro.tokens))
    assert torch.equal(response_logprobs(policy, other)[0], response_logprobs(policy, micro)[0])


def test_point_08_the_policy_learns_from_values_frozen_at_the_rollout(world: World) -> None:
    """Another critic goes into the update than made EXPERIENCE: nothing of it reaches the policy, over two epochs."""
    run(world, epochs=2)
    policy, critic = digests(world)
    world.new_critic("critic2", "policy", seed=9)
    run(world, epochs=2, critic=world.root / "critic2")
    assert digests(world)[0] == policy
    assert digests(world)[1] != critic


def test_point_09_dropout_is_off_and_the_head_is_float32(world: World, tmp_path: Path) -> None:
    """A checkpoint that asks for dropout in bfloat16: the forward pass is the same each time, the head's in float32."""
    with Checkpoint(world.policy, "policy") as source:
        model: Any = AutoModelForCausalLM.from_pretrained(source.folder, attention_dropout=0.5).to(torch.bfloat16)
        folder = tmp_path / "dropout"
        model.save_pretrained(folder)
    policy, critic = load_policy(folder), critic_from_policy(folder)
    assert policy.config.attention_dropout == 0.5  # type: ignore[union-attr]
    assert {p.dtype for p in critic.parameters()} == {torch.float32}
    (micro,) = micro_batches(world.data.prompts, world.data.responses, ALL, 10**6)
    assert torch.equal(response_logprobs(policy, micro)[0], response_logprobs(policy, micro)[0])
    with torch.no_grad():
        critic.score.weight.fill_(0.1)  # type: ignore[union-attr,operator]
    assert torch.equal(response_values(critic, micro), response_values(critic, micro))


def test_what_is_not_trained_on_is_not_there(world: World) -> None:
    """Rows left out by dynamic sampling count in no weight and no step, and may hold NaN."""
    table = read_table(world.experience, EXPERIENCE)
    trained = ALL % 3 != 0
    columns: dict[str, Any] = {name: table[name] for name in table.column_names} | {"trained": trained}
    found = []
    for rubbish in (0.0, float("nan")):
        values, offsets = ragged(table, "advantages")
        of_trained = np.repeat(trained, LENGTHS)
        columns["advantages"] = (np.where(of_trained, values, np.float32(rubbish)), offsets)
        write_table(world.experience, EXPERIENCE, columns)
        metrics = run(world, mini_batch=4)
        assert metrics["steps"] == 2
        found.append((metrics, digests(world)))
    assert found[0] == found[1]


def test_without_a_critic_the_policys_update_is_the_same(world: World) -> None:
    metrics = run(world)
    policy, _ = digests(world)
    world.new_critic_path.unlink()
    alone = run(world, critic=None, new_critic=None)
    assert world.manifest("new_policy_path").digest == policy
    assert not world.new_critic_path.exists()
    assert "value_loss" not in alone
    assert alone["critic_grad_norm"] is None
    assert {name: metrics[name] for name in alone if alone[name] is not None} == {
        name: value for name, value in alone.items() if value is not None
    }


def test_switches_that_are_off_or_neutral_change_no_bit(world: World) -> None:
    """A dual clip that nothing reaches, importance weights of exactly 1, a KL term to itself at the first step."""
    world.write_rollouts(logprobs=old_logprobs(world.reader("policy"), world.data))
    estimate(world)
    run(world, mini_batch=12)
    plain = digests(world)
    for switch in ({"dual_clip": 1e6}, {"importance_cap": 1.0}, {"kl_coef": 0.5}):
        run(world, mini_batch=12, **switch)
        assert digests(world) == plain, switch


def test_the_kl_term_keeps_the_policy_near_the_reference(world: World) -> None:
    """No advantages: all that moves the policy is the term, and its metric falls; without it nothing moves."""
    world.new_policy("reference", seed=3)
    write_experience(world, np.zeros(12))
    settings: dict[str, Any] = {"mini_batch": 12, "positive_lm_coef": 0.0, "weight_decay": 0.0, "actor_lr": 1e-3}
    found = []
    for estimator in ("k2", "k3"):
        losses = [
            run(world, reference=world.reference, kl_coef=1.0, kl_estimator=estimator, epochs=n, **settings)["kl_loss"]
            for n in (1, 8)
        ]
        assert losses[0] is not None
        assert losses[1] is not None  # the mean over 8 steps
        assert 0 < losses[1] < losses[0]
        found.append(losses[0])
    assert found[0] != found[1]
    assert "kl_loss" not in run(world, reference=world.reference, **settings)


def test_the_entropy_bonus_raises_entropy(world: World) -> None:
    write_experience(world, np.zeros(12))
    settings: dict[str, Any] = {"mini_batch": 12, "epochs": 6, "positive_lm_coef": 0.0, "actor_lr": 3e-3}
    without, raised = (run(world, entropy_coef=c, **settings)["entropy"] for c in (0.0, 1.0))
    assert without is not None
    assert raised is not None
    assert raised > without


def test_point_17_importance_weights_are_truncated_and_measured(world: World) -> None:
    """The engine found every token less likely by a factor of e^0.5: weights of 1.65, held at 1.5."""
    old = old_logprobs(world.reader("policy"), world.data)
    world.write_rollouts(logprobs=[o - 0.5 for o in old])
    estimate(world)
    plain = run(world, mini_batch=12)
    open_, held = (run(world, mini_batch=12, importance_cap=cap) for cap in (2.0, 1.5))
    assert open_["importance_weight"] == pytest.approx(np.exp(0.5), rel=1e-5)
    assert open_["importance_truncated"] == 0.0
    assert (held["importance_weight"], held["importance_truncated"]) == (pytest.approx(1.5), 1.0)
    for found, factor in ((open_, np.exp(0.5)), (held, 1.5)):
        assert found["policy_loss"] == pytest.approx(factor * plain["policy_loss"], rel=1e-4)
    assert "importance_weight" not in plain


def test_a_gradient_that_is_not_finite_names_step_and_rollouts(world: World) -> None:
    """Every loss is finite, but the norm overflows: nothing is saved."""
    write_experience(world, np.where(ALL == 8, 1e30, 0.0))
    with pytest.raises(UserError, match=r"norm is inf at optimiser step 1, from rollouts 1/p\S+, .* and 7 more: lower"):
        run(world, mini_batch=12)
    assert not world.new_policy_path.exists()


@pytest.mark.parametrize(("budget", "micro"), [(400, 3), (1, 8), (10**6, 1)])
def test_point_14_two_ranks_have_the_gradient_of_one(world: World, budget: int, micro: int) -> None:
    """Two gloo processes share the micro-batches; where there is but one, the second rank has nothing to do."""
    data = world.data
    assert len(plan(data.prompts, data.responses, CHOSEN, budget)) == micro
    changed = {"positive_lm_coef": 0.1, "value_clip": 0.2}
    actor, critic, total = gradients(world, experience(world), 10**6, **changed)
    torch.multiprocessing.spawn(_rank, (world.root, budget, changed), nprocs=2)
    for rank in (0, 1):
        found = load_file(world.root / f"rank{rank}.safetensors")
        for name, expected in (("actor", actor), ("critic", critic)):
            assert expected.abs().max() > 1e-3
            torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6)
        for name in ("policy_loss", "positive_lm_loss", "value_loss", "entropy"):
            assert float(found[name]) == pytest.approx(total[name], abs=1e-4)
        assert float(found["tokens"]) == total["tokens"]


def _rank(rank: int, root: Path, budget: int, changed: dict[str, Any]) -> None:
    """One of two processes: its share of the mini-batch's gradient, added up with the other's."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/meeting", rank=rank, world_size=2)
    try:
        world = World(root)
        actor, critic, total = world.engine("policy"), world.engine("critic"), dict.fromkeys(SUMS, 0.0)
        changed_section, batch = section(token_budget=budget, **changed), experience(world)
        accumulate_policy(changed_section, actor, batch, CHOSEN, 1, total)
        accumulate_value(changed_section, critic, batch, CHOSEN, 1, total)
        for engine in (actor, critic):
            add_up_gradients(list(engine.module.parameters()))
        sums = {name: torch.tensor(value) for name, value in add_up(total).items()}
        parts = {"actor": gradient_of(actor), "critic": gradient_of(critic), **sums}
        save_file(parts, root / f"rank{rank}.safetensors")
    finally:
        torch.distributed.destroy_process_group()
