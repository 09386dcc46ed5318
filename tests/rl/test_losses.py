"""Loss terms: hand-made numbers, where clipping stops the gradient, shares that add up, tokens that are not there."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vapo.rl.losses import (
    clipped_policy_loss,
    entropy_bonus,
    kl_loss,
    positive_lm_loss,
    token_weights,
    truncated_importance_weights,
    value_loss,
)

LOW, HIGH = 0.2, 0.28
NAN = float("nan")


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def policy_term(ratio: float, advantage: float, dual_clip: float | None = None) -> tuple[float, float]:
    """The loss of a single token of weight 1, and its derivative with respect to the logprob."""
    logprob = doubles(math.log(ratio)).requires_grad_()
    loss = clipped_policy_loss(logprob, doubles(0.0), doubles(advantage), doubles(1.0), LOW, HIGH, dual_clip)
    loss.backward()
    assert logprob.grad is not None
    return loss.item(), logprob.grad.item()


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
    assert policy_term(ratio, advantage)[1] == pytest.approx(expected, abs=1e-9)


@given(st.floats(0.1, 9), st.floats(-3, 3), st.none() | st.floats(1.5, 5))
def test_loss_is_the_pessimistic_one(ratio: float, advantage: float, dual_clip: float | None) -> None:
    """-min(r A, clip(r) A), held at c A where A < 0, written out in plain floats."""
    held = min(max(ratio, 1 - LOW), 1 + HIGH)
    expected = min(ratio * advantage, held * advantage)
    if dual_clip is not None and advantage < 0:
        expected = max(expected, dual_clip * advantage)
    assert policy_term(ratio, advantage, dual_clip)[0] == pytest.approx(-expected, abs=1e-9)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (4.0, -1.0, 3.0, 0.0),  # would cost 4: held at 3
        (2.9, -1.0, 2.9, 2.9),
        (4.0, -0.5, 1.5, 0.0),
        (4.0, 1.0, -1.28, 0.0),  # an advantage above 0 knows the upper clip only
        (0.5, -1.0, 0.8, 0.0),
    ],
)
def test_dual_clip_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    assert policy_term(ratio, advantage, 3.0) == pytest.approx((loss, gradient), abs=1e-9)


def test_importance_weights_by_hand() -> None:
    """The trainer's probability over the engine's, at most the cap."""
    found = truncated_importance_weights(doubles(0.5, 0.2, 0.3, 0.9).log(), doubles(0.5, 0.4, 0.1, 0.5).log(), 2.0)
    assert found.tolist() == pytest.approx([1.0, 0.5, 2.0, 1.8])


@given(st.lists(st.tuples(st.floats(-200, 0), st.floats(-200, 0)), min_size=1), st.floats(1, 10))
def test_importance_weights_stay_within_the_cap(logprobs: list[tuple[float, float]], cap: float) -> None:
    old, rollout = doubles(*(a for a, _ in logprobs)).requires_grad_(), doubles(*(b for _, b in logprobs))
    found = truncated_importance_weights(old, rollout.requires_grad_(), cap)
    assert not found.requires_grad
    assert ((found >= 0) & (found <= cap)).all()
    below = (old - rollout).detach() < math.log(cap)
    torch.testing.assert_close(found[below].log(), (old - rollout).detach()[below], rtol=1e-9, atol=1e-9)


def importance_terms(importance: Tensor | None) -> tuple[float, Tensor]:
    """Loss and gradient of 40 tokens, some of them clipped."""
    generator = torch.Generator().manual_seed(0)
    old, advantages = -torch.rand(40, generator=generator), torch.randn(40, generator=generator)
    logprobs = (old + 0.5 * torch.randn(40, generator=generator)).requires_grad_()
    loss = clipped_policy_loss(logprobs, old, advantages, torch.full((40,), 1 / 40), LOW, HIGH, 3.0, importance)
    loss.backward()
    assert logprobs.grad is not None
    return loss.item(), logprobs.grad


def test_importance_of_1_changes_nothing_to_the_bit() -> None:
    (plain, gradient), (weighted, weighted_gradient) = importance_terms(None), importance_terms(torch.ones(40))
    assert plain == weighted
    assert torch.equal(gradient, weighted_gradient)


def test_importance_scales_each_token_and_gets_no_gradient() -> None:
    importance = torch.linspace(0.0, 2.0, 40).requires_grad_()
    torch.testing.assert_close(importance_terms(importance)[1], importance_terms(None)[1] * importance.detach())
    assert importance.grad is None


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


def categorical() -> tuple[Tensor, Tensor]:
    """Logits of a policy over six tokens, which want a gradient, and the reference's log-probabilities."""
    generator = torch.Generator().manual_seed(3)
    policy, reference = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    return policy.requires_grad_(), reference.log_softmax(-1)


