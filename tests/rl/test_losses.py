"""Loss terms: hand-made numbers, where clipping stops the gradient, and shares that add up."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vapo.rl.losses import clipped_policy_loss, positive_lm_loss, token_weights, value_loss

LOW, HIGH = 0.2, 0.28


def policy_gradient(ratio: float, advantage: float) -> float:
    """d loss / d logprob of a single token of weight 1."""
    logprob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)
    clipped_policy_loss(logprob, torch.zeros(1), torch.tensor([advantage]), one, LOW, HIGH).backward()
    assert logprob.grad is not None
    return logprob.grad.item()


def test_ratio_1_is_minus_the_mean_advantage() -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, advantages = -torch.rand(12, generator=generator), torch.randn(12, generator=generator)
    weights = token_weights(torch.tensor([5, 7]), "token").repeat_interleave(torch.tensor([5, 7]))
    loss = clipped_policy_loss(logprobs, logprobs.clone(), advantages, weights, LOW, HIGH)
    assert loss.item() == pytest.approx(-float(advantages.mean()), abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.3, 1.0, 0.0),  # raised enough: held by the upper clip, 1.28
        (1.27, 1.0, -1.27),  # clip-higher: 1.2 would have stopped this one
        (1.3, -1.0, 1.3),  # above, but the advantage pulls it back
        (0.79, -1.0, 0.0),  # lowered enough: held by the lower clip, 0.8
        (0.81, -1.0, 0.81),
        (0.79, 1.0, -0.79),
        (1.0, 2.0, -2.0),
    ],
)
def test_where_the_gradient_stops(ratio: float, advantage: float, expected: float) -> None:
    assert policy_gradient(ratio, advantage) == pytest.approx(expected, abs=1e-9)


@given(st.floats(0.1, 4), st.floats(-3, 3))
def test_loss_is_the_pessimistic_one(ratio: float, advantage: float) -> None:
    """-min(r A, clip(r) A), written out in plain floats."""
    loss = clipped_policy_loss(
        torch.tensor([math.log(ratio)], dtype=torch.float64),
        torch.zeros(1, dtype=torch.float64),
        torch.tensor([advantage], dtype=torch.float64),
        torch.ones(1, dtype=torch.float64),
        LOW,
        HIGH,
    )
    held = min(max(ratio, 1 - LOW), 1 + HIGH)
    assert loss.item() == pytest.approx(-min(ratio * advantage, held * advantage), abs=1e-9)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    # Advantages: one response of 1 token with -1 and one of 3 with +1.
    # token: -(-1 + 3) / 4; sample: -((-1) + 1) / 2.
    [("token", -0.5), ("sample", 0.0)],
)
def test_aggregation_by_hand(aggregation: str, expected: float) -> None:
    lengths = torch.tensor([1, 3])
    weights = token_weights(lengths, aggregation).repeat_interleave(lengths)
    zero = torch.zeros(4)
    loss = clipped_policy_loss(zero, zero, torch.tensor([-1.0, 1.0, 1.0, 1.0]), weights, LOW, HIGH)
    assert loss.item() == pytest.approx(expected, abs=1e-7)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=20), st.sampled_from(["token", "sample"]))
def test_weights_of_a_mini_batch_sum_to_1(lengths: list[int], aggregation: str) -> None:
    found = token_weights(torch.tensor(lengths), aggregation)
    assert found.shape == (len(lengths),)
    assert float((found.double() * torch.tensor(lengths)).sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("aggregation", ["token", "sample"])
def test_weights_with_empty_responses_are_finite(aggregation: str) -> None:
    assert torch.isfinite(token_weights(torch.tensor([0, 0]), aggregation)).all()


def test_unknown_aggregation() -> None:
    with pytest.raises(ValueError, match="'tokens'"):
        token_weights(torch.tensor([1]), "tokens")


def test_positive_lm_loss_counts_positive_tokens_only() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -4.0, -8.0], requires_grad=True)
    loss = positive_lm_loss(logprobs, torch.tensor([True, False, True, False]), 2)
    assert loss.item() == 2.5  # (1 + 4) / 2
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-0.5, 0.0, -0.5, 0.0]


def test_positive_lm_loss_without_positives_is_exactly_0() -> None:
    """No division by zero, and nothing to hold back the policy's own gradient."""
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss = positive_lm_loss(logprobs, torch.tensor([False, False]), 0)
    assert loss.item() == 0.0
    (loss + 3 * logprobs.sum()).backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [3.0, 3.0]


