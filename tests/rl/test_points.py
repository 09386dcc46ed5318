"""What an expert reviewer checks, by its number in reference/algorithm.md section 5: what pure functions can show.

The points that need a stage are in tests/train.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from vapo.rl.advantages import decoupled_gae, gae, length_adaptive_lambda, whiten
from vapo.rl.diagnostics import clipped_tokens, explained_variance
from vapo.rl.groups import group_normalised
from vapo.rl.losses import clipped_policy_loss, positive_lm_loss, token_weights, value_loss
from vapo.tables import offsets_of

VALUES = np.array([0.1, 0.2, -0.3, 0.4], np.float32)
FOUR = np.array([0, 4], np.int32)  # offsets of that one response
WON = np.array([1.0], np.float32)
NAN = float("nan")


def gradient_of(loss: Callable[[Tensor], Tensor], leaf: Tensor) -> Tensor:
    leaf = leaf.clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


def test_point_01_lambda_is_the_responses_own_whatever_the_width_of_the_batch() -> None:
    """25 tokens at alpha 0.05: lambda 0.2, alone and beside a response of 4,000."""
    generator = np.random.default_rng(0)
    short, long = (generator.normal(size=n).astype(np.float32) for n in (25, 4000))
    assert length_adaptive_lambda(np.array([25, 4000]), 0.05) == pytest.approx([0.2, 0.995])
    alone = gae(short, np.array([0, 25], np.int32), WON, 0.2)
    for rows in ([short, long], [long, short]):
        lengths = np.array([len(r) for r in rows])
        offsets = offsets_of(lengths)
        found = gae(np.concatenate(rows), offsets, np.ones(2), length_adaptive_lambda(lengths, 0.05))
        start = offsets[int(np.argmin(lengths))]
        np.testing.assert_array_equal(found[start : start + 25], alone)


def test_point_02_value_targets_come_from_the_critics_own_lambda() -> None:
    """Whatever the policy's lambda, and never policy advantage + value."""
    for lambda_policy in (0.0, 0.5, 1.0):
        at_1 = decoupled_gae(VALUES, FOUR, WON, lambda_policy, 1.0)[1]
        at_0_95 = decoupled_gae(VALUES, FOUR, WON, lambda_policy, 0.95)[1]
        np.testing.assert_array_equal(at_1, np.ones(4))
        np.testing.assert_allclose(at_0_95, VALUES + np.array([0.771175, 0.7065, 1.27, 0.6]), atol=1e-6)
    advantages, targets = decoupled_gae(VALUES, FOUR, WON, 0.5, 1.0)
    assert np.abs(targets - (advantages + VALUES)).max() > 0.5


def test_point_03_whitening_is_of_the_policys_advantages_over_the_whole_batch() -> None:
    generator = np.random.default_rng(0)
    lengths = np.array([3, 40, 7])
    offsets, values = offsets_of(lengths), generator.normal(size=50).astype(np.float32)
    advantages, targets = decoupled_gae(values, offsets, np.array([5.0, -1.0, 1.0]), 0.9, 1.0)
    before = advantages.copy()
    white = whiten(advantages)
    # One mean and one deviation for all tokens, not one for each response; the raw advantages stay.
    np.testing.assert_allclose(white, (before - before.mean()) / before.std(), atol=1e-5)
    np.testing.assert_array_equal(advantages, before)
    # The targets are raw returns: neither whitened nor put together from whitened advantages.
    np.testing.assert_array_equal(targets, np.repeat([5.0, -1.0, 1.0], lengths))
    # One token, or no variance but that of rounding (of 1999 times 0.9 in float32): no NaN, no preference.
    for count, value in ((0, 0.0), (1, 3.0), (3, 0.1), (1999, 0.9)):
        np.testing.assert_allclose(whiten(np.full(count, value, np.float32)), np.zeros(count), atol=1e-5)


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 0.95])
def test_point_04_a_value_is_that_before_its_token(lambda_: float) -> None:
    """The golden numbers hold for this shift alone: values read one token early or late give others."""
    golden = {0.0: [0.1, -0.5, 0.7, 0.6], 0.5: [0.1, 0.0, 1.0, 0.6], 0.95: [0.771175, 0.7065, 1.27, 0.6]}[lambda_]
    np.testing.assert_allclose(gae(VALUES, FOUR, WON, lambda_), golden, atol=1e-6)
    for off_by_one in (np.append(VALUES[1:], 0), np.append(0, VALUES[:-1])):
        assert np.abs(gae(off_by_one.astype(np.float32), FOUR, WON, lambda_) - golden).max() > 0.05


