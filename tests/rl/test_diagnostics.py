"""Diagnostics: their known values, and that undefined is said to be undefined."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vapo.rl.diagnostics import approx_kl, clipped_tokens, dual_clipped_tokens, explained_variance
from vapo.rl.losses import clipped_policy_loss

TARGETS = np.array([1, -1, 1, 1, -1], np.float32)


def test_a_perfect_critic_explains_everything() -> None:
    assert explained_variance(TARGETS.copy(), TARGETS) == 1.0


@pytest.mark.parametrize("constant", [0.0, 0.2, 5.0])
def test_a_constant_explains_nothing(constant: float) -> None:
    """The mean, and any other constant: the measure is blind to an offset."""
    assert explained_variance(np.full(5, constant, np.float32), TARGETS) == pytest.approx(0.0, abs=1e-6)


def test_a_critic_that_is_wrong_is_worse_than_nothing() -> None:
    assert explained_variance(-TARGETS, TARGETS) == pytest.approx(-3.0, abs=1e-6)  # 1 - Var(2 R) / Var(R)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("reward", [-1.0, 0.1, 1 / 3])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_undefined_when_all_targets_are_equal(reward: float, count: int, dtype: type) -> None:
    values = np.linspace(-1, 1, count).astype(dtype)
    assert explained_variance(values, np.full(count, reward, dtype)) is None


def test_undefined_without_tokens() -> None:
    assert explained_variance(np.empty(0, np.float32), np.empty(0, np.float32)) is None


def test_clip_fractions_count_only_tokens_without_gradient() -> None:
    ratio = torch.tensor([0.79, 0.79, 0.81, 1.27, 1.29, 1.29])
    advantages = torch.tensor([-1.0, 1.0, -1.0, 1.0, 1.0, -1.0])
    assert clipped_tokens(ratio.log(), torch.zeros(6), advantages, 0.2, 0.28) == (1, 1)


def test_dual_clip_holds_back_what_became_likely_and_is_bad() -> None:
    ratio = torch.tensor([2.9, 3.1, 3.1, 9.0, 0.1])
    advantages = torch.tensor([-1.0, -1.0, 1.0, -0.1, -1.0])
    assert dual_clipped_tokens(ratio.log(), torch.zeros(5), advantages, 3.0) == 2


@given(st.lists(st.tuples(st.floats(-2, 2), st.floats(-1, 1)), min_size=1, max_size=20))
def test_the_clips_count_the_tokens_whose_gradient_is_0(tokens: list[tuple[float, float]]) -> None:
    logprobs = torch.tensor([a for a, _ in tokens], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.zeros(len(tokens)), torch.tensor([a for _, a in tokens], dtype=torch.float64)
    clipped_policy_loss(logprobs, old, advantages, torch.ones(len(tokens)), 0.2, 0.28, 3.0).backward()
    assert logprobs.grad is not None
    held = int(((logprobs.grad == 0) & (advantages != 0)).sum())
    low, high = clipped_tokens(logprobs, old, advantages, 0.2, 0.28)
    assert held == low + high + dual_clipped_tokens(logprobs, old, advantages, 3.0)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=10))
def test_approx_kl_is_the_sum_of_r_minus_1_minus_log_r(log_ratios: list[float]) -> None:
    old = torch.linspace(-2, 0, len(log_ratios), dtype=torch.float64)
    found = float(approx_kl(old + torch.tensor(log_ratios, dtype=torch.float64), old))
    assert found >= 0
    assert found == pytest.approx(sum(math.exp(x) - 1 - x for x in log_ratios), abs=1e-9)


def test_approx_kl_of_the_same_policy_is_0() -> None:
    logprobs = -torch.rand(50)
    assert float(approx_kl(logprobs, logprobs)) == 0.0


def test_approx_kl_estimates_the_kl_divergence() -> None:
    """Under samples of the old policy its mean is KL(old || new): exact here, each token weighted by old."""
    old, new = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    drawn = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)  # in old's proportions
    kl = float((old * (old / new).log()).sum())
    assert float(approx_kl(new.log()[drawn], old.log()[drawn])) / 10 == pytest.approx(kl, abs=1e-6)
