"""Bootstrap intervals: they cover the truth about as often as they promise, and say nothing where nothing is known."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vapo.evaluate import bootstrap
from vapo.evaluate.bootstrap import intervals


def ends(values: np.ndarray, confidence: float = 0.95, resamples: int = 400, seed: int = 0) -> tuple[np.ndarray, ...]:
    return intervals(values, confidence=confidence, resamples=resamples, generator=np.random.default_rng(seed))


shares = hnp.arrays(np.float64, st.tuples(st.integers(2, 30), st.integers(1, 3)), elements=st.integers(0, 8)).map(
    lambda counts: counts / 8
)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_coverage(confidence: float) -> None:
    """600 simulated evaluations of 200 prompts x 4 samples whose chances of success differ: the mean chance is 0.4.

    Percentile intervals are a little narrow (by a factor sqrt((P - 1) / P), here 0.9975), hence the slack of 1 % below.
    """
    generator, trials, covered = np.random.default_rng(7), 600, 0
    for trial in range(trials):
        chances = generator.beta(0.4, 0.6, size=200)
        values = generator.binomial(4, chances)[:, None] / 4
        (low,), (high,) = ends(values, confidence, seed=trial)
        covered += bool(low <= 0.4 <= high)
    error = np.sqrt(confidence * (1 - confidence) / trials)
    assert confidence - 0.01 - 3 * error < covered / trials < confidence + 3 * error


def test_width_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).normal(size=(2000, 1))
    low, high = ends(values, resamples=4000)
    assert (high - low)[0] == pytest.approx(2 * 1.96 * values.std() / np.sqrt(2000), rel=0.05)


@given(shares)
def test_an_interval_holds_the_mean(values: np.ndarray) -> None:
    low, high = ends(values)
    known = np.isfinite(low)
    assert (known == (values != values[0]).any(axis=0)).all()
    assert (np.isfinite(high) == known).all()
    means = values.mean(axis=0)
    assert (low[known] <= means[known] + 1e-12).all()
    assert (means[known] - 1e-12 <= high[known]).all()
    assert (low[known] >= values.min(axis=0)[known] - 1e-12).all()
    assert (high[known] <= values.max(axis=0)[known] + 1e-12).all()


@given(shares)
def test_more_confidence_is_wider(values: np.ndarray) -> None:
    (low, high), (lower, higher) = ends(values, 0.8), ends(values, 0.95)
    known = np.isfinite(low)
    assert (lower[known] <= low[known]).all()
    assert (high[known] <= higher[known]).all()


def test_one_prompt_and_equal_prompts_have_none() -> None:
    for values in (np.array([[0.5, 1.0]]), np.full((40, 2), 0.25)):
        low, high = ends(values)
        assert np.isnan(low).all()
        assert np.isnan(high).all()


def test_the_seed_decides() -> None:
    values = np.random.default_rng(0).random((50, 2))
    first, again, other = ends(values), ends(values), ends(values, seed=1)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_drawing_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random((50, 2))
    whole = ends(values)
    monkeypatch.setattr(bootstrap, "BLOCK", 50 * 7)
    assert np.array_equal(ends(values), whole)


def test_ten_thousand_prompts_take_seconds() -> None:
    values = np.random.default_rng(0).random((10_000, 15))
    begun = time.monotonic()
    ends(values, resamples=2000)
    assert time.monotonic() - begun < 20  # 0.7 s on an idle core