@pytest.mark.parametrize("behind", [0, 1, 3])
def test_point_05_the_reward_is_the_last_trained_tokens(behind: int) -> None:
    """That token (EOS) is trained; what lies behind it neither gets the reward nor passes anything on."""
    values = np.concatenate([VALUES, np.full(behind, 9.0, np.float32)])
    mask = np.arange(4 + behind) < 4
    offsets = np.array([0, 4 + behind], np.int32)
    advantages, targets = decoupled_gae(values, offsets, WON, 0.0, 0.0, mask)
    # At lambda 0 each token sees its own step alone: the reward and no later value is in the last one's.
    np.testing.assert_allclose(advantages, [0.1, -0.5, 0.7, 1.0 - 0.4, *[0.0] * behind], atol=1e-6)
    np.testing.assert_allclose(targets, [0.2, -0.3, 0.4, 1.0, *[0.0] * behind], atol=1e-6)


def test_point_07_masked_slots_may_hold_nan_and_the_recursion_is_precise() -> None:
    mask = np.array([True, True, False, True])
    values = np.where(mask, VALUES, NAN).astype(np.float32)
    advantages, targets = decoupled_gae(values, FOUR, WON, 0.5, 0.5, mask)
    np.testing.assert_allclose(advantages[mask], [0.35, 0.5, 0.6], atol=1e-6)
    np.testing.assert_allclose(targets[mask], [0.45, 0.7, 1.0], atol=1e-6)
    # In the losses a token of weight 0 is such a slot: not in the sum, and not in the gradient.
    tokens, weights = torch.from_numpy(values), torch.from_numpy(mask) / 3.0
    for loss in (
        lambda x: clipped_policy_loss(x, tokens, tokens, weights, 0.2, 0.28),
        lambda x: value_loss(x, tokens + 1, weights, tokens, 0.2),
        lambda x: positive_lm_loss(x, weights > 0, 3),
    ):
        assert torch.isfinite(loss(tokens))
        gradient = gradient_of(loss, tokens)
        assert torch.isfinite(gradient).all()
        assert gradient[2] == 0
        assert (gradient[[0, 1, 3]] != 0).all()
    # 16,384 steps at lambda 1: the definition's own sum, to the last bit but one of float32.
    long = np.random.default_rng(0).normal(size=16384).astype(np.float32)
    found = gae(long, np.array([0, 16384], np.int32), WON, 1.0)
    np.testing.assert_allclose(found, 1.0 - long.astype(np.float64), rtol=2e-7, atol=1e-8)


def test_point_11_explained_variance_is_global_and_undefined_is_said() -> None:
    """Over all tokens, not the mean of responses; blind to an offset; None when no reward differs."""
    targets = np.repeat(np.array([1, -1, 1], np.float32), [2, 5, 90])
    values = np.random.default_rng(0).normal(size=97).astype(np.float32)
    errors = targets.astype(np.float64) - values
    mean_square = np.sum(errors**2) / 97 - (np.sum(errors) / 97) ** 2
    expected = 1 - mean_square / (np.sum(targets**2) / 97 - (np.sum(targets) / 97) ** 2)
    assert explained_variance(values, targets) == pytest.approx(expected, rel=1e-5)
    assert explained_variance(values + 3, targets) == pytest.approx(expected, rel=1e-5)
    for constant in (1.0, 0.1, 0.0):  # 97 times 0.1 has a variance in floating point
        assert explained_variance(values, np.full(97, constant)) is None
        assert explained_variance(np.full(97, constant, np.float32), np.full(97, constant, np.float32)) is None


