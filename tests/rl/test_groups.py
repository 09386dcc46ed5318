"""Group-normalised advantages and informative groups: the formula by hand, what leaves them as they are, no NaN."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapo.rl.groups import group_mean, group_normalised, informative_groups

DIVIDED = pytest.mark.parametrize("divide_by_std", [False, True])

# Rewards and the group of each: any order, groups of one, groups without rows.
Rows = list[tuple[float, int]]
rows = st.lists(
    st.tuples(st.sampled_from([-1.0, -0.5, 0.0, 0.1, 1 / 3, 1.0]), st.integers(0, 6)), min_size=1, max_size=40
)


def arrays(drawn: Rows) -> tuple[np.ndarray, np.ndarray]:
    return np.array([r for r, _ in drawn]), np.array([g for _, g in drawn])


@pytest.mark.parametrize(
    ("divide_by_std", "expected"),
    # Group 0: 1, 0, 0, 1, mean 0.5, std 0.5; group 1: 3, 0, 0, mean 1, std sqrt 2. Their rows lie anywhere.
    [
        (True, [1, 2 / 2**0.5, -1, -1, -1 / 2**0.5, 1, -1 / 2**0.5]),
        (False, [0.5, 2, -0.5, -0.5, -1, 0.5, -1]),
    ],
)
def test_by_hand(divide_by_std: bool, expected: list[float]) -> None:
    rewards, groups = np.array([1, 3, 0, 0, 0, 1, 0], np.float32), np.array([0, 1, 0, 0, 1, 0, 1])
    found = group_normalised(rewards, groups, divide_by_std=divide_by_std)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


@DIVIDED
@given(drawn=rows)
def test_is_the_formula_group_by_group(divide_by_std: bool, drawn: Rows) -> None:
    rewards, groups = arrays(drawn)
    found = group_normalised(rewards, groups, divide_by_std=divide_by_std)
    for group in set(groups.tolist()):
        mine = rewards[groups == group]
        expected = np.zeros(len(mine))
        if len(set(mine.tolist())) > 1:
            expected = (mine - mine.mean()) / (mine.std() if divide_by_std else 1.0)
        np.testing.assert_allclose(found[groups == group], expected, atol=1e-6)


@DIVIDED
@given(drawn=rows, random=st.randoms(use_true_random=False))
def test_permuted_rows_give_permuted_advantages(divide_by_std: bool, drawn: Rows, random: Random) -> None:
    rewards, groups = arrays(drawn)
    order = np.array(random.sample(range(len(drawn)), len(drawn)))
    np.testing.assert_allclose(
        group_normalised(rewards[order], groups[order], divide_by_std=divide_by_std),
        group_normalised(rewards, groups, divide_by_std=divide_by_std)[order],
        atol=1e-6,
    )


@given(rows, st.sampled_from([0.25, 0.3, 2.0, 100.0]), st.sampled_from([-7.0, 0.0, 0.1, 3.0]))
def test_grpo_does_not_see_scale_and_shift(drawn: Rows, scale: float, shift: float) -> None:
    """+1/-1 and 1/0 are the same rewards to GRPO; turning them round turns the advantages round."""
    rewards, groups = arrays(drawn)
    expected = group_normalised(rewards, groups, divide_by_std=True)
    for sign in (1.0, -1.0):
        found = group_normalised(sign * scale * rewards + shift, groups, divide_by_std=True)
        np.testing.assert_allclose(found, sign * expected, atol=1e-5)


@given(rows, st.sampled_from([0.3, 2.0, 100.0]), st.sampled_from([-7.0, 0.0, 0.1, 3.0]))
def test_dr_grpo_does_not_see_shift_and_keeps_scale(drawn: Rows, scale: float, shift: float) -> None:
    rewards, groups = arrays(drawn)
    expected = scale * group_normalised(rewards, groups, divide_by_std=False)
    found = group_normalised(scale * rewards + shift, groups, divide_by_std=False)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@DIVIDED
@pytest.mark.parametrize("reward", [1.0, -1.0, 0.0, 0.1, 1 / 3, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_equal_rewards_are_exactly_0(size: int, dtype: type, reward: float, divide_by_std: bool) -> None:
    """A group of one among them, and three times 0.1, whose mean is not 0.1 in floating point."""
    found = group_normalised(np.full(size, reward, dtype), np.zeros(size, int), divide_by_std=divide_by_std)
    np.testing.assert_array_equal(found, np.zeros(size))


@DIVIDED
def test_a_group_of_one_beside_others(divide_by_std: bool) -> None:
    found = group_normalised(np.array([5.0, 1.0, 3.0]), np.array([1, 0, 0]), divide_by_std=divide_by_std)
    np.testing.assert_array_equal(found, [0.0, -1.0, 1.0])


@given(rows)
def test_group_mean_is_each_rows_baseline(drawn: Rows) -> None:
    """What Dr.GRPO takes off the reward."""
    rewards, groups = arrays(drawn)
    found = group_mean(rewards, groups)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, [rewards[groups == group].mean() for group in groups], atol=1e-12)
    centred = group_normalised(rewards, groups, divide_by_std=False)
    np.testing.assert_allclose(centred, rewards - found, atol=1e-6)


@DIVIDED
def test_of_nothing(divide_by_std: bool) -> None:
    assert group_normalised(np.empty(0), np.empty(0, int), divide_by_std=divide_by_std).shape == (0,)


def test_informative_groups_hold_both_verdicts() -> None:
    """All wrong, both, all right, one of one, none (no rows), both."""
    groups = np.array([5, 0, 1, 1, 2, 0, 2, 3, 1, 5])
    correct = np.array([0, 0, 1, 0, 1, 0, 1, 1, 1, 1], bool)
    assert informative_groups(correct, groups).tolist() == [False, True, False, False, False, True]


@given(rows)
def test_uninformative_groups_are_those_without_advantages(drawn: Rows) -> None:
    rewards, groups = arrays(drawn)
    correct = rewards > 0
    found = informative_groups(correct, groups)
    assert found.dtype == bool
    advantages = group_normalised(correct.astype(np.float32), groups, divide_by_std=True)
    np.testing.assert_array_equal(found[groups], advantages != 0)