def expected_kl_loss(estimator: str) -> tuple[float, Tensor]:
    """Mean of a KL loss over the policy's own samples, by enumeration, and its gradient to the policy's logits.

    Sampling has no gradient: the probabilities stand as the tokens' weights.
    """
    policy, reference = categorical()
    logprobs = policy.log_softmax(-1)
    loss = kl_loss(logprobs, reference, logprobs.detach().exp(), estimator)
    loss.backward()
    assert policy.grad is not None
    return loss.item(), policy.grad


def exact_kl() -> tuple[float, Tensor]:
    policy, reference = categorical()
    logprobs = policy.log_softmax(-1)
    kl = (logprobs.exp() * (logprobs - reference)).sum()
    kl.backward()
    assert policy.grad is not None
    return kl.item(), policy.grad


@pytest.mark.parametrize(
    ("estimator", "expected"),
    # A token now twice as likely as to the reference, and one half as likely.
    [
        ("k1", (math.log(2), -math.log(2))),
        ("k2", (math.log(2) ** 2 / 2, math.log(2) ** 2 / 2)),
        ("k3", (0.5 - 1 + math.log(2), 2 - 1 - math.log(2))),
    ],
)
def test_kl_by_hand(estimator: str, expected: tuple[float, float]) -> None:
    logprobs, reference = doubles(0.5, 0.2).log(), doubles(0.25, 0.4).log()
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.25, 0.75)):
        found = kl_loss(logprobs, reference, doubles(*weights), estimator)
        assert found.item() == pytest.approx(np.dot(weights, expected), abs=1e-12)


@given(st.floats(-20, 20) | st.floats(-1e-6, 1e-6))
def test_k3_and_k2_are_never_negative(d: float) -> None:
    for estimator in ("k2", "k3"):
        assert kl_loss(doubles(d), doubles(0.0), doubles(1.0), estimator).item() >= 0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_of_the_same_policy_is_0(estimator: str) -> None:
    logprobs = -torch.rand(50)
    assert kl_loss(logprobs, logprobs.clone(), torch.full((50,), 0.02), estimator).item() == 0.0


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_have_the_exact_kl_as_their_mean(estimator: str) -> None:
    assert expected_kl_loss(estimator)[0] == pytest.approx(exact_kl()[0], abs=1e-12)


def test_k2_pulls_along_the_gradient_of_the_exact_kl_and_k1_nowhere() -> None:
    gradient = exact_kl()[1]
    assert gradient.abs().max() > 0.01
    torch.testing.assert_close(expected_kl_loss("k2")[1], gradient, rtol=0, atol=1e-12)
    torch.testing.assert_close(expected_kl_loss("k1")[1], torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)


def test_unknown_kl_estimator() -> None:
    with pytest.raises(ValueError, match="'k4'"):
        kl_loss(torch.zeros(1), torch.zeros(1), torch.ones(1), "k4")


def test_entropy_bonus_is_the_weighted_sum() -> None:
    entropies = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    bonus = entropy_bonus(entropies, torch.tensor([0.5, 0.25, 0.0]))
    assert bonus.item() == 1.0
    bonus.backward()
    assert entropies.grad is not None
    assert entropies.grad.tolist() == [0.5, 0.25, 0.0]


