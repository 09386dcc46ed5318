"""The engine: a response is a function of prompt, weights and its own seed, and its logprobs are the model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vapo.rollout import engine
from vapo.rollout.decoder import Cache, Decoder
from vapo.rollout.engine import Response, generate
from vapo.rollout.sampling import mix

from .conftest import EOS, VARIANTS, VOCABULARY

Make = Callable[[str], tuple[Path, Any]]
GENERATOR = np.random.default_rng(3)
PROMPTS = [GENERATOR.integers(2, VOCABULARY, n).tolist() for n in (5, 1, 12, 5)]
SAMPLES = 3
COUNT = len(PROMPTS) * SAMPLES
MAX_NEW = 70  # more than the cache's first 64 columns


def seeds(count: int) -> np.ndarray:
    return mix(np.arange(count, dtype=np.uint64))


def run(decoder: Decoder, prompts: list[list[int]] = PROMPTS, samples: int = SAMPLES, **changed: Any) -> list[Response]:
    settings: dict[str, Any] = {
        "max_new_tokens": MAX_NEW,
        "temperature": 1.0,
        "top_p": 1.0,
        "stop_token": EOS,
        "batch_size": 64,
        "seeds": seeds(len(prompts) * samples),
    }
    return generate(decoder, prompts, samples=samples, **{**settings, **changed})


@pytest.fixture(scope="module")
def decoder(checkpoint: Make) -> Decoder:
    return Decoder(checkpoint("llama-grouped")[0])


@pytest.fixture(scope="module")
def sampled(decoder: Decoder) -> list[Response]:
    return run(decoder)


def test_the_responses_are_worth_testing(sampled: list[Response]) -> None:
    """Some stop, early and late, some run to the end: every path of the engine is taken."""
    reasons = [r.finish_reason for r in sampled]
    assert {"stop", "length"} == set(reasons)
    assert len({tuple(r.tokens) for r in sampled}) == len(sampled)


def test_why_a_response_ends(sampled: list[Response]) -> None:
    for response in sampled:
        stops = [t for t, token in enumerate(response.tokens) if token == EOS]
        if response.finish_reason == "stop":
            assert stops == [len(response.tokens) - 1]
        else:
            assert stops == []
            assert len(response.tokens) == MAX_NEW
        assert len(response.logprobs) == len(response.tokens)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
def test_logprobs_are_the_models_at_temperature_1(
    checkpoint: Make, variant: str, temperature: float, top_p: float
) -> None:
    """Prompts and responses of all lengths; grouped heads, biases, tied and untied heads."""
    folder, model = checkpoint(variant)
    for i, response in enumerate(run(Decoder(folder), temperature=temperature, top_p=top_p, batch_size=7)):
        prompt = PROMPTS[i // SAMPLES]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response.tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(response.tokens)[:, None])[:, 0]
        np.testing.assert_allclose(response.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 8, 1000])
def test_a_response_does_not_depend_on_the_batch_size(
    decoder: Decoder, sampled: list[Response], batch_size: int
) -> None:
    assert [r.tokens for r in run(decoder, batch_size=batch_size)] == [r.tokens for r in sampled]


@pytest.mark.parametrize("batch_size", [1, 5, 8])
def test_the_cache_never_holds_more_rows_than_the_batch_size(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """However many samples a prompt has."""
    held: list[int] = []
    keep = Cache.keep

    def watched(cache: Cache, rows: torch.Tensor, columns: int) -> None:
        keep(cache, rows, columns)
        held.extend(len(keys) for keys in cache.keys)

    monkeypatch.setattr(Cache, "keep", watched)
    assert len(run(decoder, samples=20, batch_size=batch_size, max_new_tokens=3)) == 80
    assert max(held) == batch_size


def test_long_prompts_are_read_in_pieces(
    decoder: Decoder, sampled: list[Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "READ_AT_ONCE", 12)  # four prompts of up to 12 tokens: three columns at a time
    assert [r.tokens for r in run(decoder)] == [r.tokens for r in sampled]


def test_a_response_depends_on_its_seed_alone(decoder: Decoder, sampled: list[Response]) -> None:
    """Alone, or in another order among other prompts: the same seed gives the same response."""
    for i in (0, 4, 8, 11):
        (alone,) = run(decoder, [PROMPTS[i // SAMPLES]], 1, seeds=seeds(COUNT)[i : i + 1])
        assert alone.tokens == sampled[i].tokens
        assert alone.finish_reason == sampled[i].finish_reason
    backwards = run(decoder, PROMPTS[::-1], seeds=seeds(COUNT)[::-1].copy())
    assert [r.tokens for r in backwards] == [r.tokens for r in sampled[::-1]]
    other = run(decoder, seeds=seeds(2 * COUNT)[COUNT:])
    assert all(a.tokens != b.tokens for a, b in zip(other, sampled, strict=True))


def test_twice_is_the_same(decoder: Decoder, sampled: list[Response]) -> None:
    assert run(decoder) == sampled


@pytest.mark.parametrize("limit", [1, 2, 64, 65])
def test_a_lower_limit_cuts_the_same_response(decoder: Decoder, sampled: list[Response], limit: int) -> None:
    for short, long in zip(run(decoder, max_new_tokens=limit), sampled, strict=True):
        assert short.tokens == long.tokens[:limit]
        assert short.finish_reason == ("stop" if EOS in long.tokens[:limit] else "length")


def test_greedy_is_the_argmax_of_every_step(checkpoint: Make, decoder: Decoder) -> None:
    model = checkpoint("llama-grouped")[1]
    for prompt, response in zip(PROMPTS, run(decoder, samples=1, temperature=0.0, max_new_tokens=12), strict=True):
        tokens = list(prompt)
        for token in response.tokens:
            with torch.no_grad():
                assert token == int(model(torch.tensor([tokens])).logits[0, -1].argmax())
            tokens.append(token)


def test_every_token_and_every_end_is_reported_once(decoder: Decoder, sampled: list[Response]) -> None:
    heard: list[tuple[int, int]] = []
    run(decoder, batch_size=8, on_tokens=lambda ended, tokens: heard.append((ended, tokens)))
    assert sum(ended for ended, _ in heard) == len(sampled)
    assert sum(tokens for _, tokens in heard) == sum(len(r.tokens) for r in sampled)


def test_first_tokens_follow_the_models_distribution(checkpoint: Make, decoder: Decoder) -> None:
    """Chi-square of 4000 first tokens of one prompt against transformers' softmax."""
    model = checkpoint("llama-grouped")[1]
    drawn = run(decoder, PROMPTS[:1], 4000, max_new_tokens=1, batch_size=4000)
    with torch.no_grad():
        expected = model(torch.tensor(PROMPTS[:1])).logits[0, -1].softmax(-1).double().numpy() * 4000
    counts = np.bincount([r.tokens[0] for r in drawn], minlength=VOCABULARY)
    common = expected >= 5
    assert common.sum() >= 5
    chi_square = ((counts - expected) ** 2 / expected)[common].sum()
    assert chi_square < common.sum() + 4 * (2 * common.sum()) ** 0.5
