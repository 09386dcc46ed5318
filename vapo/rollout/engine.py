"""The CPU rollout engine: batched sampling in which each prompt is read once and finished rows leave the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vapo.rollout.decoder import Cache, Decoder
from vapo.rollout.sampling import sample, uniform

COMPACT = 0.75  # rows that ended are taken out once fewer than this share are still running
ROOM = 64  # columns that a cache begins with beyond the prompts; it doubles when they are full
READ_AT_ONCE = 2**15  # padded positions of prompts: what a layer makes of more would be larger than the cache


@dataclass
class Response:
    """Sampled tokens and their logprobs at temperature 1; finish_reason is "stop" or "length"."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = "length"


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    seeds: np.ndarray,
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stop_token: int,
    batch_size: int,
    on_tokens: Callable[[int, int], None] = lambda responses, tokens: None,
) -> list[Response]:
    """`samples` responses for each of P prompts, prompt-major: P * samples responses.

    Args:
        seeds: [P * samples] uint64, one per response: a response depends on its own seed, not on its neighbours'.
        on_tokens: called after every step with how many responses ended and how many tokens were sampled.
    """
    owners = [p for p in sorted(range(len(prompts)), key=lambda p: len(prompts[p])) for _ in range(samples)]
    places = np.array([p * samples + k % samples for k, p in enumerate(owners)], np.int64)
    responses = [Response() for _ in owners]
    for first in range(0, len(owners), batch_size):
        rows = slice(first, first + batch_size)
        found = _generate_batch(
            decoder,
            [prompts[p] for p in owners[rows]],
            seeds[places[rows]],
            max_new_tokens,
            temperature,
            top_p,
            stop_token,
            on_tokens,
        )
        for place, response in zip(places[rows], found, strict=True):
            responses[place] = response
    return responses


@torch.inference_mode()
def _generate_batch(
    decoder: Decoder,
    prompts: list[Sequence[int]],
    seeds: np.ndarray,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stop_token: int,
    on_tokens: Callable[[int, int], None],
) -> list[Response]:
    """One response to each of B prompts; the same object several times in a row is one prompt, read once."""
    new = np.array([i == 0 or prompt is not prompts[i - 1] for i, prompt in enumerate(prompts)])
    logits, cache = _read(decoder, [prompt for prompt, first in zip(prompts, new, strict=True) if first])
    repeat = torch.from_numpy(np.cumsum(new) - 1)
    logits = logits[repeat]
    width = cache.length
    cache.keep(repeat, width + min(max_new_tokens, ROOM))
    tokens = np.empty((len(prompts), max_new_tokens), np.int64)
    logprobs = np.empty((len(prompts), max_new_tokens), np.float32)
    lengths = np.full(len(prompts), max_new_tokens)
    stopped = np.zeros(len(prompts), bool)
    rows = np.arange(len(prompts))  # the response that each row of the cache belongs to
    for step in range(max_new_tokens):
        chosen = sample(logits, uniform(seeds[rows], step), temperature, top_p)
        tokens[rows, step] = chosen
        logprobs[rows, step] = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
        running = ~stopped[rows]
        ends = rows[running & (tokens[rows, step] == stop_token)]
        stopped[ends], lengths[ends] = True, step + 1
        on_tokens(len(ends), int(running.sum()))
        still = ~stopped[rows]
        if not still.any() or step == max_new_tokens - 1:
            break
        full, few = cache.length == cache.columns, still.mean() < COMPACT
        if full or few:
            left = np.flatnonzero(still) if few else np.arange(len(rows))
            columns = min(cache.length * 2, width + max_new_tokens) if full else cache.columns
            cache.keep(torch.from_numpy(left), columns)
            rows, chosen = rows[left], chosen[left]
        logits = decoder.forward(chosen[:, None], cache)
    on_tokens(int((~stopped).sum()), 0)
    return [
        Response(row[:length].tolist(), scores[:length].tolist(), "stop" if ended else "length")
        for row, scores, length, ended in zip(tokens, logprobs, lengths, stopped, strict=True)
    ]


def _read(decoder: Decoder, prompts: list[Sequence[int]]) -> tuple[Tensor, Cache]:
    """Logits [P, V] after each prompt, and the cache that holds them."""
    width = max(len(prompt) for prompt in prompts)
    padding = torch.tensor([width - len(prompt) for prompt in prompts])
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
    cache = decoder.new_cache(padding, width)
    for piece in tokens.split(max(1, READ_AT_ONCE // len(prompts)), 1):
        logits = decoder.forward(piece, cache)
    return logits, cache
