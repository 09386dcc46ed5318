"""Advantages: golden numbers of reference/algorithm.md section 6, limits of lambda, ragged == padded, threads."""

from __future__ import annotations

from itertools import pairwise
from random import Random
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapo.rl import advantages as module
from vapo.rl.advantages import decoupled_gae, gae, length_adaptive_lambda, whiten
from vapo.tables import offsets_of

VALUES = np.array([0.1, 0.2, -0.3, 0.4], np.float32)
FOUR = np.array([0, 4], np.int32)  # offsets of that one response
WON = np.array([1.0], np.float32)
GOLDEN = {
    0.0: [0.1, -0.5, 0.7, 0.6],
    0.5: [0.1, 0.0, 1.0, 0.6],
    0.95: [0.771175, 0.7065, 1.27, 0.6],
    1.0: [0.9, 0.8, 1.3, 0.6],
}


class Batch(NamedTuple):
    rows: list[np.ndarray]  # values [T_i]; a row may be empty
    masks: list[np.ndarray]  # [T_i] bool
    rewards: np.ndarray  # [B]
    lambdas: np.ndarray  # [B]


@st.composite
def batches(draw: st.DrawFn, most: int = 30) -> Batch:
    lengths = draw(st.lists(st.integers(0, most), min_size=1, max_size=8))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    return Batch(
        [generator.normal(size=n).astype(np.float32) for n in lengths],
        [generator.random(n) < 0.7 for n in lengths],
        generator.choice(np.array([-1.0, 1.0, 0.5, 0.0], np.float32), len(lengths)),
        generator.choice([0.0, 0.3, 0.95, 0.99, 1.0], len(lengths)),
    )


