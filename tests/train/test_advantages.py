"""The advantages stage: lambdas, advantages and targets of every row, each from its own lambda."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vapo.errors import UserError
from vapo.recipe import Advantages
from vapo.rl.advantages import gae
from vapo.schemas import EXPERIENCE, ROLLOUTS
from vapo.tables import flat, offsets_of, ragged, read_table, write_table
from vapo.train.advantages import advantages
from vapo.train.experience import values_of
from vapo.train.models import Checkpoint, load_critic, save_model

from .conftest import LENGTHS, World


def run(world: World, critic: str | None = "critic", **section: Any) -> dict[str, float | None]:
    return advantages(
        Advantages(**section),
        rollouts=world.rollouts,
        rewards=world.rewards,
        critic=world.root / critic if critic else None,
        experience=world.experience,
        iteration=1,
    )


def column(path: Path, name: str) -> np.ndarray:
    return ragged(read_table(path, EXPERIENCE), name)[0].copy()


def test_values_are_the_critics(world: World) -> None:
    run(world)
    expected = np.concatenate(values_of(world.reader("critic"), world.data, np.arange(12), 32768))
    np.testing.assert_allclose(column(world.experience, "values"), expected, atol=1e-6)
    assert ragged(read_table(world.experience, EXPERIENCE), "values")[1].tolist() == offsets_of(LENGTHS).tolist()


@pytest.mark.parametrize("budget", [1, 50])
def test_the_budget_changes_nothing(world: World, budget: int) -> None:
    run(world)
    before = [column(world.experience, name) for name in ("values", "advantages", "value_targets")]
    run(world, token_budget=budget)
    for name, expected in zip(("values", "advantages", "value_targets"), before, strict=True):
        np.testing.assert_allclose(column(world.experience, name), expected, atol=2e-6)


def test_point_01_lambda_is_each_responses_own(world: World) -> None:
    """From its own length, never a padded one: 1 - 1/(0.3 l), 0 where that is negative."""
    metrics = run(world, alpha=0.3)
    expected = np.maximum(0, 1 - 1 / (0.3 * np.array(LENGTHS)))
    np.testing.assert_allclose(flat(read_table(world.experience, EXPERIENCE), "lambda_policy"), expected, atol=1e-6)
    assert metrics["lambda_policy_mean"] == pytest.approx(expected.mean(), abs=1e-6)
    assert metrics["lambda_policy_min"] == 0.0


def test_a_critic_of_zeros_leaves_the_discounted_reward(world: World) -> None:
    """A_t = lambda^(T-1-t) * reward: the last token has all of it, whatever the length."""
    run(world, "zero_critic", alpha=0.3)
    expected = []
    for length, reward in zip(LENGTHS, world.data.rewards, strict=True):
        lambda_ = max(0.0, 1 - 1 / (0.3 * length))
        expected += [reward * lambda_ ** (length - 1 - t) for t in range(length)]
    np.testing.assert_allclose(column(world.experience, "advantages"), expected, atol=1e-6)


@pytest.mark.parametrize("lambda_policy", [0.0, 0.95, "length_adaptive"])
@pytest.mark.parametrize("lambda_critic", [1.0, 0.9])
def test_point_02_decoupled(world: World, lambda_policy: float | str, lambda_critic: float) -> None:
    """Targets come from lambda_critic alone, advantages from lambda_policy alone."""
    run(world, lambda_policy=lambda_policy, lambda_critic=lambda_critic)
    values, offsets = ragged(read_table(world.experience, EXPERIENCE), "values")
    expected = values + gae(values, offsets, world.data.rewards, np.float64(lambda_critic))
    np.testing.assert_allclose(column(world.experience, "value_targets"), expected, atol=1e-6)
    lambdas = flat(read_table(world.experience, EXPERIENCE), "lambda_policy")
    expected = gae(values, offsets, world.data.rewards, lambdas)
    np.testing.assert_allclose(column(world.experience, "advantages"), expected, atol=1e-5)
    if lambda_policy != "length_adaptive":
        assert (lambdas == np.float32(lambda_policy)).all()


def test_targets_are_the_returns_by_default(world: World) -> None:
    run(world)
    returns = np.repeat(world.data.rewards, LENGTHS)
    np.testing.assert_array_equal(column(world.experience, "value_targets"), returns)


def test_point_03_whitening_touches_the_policys_advantages_only(world: World) -> None:
    run(world)
    plain = {name: column(world.experience, name) for name in ("values", "advantages", "value_targets")}
    metrics = run(world, whiten=True)
    for name in ("values", "value_targets"):
        np.testing.assert_array_equal(column(world.experience, name), plain[name])
    white = (plain["advantages"] - plain["advantages"].mean()) / plain["advantages"].std()
    np.testing.assert_allclose(column(world.experience, "advantages"), white, atol=1e-5)
    assert metrics["advantage_mean"] == pytest.approx(0, abs=1e-6)
    assert metrics["advantage_std"] == pytest.approx(1, abs=1e-5)


def test_metrics(world: World) -> None:
    metrics = run(world)
    values, found = column(world.experience, "values"), column(world.experience, "advantages")
    returns = np.repeat(world.data.rewards, LENGTHS)
    assert metrics["explained_variance"] == pytest.approx(1 - np.var(returns - values) / np.var(returns), abs=1e-5)
    assert metrics["value_mean"] == pytest.approx(values.mean(), abs=1e-6)
    assert metrics["advantage_mean"] == pytest.approx(found.mean(), abs=1e-6)
    assert metrics["advantage_std"] == pytest.approx(found.std(), abs=1e-6)


def test_a_critic_of_zeros_explains_nothing(world: World) -> None:
    assert run(world, "zero_critic")["explained_variance"] == 0.0


def test_point_11_all_rewards_equal_is_undefined(world: World) -> None:
    world.write_rollouts(correct=[False] * 12)
    assert run(world)["explained_variance"] is None


def test_twice_is_the_same_bytes(world: World) -> None:
    run(world)
    before = world.experience.read_bytes()
    run(world)
    assert world.experience.read_bytes() == before


def test_point_06_a_truncated_response_is_terminal(world: World) -> None:
    """No bootstrap: V after the last token is 0 whether the response stopped or was cut, and nothing is punished."""
    run(world)
    stopped = world.experience.read_bytes()
    table = read_table(world.rollouts, ROLLOUTS)
    columns: dict[str, Any] = {name: table[name] for name in table.column_names}
    write_table(world.rollouts, ROLLOUTS, columns | {"finish_reason": ["length"] * 12})
    run(world)
    assert world.experience.read_bytes() == stopped
    values, offsets = ragged(read_table(world.experience, EXPERIENCE), "values")
    last = offsets[1:] - 1
    found = column(world.experience, "advantages")[last]
    np.testing.assert_allclose(found, world.data.rewards - values[last], atol=1e-6)


def in_groups(rewards: np.ndarray) -> np.ndarray:
    """The world's rewards [12] as its four groups of three."""
    return rewards.reshape(4, 3)