# Each term of a leaf x [n], other inputs a and b [n], and the weights.
Term = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
TERMS: dict[str, Term] = {
    "policy": lambda x, a, b, w: clipped_policy_loss(x, a, b, w, LOW, HIGH),
    "dual clip": lambda x, a, b, w: clipped_policy_loss(x, a, b, w, LOW, HIGH, 3.0),
    "importance": lambda x, a, b, w: clipped_policy_loss(x, a, b, w, LOW, HIGH, 3.0, b.abs()),
    "positive": lambda x, a, b, w: positive_lm_loss(x, w != 0, int((w != 0).sum())),
    "value": lambda x, a, b, w: value_loss(x, a, w),
    "value clip": lambda x, a, b, w: value_loss(x, a, w, b, 0.2),
    "entropy": lambda x, a, b, w: entropy_bonus(x, w),
    "k1": lambda x, a, b, w: kl_loss(x, a, w, "k1"),
    "k2": lambda x, a, b, w: kl_loss(x, a, w, "k2"),
    "k3": lambda x, a, b, w: kl_loss(x, a, w, "k3"),
}


def with_gradient(term: Term, x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    loss = term(x, *others)
    loss.backward()
    assert x.grad is not None
    return loss.detach(), x.grad


@pytest.mark.parametrize("junk", [NAN, math.inf, -math.inf, 1e38])
@pytest.mark.parametrize("name", TERMS)
def test_a_token_of_weight_0_is_not_there(name: str, junk: float) -> None:
    """Whatever it holds in any input: loss and gradients are those of the other tokens, its own gradient is 0."""
    generator = torch.Generator().manual_seed(0)
    there = torch.tensor([True, False, True, True, False, True])
    x, a, b = torch.randn(3, 6, generator=generator).masked_fill(~there, junk)
    weights = torch.rand(6, generator=generator).masked_fill(~there, 0.0)
    loss, gradient = with_gradient(TERMS[name], x, a, b, weights)
    expected, expected_gradient = with_gradient(TERMS[name], x[there], a[there], b[there], weights[there])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient[there], expected_gradient)
    assert gradient[~there].tolist() == [0.0, 0.0]
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", TERMS)
def test_a_micro_batch_of_absent_tokens_adds_exactly_0(name: str) -> None:
    nothing = torch.full((3,), NAN, requires_grad=True)
    loss = TERMS[name](nothing, nothing.detach(), nothing.detach(), torch.zeros(3))
    assert loss.item() == 0.0


def terms(split: list[np.ndarray], lengths: Tensor, aggregation: str) -> list[Tensor]:
    """Gradients of all terms with respect to logprobs or values, accumulated over a split of the responses."""
    generator = torch.Generator().manual_seed(7)
    count = int(lengths.sum())
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)
    draw = {name: torch.randn(count, generator=generator) for name in ("old", "advantages", "targets", "rollout")}
    logprobs = (draw["old"] + 0.3 * torch.randn(count, generator=generator)).requires_grad_()
    values = torch.randn(count, generator=generator).requires_grad_()
    positive = torch.rand(len(lengths), generator=generator)[owner] < 0.4
    weights = token_weights(lengths, aggregation)[owner]
    importance = truncated_importance_weights(draw["old"], draw["rollout"], 2.0)
    gradients = []
    for term in ("policy", "held", "positive", "value", "kl", "entropy"):
        logprobs.grad = values.grad = None
        for part in split:
            s = torch.isin(owner, torch.from_numpy(part))
            loss = {
                "policy": lambda s=s: clipped_policy_loss(
                    logprobs[s], draw["old"][s], draw["advantages"][s], weights[s], LOW, HIGH
                ),
                "held": lambda s=s: clipped_policy_loss(
                    logprobs[s], draw["old"][s], draw["advantages"][s], weights[s], LOW, HIGH, 1.5, importance[s]
                ),
                "kl": lambda s=s: kl_loss(logprobs[s], draw["old"][s], weights[s], "k3"),
                "entropy": lambda s=s: entropy_bonus(logprobs[s], weights[s]),
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
