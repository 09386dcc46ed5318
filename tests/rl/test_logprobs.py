"""Log-probabilities in chunks: the numbers by hand, chunked == unchunked, and how large a tensor ever gets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vapo.rl.logprobs import entropy, token_logprobs

HIDDEN, VOCABULARY = 3, 40


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made, forward or backward."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.seen = max(self.seen, tensor.numel())
        return out


def inputs(count: int, seed: int = 0) -> tuple[nn.Linear, Tensor, Tensor]:
    """A head, hidden states [n, H] that want a gradient, and token IDs [n]."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCABULARY, HIDDEN, generator=generator))
    hidden = torch.randn(count, HIDDEN, generator=generator).requires_grad_()
    return head, hidden, torch.randint(VOCABULARY, (count,), generator=generator)


def results(count: int, chunk: int, entropy_gradient: bool, seed: int = 0) -> list[Tensor]:
    """Log-probabilities, entropies, and the gradients of a weighted sum of both to the head and the hidden states."""
    head, hidden, targets = inputs(count, seed)
    logprobs, entropies = token_logprobs(head, hidden, targets, chunk, entropy_gradient=entropy_gradient)
    assert entropies.requires_grad is entropy_gradient
    weights = torch.linspace(0.5, 2.0, count)
    (weights * (logprobs - 0.3 * entropies.square())).sum().backward()
    assert hidden.grad is not None
    assert head.weight.grad is not None
    return [logprobs.detach(), entropies.detach(), hidden.grad, head.weight.grad]


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_by_hand(chunk: int) -> None:
    """The hidden states are the logits: even odds, 3 to 1, and certainty."""
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [0.0, 1000.0]])
    logprobs, entropies = token_logprobs(nn.Identity(), logits, torch.tensor([1, 0, 1]), chunk)
    assert logprobs.tolist() == pytest.approx([-math.log(2), math.log(0.75), 0.0], abs=1e-6)
    assert entropies.tolist() == pytest.approx([math.log(2), -0.75 * math.log(0.75) - 0.25 * math.log(0.25), 0.0])


def test_entropy_of_even_odds_is_the_logarithm_of_their_number() -> None:
    found = entropy(torch.zeros(2, 5, VOCABULARY).log_softmax(-1))
    assert found.shape == (2, 5)
    torch.testing.assert_close(found, torch.full((2, 5), math.log(VOCABULARY)))


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 7, 10])
def test_gradients_are_those_of_the_formula(chunk: int, entropy_gradient: bool) -> None:
    """d logprob / d logits = onehot - p; d entropy / d logits = -p (log p + entropy)."""
    count = 7
    head, hidden, targets = inputs(count)
    _, _, found_hidden, found_head = results(count, chunk, entropy_gradient)
    with torch.no_grad():
        log_p = head(hidden).log_softmax(-1)
        p, entropies = log_p.exp(), entropy(log_p)[:, None]
        towards = nn.functional.one_hot(targets, VOCABULARY) - p
        if entropy_gradient:
            towards += 0.6 * entropies * p * (log_p + entropies)  # of -0.3 * entropy squared
        towards *= torch.linspace(0.5, 2.0, count)[:, None]
        torch.testing.assert_close(found_hidden, towards @ head.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found_head, towards.T @ hidden, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 12), st.data(), st.booleans(), st.integers(0, 1000))
def test_chunked_equals_unchunked(count: int, data: st.DataObject, entropy_gradient: bool, seed: int) -> None:
    chunk = data.draw(st.sampled_from([1, 3, count, count + 5]) | st.integers(1, count))
    whole = results(count, count, entropy_gradient, seed)
    for one, other in zip(whole, results(count, chunk, entropy_gradient, seed), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("chunk", [HIDDEN, 4, 7])
def test_logits_of_all_tokens_never_exist(chunk: int, entropy_gradient: bool) -> None:
    """Neither forward nor backward makes a tensor larger than [chunk, V] ([H, V] is the weight)."""
    count = 11
    with Largest() as chunked:
        results(count, chunk, entropy_gradient)
    assert chunked.seen == chunk * VOCABULARY
    with Largest() as whole:
        results(count, count, entropy_gradient)
    assert whole.seen == count * VOCABULARY  # the recorder sees what it should


@pytest.mark.parametrize(("gradient", "asked"), [(False, [4, 4, 3]), (True, [4, 4, 3, 3, 4, 4])])
def test_rows_the_head_is_asked_for(gradient: bool, asked: list[int]) -> None:
    """For a gradient each chunk twice, the second time on the way back; without one once."""
    head, hidden, targets = inputs(11)
    rows = []

    def recorded(part: Tensor) -> Tensor:
        rows.append(len(part))
        return head(part)

    with torch.set_grad_enabled(gradient):
        logprobs, entropies = token_logprobs(recorded, hidden, targets, 4)
    assert rows == [4, 4, 3]
    assert logprobs.requires_grad is gradient
    assert not entropies.requires_grad
    if gradient:
        logprobs.sum().backward()
    assert rows == asked


def test_without_gradient_the_values_are_the_same() -> None:
    head, hidden, targets = inputs(11)
    with torch.no_grad():
        found = token_logprobs(head, hidden, targets, 4)
    for one, other in zip(found, token_logprobs(head, hidden, targets, 4), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_frozen_trunk_still_gives_the_head_its_gradient() -> None:
    head, hidden, targets = inputs(5)
    token_logprobs(head, hidden.detach(), targets, 2)[0].sum().backward()
    assert head.weight.grad is not None
    assert head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("chunk", [2, 5])
def test_computed_in_float32(chunk: int) -> None:
    """bfloat16 models: the logits are what they are, but their log-softmax is not rounded to 8 bits."""
    head, hidden, targets = inputs(5)
    head, hidden = head.bfloat16(), hidden.detach().bfloat16()
    found = token_logprobs(head, hidden, targets, chunk)
    exact = head(hidden).double().log_softmax(-1)
    for one, other in zip(found, (exact[torch.arange(5), targets], entropy(exact)), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_of_nothing() -> None:
    head, hidden, targets = inputs(0)
    assert [found.shape for found in token_logprobs(head, hidden, targets, 4)] == [(0,), (0,)]