@pytest.mark.parametrize("estimator", ["group_normalised", "group_centred"])
def test_groups_stand_in_for_a_critic(world: World, estimator: str) -> None:
    """Every token of a response has its advantage; values are the group's mean, targets the returns."""
    world.write_rollouts(correct=[r in (0, 4, 5, 6, 7, 8) for r in range(12)])
    metrics = run(world, critic=None, estimator=estimator)
    groups = in_groups(world.data.rewards.astype(np.float64))
    centred = groups - groups.mean(1, keepdims=True)
    if estimator == "group_normalised":
        std = groups.std(1, keepdims=True)
        centred = np.divide(centred, std, out=np.zeros_like(centred), where=std > 0)
    np.testing.assert_allclose(column(world.experience, "advantages"), np.repeat(centred.ravel(), LENGTHS), atol=1e-6)
    means = np.repeat(groups.mean(1), 3)
    np.testing.assert_allclose(column(world.experience, "values"), np.repeat(means, LENGTHS), atol=1e-6)
    np.testing.assert_array_equal(column(world.experience, "value_targets"), np.repeat(world.data.rewards, LENGTHS))
    assert metrics["explained_variance"] is None
    assert metrics["informative_share"] == 0.5  # groups 0 and 1; 2 is all right, 3 all wrong