def flat(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The rows end to end, and their offsets."""
    return np.concatenate(rows), offsets_of([len(r) for r in rows])


def cut(tokens: np.ndarray, rows: list[np.ndarray]) -> list[np.ndarray]:
    return [tokens[a:b] for a, b in pairwise(offsets_of([len(r) for r in rows]))]


def of(rows: list[np.ndarray], rewards: np.ndarray, lambdas: np.ndarray | float) -> list[np.ndarray]:
    """GAE of ragged rows, cut into rows again."""
    found = gae(*flat(rows), rewards, lambdas)
    assert found.dtype == np.float32
    return cut(found, rows)


def direct(values: np.ndarray, reward: float, lambda_: float) -> np.ndarray:
    """A_t = sum over k of lambda^k * delta[t+k], as the definition says it, in float64."""
    steps = len(values)
    following = np.append(values[1:].astype(np.float64), 0.0)
    delta = following - values.astype(np.float64)
    if steps:
        delta[-1] += reward
    return np.array([sum(lambda_**k * delta[t + k] for k in range(steps - t)) for t in range(steps)])


def padded(batch: Batch, lambdas: np.ndarray) -> np.ndarray:
    """The peers' loop over time steps of [B, T_max], with NaN wherever there is no trained token."""
    shape = len(batch.rows), max(len(r) for r in batch.rows)
    values, mask, rewards = np.full(shape, np.nan), np.zeros(shape, bool), np.zeros(shape)
    for i, (row, kept, reward) in enumerate(zip(batch.rows, batch.masks, batch.rewards, strict=True)):
        values[i, : len(row)], mask[i, : len(row)] = np.where(kept, row, np.nan), kept
        if kept.any():
            rewards[i, np.flatnonzero(kept)[-1]] = reward
    out, following_value, following = np.zeros(shape), np.zeros(shape[0]), np.zeros(shape[0])
    for t in reversed(range(shape[1])):
        delta = rewards[:, t] + following_value - values[:, t]
        following = np.where(mask[:, t], delta + lambdas * following, following)
        following_value = np.where(mask[:, t], values[:, t], following_value)
        out[:, t] = np.where(mask[:, t], following, 0.0)
    return out


@pytest.mark.parametrize("lambda_", GOLDEN)
def test_gae_golden(lambda_: float) -> None:
    np.testing.assert_allclose(gae(VALUES, FOUR, WON, lambda_), GOLDEN[lambda_], atol=1e-6)


@pytest.mark.parametrize("lambda_critic", GOLDEN)
@pytest.mark.parametrize("lambda_policy", GOLDEN)
def test_decoupled_golden(lambda_policy: float, lambda_critic: float) -> None:
    """All sixteen pairs: neither lambda reaches the other's result."""
    advantages, targets = decoupled_gae(VALUES, FOUR, WON, lambda_policy, lambda_critic)
    assert advantages.dtype == targets.dtype == np.float32
    np.testing.assert_allclose(advantages, GOLDEN[lambda_policy], atol=1e-6)
    np.testing.assert_allclose(targets, np.add(GOLDEN[lambda_critic], VALUES), atol=1e-6)


@pytest.mark.parametrize("value", [-0.3, np.nan, np.inf])
def test_golden_with_token_2_masked(value: float) -> None:
    """Stepped over whatever it holds: lambda 0.5 gives 0.35, 0.5, 0.6 on tokens 0, 1 and 3."""
    values = np.array([0.1, 0.2, value, 0.4], np.float32)
    mask = np.array([True, True, False, True])
    advantages, targets = decoupled_gae(values, FOUR, WON, 0.5, 1.0, mask)
    np.testing.assert_allclose(advantages, [0.35, 0.5, 0.0, 0.6], atol=1e-6)
    np.testing.assert_array_equal(targets, [1.0, 1.0, 0.0, 1.0])
    np.testing.assert_array_equal(gae(values, FOUR, WON, 0.5, mask), advantages)


@given(batches())
def test_ragged_equals_direct_sum_of_each_row(batch: Batch) -> None:
    found = of(batch.rows, batch.rewards, batch.lambdas)
    for values, reward, lambda_, one in zip(batch.rows, batch.rewards, batch.lambdas, found, strict=True):
        np.testing.assert_allclose(one, direct(values, reward, lambda_), atol=1e-5)


@given(batches(), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_ragged_equals_padded(batch: Batch, lambda_critic: float) -> None:
    mask = np.concatenate(batch.masks)
    found = decoupled_gae(*flat(batch.rows), batch.rewards, batch.lambdas, lambda_critic, mask)
    expected = padded(batch, batch.lambdas), padded(batch, np.full(len(batch.rows), lambda_critic))
    for row, advantages, targets, kept, policy, critic in zip(
        batch.rows, cut(found[0], batch.rows), cut(found[1], batch.rows), batch.masks, *expected, strict=True
    ):
        np.testing.assert_allclose(advantages, policy[: len(row)], atol=1e-5)
        np.testing.assert_allclose(targets, np.where(kept, row + critic[: len(row)], 0.0), atol=1e-5)


@given(batches(), st.sampled_from([0.5, 1.0]))
def test_masked_tokens_are_as_if_taken_out(batch: Batch, lambda_critic: float) -> None:
    mask = np.concatenate(batch.masks)
    values, offsets = flat(batch.rows)
    whole = decoupled_gae(np.where(mask, values, np.nan), offsets, batch.rewards, batch.lambdas, lambda_critic, mask)
    shorter = [row[kept] for row, kept in zip(batch.rows, batch.masks, strict=True)]
    for one, other in zip(
        whole, decoupled_gae(*flat(shorter), batch.rewards, batch.lambdas, lambda_critic), strict=True
    ):
        np.testing.assert_array_equal(one[mask], other)
        np.testing.assert_array_equal(one[~mask], 0.0)


@given(batches())
def test_a_mask_of_trained_tokens_only_is_no_mask(batch: Batch) -> None:
    values, offsets = flat(batch.rows)
    plain = decoupled_gae(values, offsets, batch.rewards, batch.lambdas, 0.9)
    masked = decoupled_gae(values, offsets, batch.rewards, batch.lambdas, 0.9, np.ones(len(values), bool))
    for one, other in zip(plain, masked, strict=True):
        np.testing.assert_array_equal(one, other)


@given(batches())
def test_lambda_0_is_the_td_error_and_lambda_1_the_return_minus_value(batch: Batch) -> None:
    rows, rewards = batch.rows, batch.rewards
    for values, reward, td, mc in zip(rows, rewards, of(rows, rewards, 0.0), of(rows, rewards, 1.0), strict=True):
        np.testing.assert_allclose(mc, reward - values, atol=1e-5)
        np.testing.assert_allclose(td, np.append(values[1:], reward)[: len(values)] - values, atol=1e-6)


@given(batches(), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_scalar_lambda_equals_vector(batch: Batch, lambda_: float) -> None:
    vector = of(batch.rows, batch.rewards, np.full(len(batch.rows), lambda_))
    for one, other in zip(of(batch.rows, batch.rewards, lambda_), vector, strict=True):
        np.testing.assert_array_equal(one, other)


@given(batches(), st.randoms(use_true_random=False))
def test_a_row_does_not_depend_on_its_neighbours(batch: Batch, random: Random) -> None:
    rows, _, rewards, lambdas = batch
    order = random.sample(range(len(rows)), len(rows))
    shuffled = of([rows[i] for i in order], rewards[order], lambdas[order])
    whole = of(rows, rewards, lambdas)
    for place, i in enumerate(order):
        np.testing.assert_array_equal(shuffled[place], whole[i])


@given(batches(), st.integers(0, 8))
def test_an_empty_response_changes_nothing(batch: Batch, place: int) -> None:
    """Before, between or behind the others."""
    rows, _, rewards, lambdas = batch
    place = min(place, len(rows))
    empty = np.empty(0, np.float32)
    more = of([*rows[:place], empty, *rows[place:]], np.insert(rewards, place, 7.0), np.insert(lambdas, place, 0.5))
    assert len(more.pop(place)) == 0
    for one, other in zip(of(rows, rewards, lambdas), more, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_batch_without_tokens() -> None:
    for offsets in (np.zeros(1, np.int32), np.zeros(4, np.int32)):
        advantages, targets = decoupled_gae(
            np.empty(0, np.float32), offsets, np.zeros(len(offsets) - 1, np.float32), 0.5, 1.0
        )
        assert advantages.shape == targets.shape == (0,)


@given(batches(), st.integers(2, 5))
def test_threads_do_not_change_a_bit(batch: Batch, threads: int) -> None:
    """Few tokens for many threads: empty parts, parts of one row, empty rows at the cuts."""
    values, offsets = flat(batch.rows)
    mask = np.concatenate(batch.masks)
    with mock.patch.object(module, "ALONE", 0):
        one, many = (
            decoupled_gae(values, offsets, batch.rewards, batch.lambdas, 0.9, mask, threads=n) for n in (1, threads)
        )
    for alone, together in zip(one, many, strict=True):
        np.testing.assert_array_equal(alone, together)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("threads", [2, 3, 16, None])
def test_threads_of_a_large_batch(threads: int | None, masked: bool) -> None:
    """More tokens than one thread gets, some responses longer than a thread's share."""
    generator = np.random.default_rng(0)
    lengths = np.append(generator.lognormal(3.0, 1.5, 500).astype(int), [0, module.ALONE, 0])
    generator.shuffle(lengths)
    offsets = offsets_of(lengths)
    values = generator.normal(size=offsets[-1]).astype(np.float32)
    mask = generator.random(len(values)) < 0.9 if masked else None
    rewards, lambdas = generator.choice([-1.0, 1.0], len(lengths)), length_adaptive_lambda(lengths, 0.05)
    assert len(values) > module.ALONE
    alone, together = (decoupled_gae(values, offsets, rewards, lambdas, 0.95, mask, threads=n) for n in (1, threads))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_long_response_keeps_its_precision() -> None:
    """The paper's longest response: float32 accumulation would be off by more than this."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=20480).astype(np.float32)
    lambda_ = float(length_adaptive_lambda(np.array([20480]), 0.05)[0])
    found = of([values], WON, lambda_)[0]
    delta = np.append(values[1:], 1.0).astype(np.float64) - values
    for t in (0, 1, 10_000, 20_478, 20_479):
        expected = delta[t:] @ lambda_ ** np.arange(20480 - t)
        assert found[t] == pytest.approx(expected, rel=2e-7, abs=2e-7)


@given(batches(), st.sampled_from([0.3, 0.95, 1.0]))
def test_targets_are_the_critics_alone(batch: Batch, lambda_critic: float) -> None:
    """targets == values + GAE(lambda_critic), and at 1 every token's target is exactly its reward."""
    rows, _, rewards, lambdas = batch
    values, offsets = flat(rows)
    found = decoupled_gae(values, offsets, rewards, lambdas, lambda_critic)[1]
    expected = np.concatenate([direct(v, r, lambda_critic) + v for v, r in zip(rows, rewards, strict=True)])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if lambda_critic == 1.0:
        np.testing.assert_array_equal(found, np.repeat(rewards, np.diff(offsets)))


@given(batches())
def test_gae_is_the_first_half(batch: Batch) -> None:
    values, offsets = flat(batch.rows)
    np.testing.assert_array_equal(
        gae(values, offsets, batch.rewards, batch.lambdas),
        decoupled_gae(values, offsets, batch.rewards, batch.lambdas, 0.9)[0],
    )


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (21, 0.047619),
        (25, 0.2),
        (40, 0.5),
        (100, 0.8),
        (1000, 0.98),
        (6000, 0.996667),
        (16384, 0.998779),
        (20480, 0.999023),
    ],
)
def test_length_adaptive_lambda_golden(length: int, expected: float) -> None:
    assert length_adaptive_lambda(np.array([length]), 0.05)[0] == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("length", [0, 1, 19, 20])
def test_short_responses_get_pure_td(length: int) -> None:
    """alpha * length <= 1: the raw formula leaves [0, 1] (-19 at length 1); clamped to 0."""
    assert length_adaptive_lambda(np.array([length]), 0.05)[0] == pytest.approx(0.0, abs=1e-12)


def test_lambda_leaves_0_at_length_21() -> None:
    found = length_adaptive_lambda(np.array([0, 1, 19, 20, 21]), 0.05)
    np.testing.assert_allclose(found, [0, 0, 0, 0, 1 / 21], atol=1e-12)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=20), st.floats(1e-3, 10))