@pytest.mark.parametrize("aggregation", ["token", "sample"])
def test_point_14_the_gradient_does_not_depend_on_how_a_mini_batch_is_split(aggregation: str) -> None:
    """Counts are the mini-batch's: for the token-level and the positive-example term alike."""
    lengths = torch.tensor([1, 9, 4, 30, 2])
    owner = torch.arange(5).repeat_interleave(lengths)
    generator = torch.Generator().manual_seed(0)
    old, advantages, start = torch.randn(3, 46, generator=generator)
    positive = torch.tensor([True, False, False, True, False])[owner]
    weights = token_weights(lengths, aggregation)[owner]
    assert float(weights.sum()) == pytest.approx(1.0)  # of the whole mini-batch: no part of it sums to 1

    def policy(logprobs: Tensor, part: Tensor) -> Tensor:
        return clipped_policy_loss(logprobs[part], old[part], advantages[part], weights[part], 0.2, 0.28)

    def examples(logprobs: Tensor, part: Tensor) -> Tensor:
        return positive_lm_loss(logprobs[part], positive[part], int(positive.sum()))

    for term in (policy, examples):
        whole = gradient_of(lambda x, f=term: f(x, owner >= 0), start)
        assert whole.abs().sum() > 0
        for groups in ([[0], [1], [2], [3], [4]], [[3, 0], [2, 1, 4]], [[1, 2, 4], [0, 3]]):
            masks = [torch.isin(owner, torch.tensor(group)) for group in groups]
            split = gradient_of(lambda x, f=term, m=masks: sum(f(x, part) for part in m), start)
            torch.testing.assert_close(split, whole, rtol=1e-6, atol=1e-8)


def test_point_15_positive_examples_count_and_none_is_exactly_0() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -4.0])
    none = torch.zeros(3, dtype=torch.bool)
    assert positive_lm_loss(logprobs, none, 0).item() == 0.0
    assert positive_lm_loss(logprobs, none, 7).item() == 0.0  # the mini-batch's positives are in other micro-batches
    together = gradient_of(lambda x: x.sum() + positive_lm_loss(x, none, 0), logprobs)
    assert together.tolist() == [1.0, 1.0, 1.0]
    # Never inert: where there are positives every one of their tokens is pulled up.
    some = torch.tensor([True, False, True])
    assert positive_lm_loss(logprobs, some, 2).item() == 2.5
    assert gradient_of(lambda x: positive_lm_loss(x, some, 2), logprobs).tolist() == [-0.5, 0.0, -0.5]


def test_point_16_clip_fractions_low_and_high_apart() -> None:
    """Ratios just inside and outside 0.8 and 1.28; a clip holds back only what goes the advantage's way."""
    ratio = torch.tensor([0.79, 0.79, 0.79, 0.81, 1.21, 1.27, 1.29, 1.29])
    advantages = torch.tensor([-1.0, -1.0, 1.0, -1.0, 1.0, 1.0, 1.0, -1.0])
    assert clipped_tokens(ratio.log(), torch.zeros(8), advantages, 0.2, 0.28) == (2, 1)


@pytest.mark.parametrize("divide_by_std", [False, True])
def test_point_19_a_group_of_one_gives_0_and_no_nan(divide_by_std: bool) -> None:
    rewards, groups = np.array([0.1, 1.0, -1.0, 0.1, 0.1, 0.1]), np.array([0, 1, 1, 2, 2, 2])
    found = group_normalised(rewards, groups, divide_by_std=divide_by_std)
    np.testing.assert_array_equal(found, [0, 1, -1, 0, 0, 0])  # equal rewards beside it, too