def trained(world: World) -> list[int]:
    """Rows that the update will learn from."""
    return np.flatnonzero(flat(read_table(world.experience, EXPERIENCE), "trained")).tolist()


def test_dynamic_sampling_keeps_the_first_groups_with_both_verdicts(world: World) -> None:
    """By what is correct, not by the shaped reward; in the order in which prompts were sampled."""
    correct = [r in (3, 4, 5, 6, 10) for r in range(12)]  # groups: none, all, one, one
    world.write_rollouts(correct=correct, rewards=[float(r) for r in range(12)])
    assert run(world)["trained_share"] == 1.0
    assert trained(world) == list(range(12))
    for keep, rows in ((1, [6, 7, 8]), (2, [6, 7, 8, 9, 10, 11]), (4, [6, 7, 8, 9, 10, 11])):
        metrics = run(world, keep_groups=keep)
        assert trained(world) == rows
        assert metrics["trained_share"] == len(rows) / 12
        assert metrics["informative_share"] == 0.5


def test_dynamic_sampling_with_nothing_to_learn_from(world: World) -> None:
    world.write_rollouts(correct=[r < 6 for r in range(12)])
    with pytest.raises(
        UserError, match=r"none of the 4 groups .*keep_groups 2 leaves nothing .* raise rollout\.prompts"
    ):
        run(world, keep_groups=2)


def test_whitening_counts_what_is_trained_on(world: World) -> None:
    world.write_rollouts(correct=[r in (3, 4, 5, 6, 10) for r in range(12)])
    metrics = run(world, keep_groups=1, whiten=True)
    rows = np.repeat(np.isin(np.arange(12), [6, 7, 8]), LENGTHS)
    kept = column(world.experience, "advantages")[rows]
    assert kept.mean() == pytest.approx(0, abs=1e-6)
    assert kept.std() == pytest.approx(1, abs=1e-5)
    assert metrics["advantage_std"] == pytest.approx(1, abs=1e-5)


def test_values_that_are_not_finite_are_named(world: World) -> None:
    with Checkpoint(world.critic, "critic") as source:
        model: Any = load_critic(source.folder)
        with torch.no_grad():
            model.score.weight[0, 0] = float("nan")
        facts = {"policy": world.manifest("policy").digest, "steps": 0}
        save_model(
            model, world.root / "critic2", kind="critic", store=world.objects, tokenizer=source.folder, facts=facts
        )
    with pytest.raises(UserError, match=r"values are not finite for rollouts 1/p0/0, .* and 7 more: lower"):
        run(world, "critic2")
    assert not world.experience.exists()


def cut(world: World, rows_: list[int]) -> None:
    """These responses were cut at the limit of generation."""
    table = read_table(world.rollouts, ROLLOUTS)
    columns: dict[str, Any] = {name: table[name] for name in table.column_names}
    columns["finish_reason"] = ["length" if r in rows_ else "stop" for r in range(12)]
    write_table(world.rollouts, ROLLOUTS, columns)


def test_overlong_filtering_leaves_out_what_was_cut(world: World) -> None:
    """Alone and within dynamic sampling's groups, whose choice it does not change; off, nothing is left out."""
    world.write_rollouts(correct=[r in (3, 4, 5, 6, 10) for r in range(12)])
    cut(world, [0, 6])
    run(world)
    assert trained(world) == list(range(12))
    run(world, drop_truncated=True)
    assert trained(world) == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    run(world, drop_truncated=True, keep_groups=1)
    assert trained(world) == [7, 8]
    cut(world, list(range(12)))
    with pytest.raises(UserError, match=r"all of the 12 responses .* raise rollout\.max_new_tokens"):
        run(world, drop_truncated=True)
