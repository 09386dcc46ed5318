"""Advantages: golden numbers of reference/algorithm.md section 6, limits of lambda, ragged == row by row."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapo.rl.advantages import gae, length_adaptive_lambda, value_targets, whiten
from vapo.tables import offsets_of

VALUES = np.array([0.1, 0.2, -0.3, 0.4], np.float32)
GOLDEN = {
    0.0: [0.1, -0.5, 0.7, 0.6],
    0.5: [0.1, 0.0, 1.0, 0.6],
    0.95: [0.771175, 0.7065, 1.27, 0.6],
    1.0: [0.9, 0.8, 1.3, 0.6],
}


@st.composite
def batches(draw: st.DrawFn, most: int = 30) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Rows of values [T_i], rewards [B] and lambdas [B]; rows may be empty."""
    lengths = draw(st.lists(st.integers(0, most), min_size=1, max_size=8))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = [generator.normal(size=n).astype(np.float32) for n in lengths]
    rewards = generator.choice(np.array([-1.0, 1.0, 0.5], np.float32), len(rows))
    return rows, rewards, generator.choice([0.0, 0.3, 0.95, 0.99, 1.0], len(rows))


def of(rows: list[np.ndarray], rewards: np.ndarray, lambdas: np.ndarray | float) -> list[np.ndarray]:
    """GAE of ragged rows, cut into rows again."""
    offsets = offsets_of([len(r) for r in rows])
    flat = gae(np.concatenate(rows), offsets, rewards, np.asarray(lambdas))
    assert flat.dtype == np.float32
    return [flat[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def direct(values: np.ndarray, reward: float, lambda_: float) -> np.ndarray:
    """A_t = sum over k of lambda^k * delta[t+k], as the definition says it, in float64."""
    steps = len(values)
    following = np.append(values[1:].astype(np.float64), 0.0)
    delta = following - values.astype(np.float64)
    if steps:
        delta[-1] += reward
    return np.array([sum(lambda_**k * delta[t + k] for k in range(steps - t)) for t in range(steps)])


@pytest.mark.parametrize("lambda_", GOLDEN)
def test_gae_golden(lambda_: float) -> None:
    found = of([VALUES], np.array([1.0], np.float32), lambda_)[0]
    np.testing.assert_allclose(found, GOLDEN[lambda_], atol=1e-6)


def test_gae_of_trained_tokens_only() -> None:
    """With token 2 left out the row is its other tokens: lambda 0.5 gives 0.35, 0.5, 0.6."""
    found = of([VALUES[[0, 1, 3]]], np.array([1.0], np.float32), 0.5)[0]
    np.testing.assert_allclose(found, [0.35, 0.5, 0.6], atol=1e-6)


@pytest.mark.parametrize("lambda_", GOLDEN)
def test_golden_value_targets(lambda_: float) -> None:
    found = value_targets(VALUES, np.array([0, 4], np.int32), np.array([1.0], np.float32), lambda_)
    np.testing.assert_allclose(found, np.add(GOLDEN[lambda_], VALUES), atol=1e-6)


@given(batches())
def test_ragged_equals_direct_sum_of_each_row(batch: tuple[list[np.ndarray], np.ndarray, np.ndarray]) -> None:
    rows, rewards, lambdas = batch
    for values, reward, lambda_, found in zip(rows, rewards, lambdas, of(rows, rewards, lambdas), strict=True):
        np.testing.assert_allclose(found, direct(values, reward, lambda_), atol=1e-5)


@given(batches())
def test_lambda_0_is_the_td_error_and_lambda_1_the_return_minus_value(
    batch: tuple[list[np.ndarray], np.ndarray, np.ndarray],
) -> None:
    rows, rewards, _ = batch
    for values, reward, td, mc in zip(rows, rewards, of(rows, rewards, 0.0), of(rows, rewards, 1.0), strict=True):
        np.testing.assert_allclose(mc, reward - values, atol=1e-5)
        np.testing.assert_allclose(td, np.append(values[1:], reward)[: len(values)] - values, atol=1e-6)


@given(batches(), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_scalar_lambda_equals_vector(batch: tuple[list[np.ndarray], np.ndarray, np.ndarray], lambda_: float) -> None:
    rows, rewards, _ = batch
    vector = of(rows, rewards, np.full(len(rows), lambda_))
    for one, other in zip(of(rows, rewards, lambda_), vector, strict=True):
        np.testing.assert_array_equal(one, other)


@given(batches(), st.randoms(use_true_random=False))
def test_a_row_does_not_depend_on_its_neighbours(
    batch: tuple[list[np.ndarray], np.ndarray, np.ndarray], random: Random
) -> None:
    rows, rewards, lambdas = batch
    order = random.sample(range(len(rows)), len(rows))
    shuffled = of([rows[i] for i in order], rewards[order], lambdas[order])
    whole = of(rows, rewards, lambdas)
    for place, i in enumerate(order):
        np.testing.assert_array_equal(shuffled[place], whole[i])


@given(batches(), st.integers(0, 8))
def test_an_empty_response_changes_nothing(batch: tuple[list[np.ndarray], np.ndarray, np.ndarray], place: int) -> None:
    rows, rewards, lambdas = batch
    place = min(place, len(rows))
    empty = np.empty(0, np.float32)
    more = of([*rows[:place], empty, *rows[place:]], np.insert(rewards, place, 7.0), np.insert(lambdas, place, 0.5))
    assert len(more.pop(place)) == 0
    for one, other in zip(of(rows, rewards, lambdas), more, strict=True):
        np.testing.assert_array_equal(one, other)


def test_long_response_keeps_its_precision() -> None:
    """The paper's longest response: float32 accumulation would be off by more than this."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=20480).astype(np.float32)
    lambda_ = float(length_adaptive_lambda(np.array([20480]), 0.05)[0])
    found = of([values], np.array([1.0], np.float32), lambda_)[0]
    delta = np.append(values[1:], 1.0).astype(np.float64) - values
    for t in (0, 1, 10_000, 20_478, 20_479):
        expected = delta[t:] @ lambda_ ** np.arange(20480 - t)
        assert found[t] == pytest.approx(expected, abs=1e-5)


@given(batches(), st.sampled_from([0.3, 0.95, 1.0]))
def test_targets_are_the_critics_alone(
    batch: tuple[list[np.ndarray], np.ndarray, np.ndarray], lambda_critic: float
) -> None:
    """value_targets == values + GAE(lambda_critic), and at 1 every token's target is exactly its reward."""
    rows, rewards, _ = batch
    offsets, values = offsets_of([len(r) for r in rows]), np.concatenate(rows)
    found = value_targets(values, offsets, rewards, lambda_critic)
    expected = np.concatenate([direct(v, r, lambda_critic) + v for v, r in zip(rows, rewards, strict=True)])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if lambda_critic == 1.0:
        np.testing.assert_array_equal(found, np.repeat(rewards, np.diff(offsets)))


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