def test_lambda_is_each_lengths_own_and_grows_with_it(lengths: list[int], alpha: float) -> None:
    found = length_adaptive_lambda(np.array(lengths), alpha)
    assert found.dtype == np.float64
    assert ((found >= 0) & (found <= 1)).all()
    order = np.argsort(lengths, kind="stable")
    assert (np.diff(found[order]) >= 0).all()
    for length, lambda_ in zip(lengths, found, strict=True):
        if alpha * length > 1:
            assert 1 / (1 - lambda_) == pytest.approx(alpha * length, rel=1e-6)


def test_whiten_has_mean_0_and_deviation_1_and_keeps_order() -> None:
    advantages = np.random.default_rng(0).normal(3.0, 5.0, 1000).astype(np.float32)
    found = whiten(advantages)
    assert found.dtype == np.float32
    assert found.mean() == pytest.approx(0, abs=1e-6)
    assert found.std() == pytest.approx(1, abs=1e-5)
    np.testing.assert_array_equal(np.argsort(found), np.argsort(advantages))


@given(st.integers(1, 2000), st.sampled_from([0.0, 1.0, -1.0, 0.9, 0.1, -123.4, 1e-3]))
def test_whiten_without_variance_is_zero(count: int, value: float) -> None:
    """Rounding must not be taken for variance: equal advantages carry no preference. One token is such a case."""
    np.testing.assert_allclose(whiten(np.full(count, value, np.float32)), 0.0, atol=1e-5)


def test_whiten_of_nothing() -> None:
    assert whiten(np.empty(0, np.float32)).shape == (0,)
