"""The CPU rollout engine: batched sampling in which each prompt is read once and finished rows leave the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vapo.rollout.decoder import Decoder
from vapo.rollout.sampling import sample, uniform

COMPACT = 0.75  # rows are dropped from the cache once fewer than this share are still running


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
    responses = [Response() for _ in range(len(prompts) * samples)]
    order = sorted(range(len(prompts)), key=lambda p: (len(prompts[p]), p))
    per_batch = max(1, batch_size // samples)
    for first in range(0, len(order), per_batch):
        chosen = order[first : first + per_batch]
        _generate_batch(
            decoder,
            [prompts[p] for p in chosen],
            [responses[p * samples + k] for p in chosen for k in range(samples)],
            np.array([seeds[p * samples + k] for p in chosen for k in range(samples)], np.uint64),
            samples,
            max_new_tokens,
            temperature,
            top_p,
            stop_token,
            on_tokens,
        )
    return responses


@torch.inference_mode()
def _generate_batch(
    decoder: Decoder,
    prompts: list[Sequence[int]],
    responses: list[Response],
    seeds: np.ndarray,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stop_token: int,
    on_tokens: Callable[[int, int], None],
) -> None:
    width = max(len(p) for p in prompts)
    padding = torch.tensor([width - len(p) for p in prompts])
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
    cache = decoder.new_cache(padding, width)
    logits = decoder.forward(tokens, cache)
    repeat = torch.arange(len(prompts)).repeat_interleave(samples)
    cache.select(repeat)
    logits = logits[repeat]
    room = min(max_new_tokens, 64)
    decoder.grow(cache, width + room)
    live = np.arange(len(responses))  # the response that each row of the cache belongs to
    running = np.ones(len(responses), bool)
    for step in range(max_new_tokens):
        chosen = sample(logits, uniform(seeds[live], step), temperature, top_p)
        logprobs = logits.float().log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
        ended, sampled = 0, 0
        for row, (token, logprob) in enumerate(zip(chosen.tolist(), logprobs.tolist(), strict=True)):
            index = live[row]
            if not running[index]:
                continue
            response = responses[index]
            response.tokens.append(token)
            response.logprobs.append(logprob)
            sampled += 1
            if token == stop_token:
                response.finish_reason = "stop"
                running[index] = False
                ended += 1
        on_tokens(ended, sampled)
        still = running[live]
        if not still.any() or step == max_new_tokens - 1:
            break
        if still.mean() < COMPACT:
            keep = torch.from_numpy(np.flatnonzero(still))
            cache.select(keep)
            chosen, live = chosen[keep], live[still]
        if cache.length == cache.keys[0].shape[2]:
            decoder.grow(cache, min(cache.length * 2, width + max_new_tokens))
        logits = decoder.forward(chosen[:, None], cache)
    on_tokens(int(running.sum()), 0)
