"""Choosing tokens: known random numbers, the right frequencies, and never a token outside the nucleus."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vapo.errors import UserError
from vapo.recipe import load_recipe
from vapo.rollout import sampling
from vapo.rollout.sampling import mix, sample, uniform

DRAWS = 40_000
LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.0, 1.5, -3.0, 0.7, 0.2])


def seeds(count: int) -> np.ndarray:
    return mix(np.arange(count, dtype=np.uint64))


def draw(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, count: int = DRAWS) -> Tensor:
    return sample(logits.expand(count, -1), uniform(seeds(count), 0), temperature, top_p)


def deviation(drawn: Tensor, expected: Tensor) -> float:
    """Pearson's chi-square, in standard deviations above its mean; tokens of mass 0 must not occur."""
    counts = torch.bincount(drawn, minlength=len(expected)).double()
    assert not counts[expected == 0].any()
    mass = expected[expected > 0].double() * len(drawn)
    freedom = len(mass) - 1
    chi_square = float(((counts[expected > 0] - mass) ** 2 / mass).sum())
    return (chi_square - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize(("seed", "expected"), [(0, 0xE220A8397B1DCDAF), (1234567, 6457827717110365317)])
def test_mix_is_splitmix64(seed: int, expected: int) -> None:
    """First outputs of the reference implementation."""
    assert int(mix(np.array([seed], np.uint64))[0]) == expected


def test_uniform_lies_in_the_half_open_interval_and_is_even() -> None:
    found = uniform(seeds(100_000), 3)
    assert found.dtype == torch.float32
    assert found.min() >= 0
    assert found.max() < 1
    counts = torch.histc(found, 100, 0, 1)
    assert ((counts - 1000).abs() < 5 * 1000**0.5).all()


def test_uniform_of_every_seed_and_step_is_its_own() -> None:
    """24 bits: of 20,000 numbers about 12 coincide by chance; neither neighbours in seed nor in step do."""
    table = np.stack([uniform(np.arange(100, dtype=np.uint64), step).numpy() for step in range(200)])
    assert len(np.unique(table)) > 20_000 - 40
    for one, other in ((table[1:], table[:-1]), (table[:, 1:], table[:, :-1]), (table[1:, 1:], table[:-1, :-1])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.03


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=9), st.integers(0, 30_000))
def test_uniform_does_not_depend_on_the_batch(numbers: list[int], step: int) -> None:
    array = np.array(numbers, np.uint64)
    for i, number in enumerate(uniform(array, step)):
        assert number == uniform(array[i : i + 1], step)[0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_match_the_softmax(temperature: float) -> None:
    assert deviation(draw(LOGITS, temperature), (LOGITS / temperature).softmax(-1)) < 4


@pytest.mark.parametrize("top_p", [0.3, 0.7, 0.95])
def test_the_nucleus_and_nothing_else(top_p: float) -> None:
    """The smallest set of most likely tokens with mass >= top_p, in the softmax's proportions."""
    probabilities = LOGITS.softmax(-1)
    order = probabilities.argsort(descending=True).tolist()
    size = next(n for n in range(1, 9) if probabilities[order[:n]].sum() >= top_p)
    nucleus = torch.zeros(8)
    nucleus[order[:size]] = probabilities[order[:size]]
    drawn = draw(LOGITS, 1.0, top_p)
    assert set(drawn.tolist()) == set(order[:size])
    assert size == 1 or deviation(drawn, nucleus / nucleus.sum()) < 4


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("top_p", [0.5, 0.9, 1.0])
def test_the_distribution_is_that_of_transformers_warpers(temperature: float, top_p: float) -> None:
    """Temperature first, then the nucleus, as `generate` applies them."""
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    warped = TemperatureLogitsWarper(temperature)(torch.zeros(1, 1), LOGITS[None])
    expected = TopPLogitsWarper(top_p)(torch.zeros(1, 1), warped).softmax(-1)[0] if top_p < 1 else warped.softmax(-1)[0]
    drawn = draw(LOGITS, temperature, top_p)
    assert set(drawn.tolist()) <= set(expected.nonzero()[:, 0].tolist())
    assert (expected > 0).sum() == 1 or deviation(drawn, expected) < 4


@pytest.mark.parametrize("top_p", [0.1, 0.7, 0.95, 0.9999])
@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0])
def test_a_large_vocabulary_is_ranked_like_a_small_one(
    monkeypatch: pytest.MonkeyPatch, top_p: float, spread: float
) -> None:
    """Whether the nucleus is among the first few, is not, or is tied with what is outside: the tokens are the same."""
    logits = (spread * torch.randn(60, 2000, generator=torch.Generator().manual_seed(1))).round(decimals=1)
    logits[::3] *= 4
    numbers = uniform(seeds(60), 0)
    found = sample(logits, numbers, 1.0, top_p)
    monkeypatch.setattr(sampling, "MOST_LIKELY", 2000)  # rank all
    assert found.tolist() == sample(logits, numbers, 1.0, top_p).tolist()


def test_a_tiny_nucleus_is_the_argmax() -> None:
    assert set(draw(LOGITS, 1.0, 1e-6, 500).tolist()) == {0}


def test_greedy_is_the_argmax_whatever_the_number() -> None:
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    found = sample(logits, uniform(seeds(50), 0), 0.0, 1.0)
    assert found.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("top_p", [0.9, 1.0])
@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2.0**-24, 1.0])
def test_a_token_without_mass_is_never_chosen(number: float, top_p: float) -> None:
    """At both ends of the interval (1 is what rounding may make of it), with impossible tokens at both ends."""
    logits = torch.full((1, 1000), float("-inf"))
    logits[0, 300:700] = torch.randn(400, generator=torch.Generator().manual_seed(0))
    found = int(sample(logits, torch.tensor([number]), 1.0, top_p)[0])
    assert 300 <= found < 700


def test_rows_do_not_influence_each_other() -> None:
    logits, numbers = torch.randn(20, 9, generator=torch.Generator().manual_seed(0)), uniform(seeds(20), 0)
    for top_p in (0.8, 1.0):
        whole = sample(logits, numbers, 1.0, top_p)
        alone = [int(sample(logits[i : i + 1], numbers[i : i + 1], 1.0, top_p)[0]) for i in range(20)]
        assert whole.tolist() == alone


@pytest.mark.parametrize("setting", ["rollout.temperature=0.9", "rollout.top_p=0.95"])
def test_point_18_training_samples_from_the_policy_itself(setting: str) -> None:
    """What a recipe lets training sample with is the softmax; anything else is refused, for evaluation it is not."""
    section = load_recipe("vapo").rollout
    assert deviation(draw(LOGITS, section.temperature, section.top_p), LOGITS.softmax(-1)) < 4
    with pytest.raises(UserError, match=r"training samples at 1\.0 and 1\.0"):
        load_recipe("vapo", [setting])
    evaluation = load_recipe("vapo", [setting.replace("rollout", "evaluation")]).rollout_for_evaluation()
    assert (evaluation.temperature, evaluation.top_p) != (1.0, 1.0)