def test_positive_lm_loss_ignores_what_is_not_selected() -> None:
    """A NaN at a token of a wrong response must not get through: selected, not multiplied."""
    loss = positive_lm_loss(torch.tensor([-1.0, float("nan")]), torch.tensor([True, False]), 1)
    assert loss.item() == 1.0


def test_value_loss_by_hand() -> None:
    found = value_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0]), torch.tensor([0.5, 0.5]))
    assert float(found) == pytest.approx(0.5 * (0.5 * 1 + 0.5 * 9))


@pytest.mark.parametrize(
    ("value", "old", "target", "expected", "moves"),
    [
        (0.5, 0.0, 1.0, 0.5 * 0.8**2, False),  # went 0.5 towards the target, 0.2 are allowed: held at 0.2
        (0.1, 0.0, 1.0, 0.5 * 0.9**2, True),  # within the range
        (-0.5, 0.0, 1.0, 0.5 * 1.5**2, True),  # went away from the target: the plain loss is the larger one
        (2.5, 2.0, 1.0, 0.5 * 1.5**2, True),
    ],
)
def test_value_clip(value: float, old: float, target: float, expected: float, moves: bool) -> None:
    values = torch.tensor([value], requires_grad=True)
    loss = value_loss(values, torch.tensor([target]), torch.ones(1), torch.tensor([old]), 0.2)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss.backward()
    assert values.grad is not None
    assert (values.grad.item() != 0) is moves


def test_value_clip_wide_enough_is_no_clip() -> None:
    generator = torch.Generator().manual_seed(1)
    values, targets, old = (torch.randn(20, generator=generator) for _ in range(3))
    weights = torch.full((20,), 0.05)
    assert float(value_loss(values, targets, weights, old, 100.0)) == float(value_loss(values, targets, weights))


def terms(split: list[np.ndarray], lengths: Tensor, aggregation: str) -> list[Tensor]:
    """Gradients of the three terms with respect to logprobs and values, accumulated over a split of the responses."""
    generator = torch.Generator().manual_seed(7)
    count = int(lengths.sum())
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)
    draw = {name: torch.randn(count, generator=generator) for name in ("old", "advantages", "targets", "rollout")}
    logprobs = (draw["old"] + 0.3 * torch.randn(count, generator=generator)).requires_grad_()
    values = torch.randn(count, generator=generator).requires_grad_()
    positive = torch.rand(len(lengths), generator=generator)[owner] < 0.4
    weights = token_weights(lengths, aggregation)[owner]
    gradients = []
    for term in ("policy", "positive", "value"):
        logprobs.grad = values.grad = None
        for part in split:
            s = torch.isin(owner, torch.from_numpy(part))
            loss = {
                "policy": lambda s=s: clipped_policy_loss(
                    logprobs[s], draw["old"][s], draw["advantages"][s], weights[s], LOW, HIGH
                ),
                "positive": lambda s=s: positive_lm_loss(logprobs[s], positive[s], int(positive.sum())),
                "value": lambda s=s: value_loss(values[s], draw["targets"][s], weights[s], draw["rollout"][s], 0.2),
            }[term]()
            loss.backward()
        gradient = values.grad if term == "value" else logprobs.grad
        assert gradient is not None
        assert gradient.abs().sum() > 0
        gradients.append(gradient.clone())
    return gradients


@pytest.mark.parametrize("aggregation", ["token", "sample"])
@pytest.mark.parametrize("parts", [3, 8])
def test_gradients_do_not_depend_on_the_split(aggregation: str, parts: int) -> None:
    lengths = torch.tensor([1, 9, 4, 30, 2, 2, 17, 5])
    whole = terms([np.arange(8)], lengths, aggregation)
    for one, other in zip(whole, terms(np.array_split(np.arange(8), parts), lengths, aggregation), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
