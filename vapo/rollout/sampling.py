"""Choosing the next token: one uniform number per request and step, whatever else is in the batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MOST_LIKELY = 512  # tokens among which the nucleus is looked for first
ROUNDING = 1e-5  # of a sum of so many probabilities, and more
_GAMMA, _M1, _M2 = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea, Flood 2014): uint64 [B] -> uint64 [B]."""
    with np.errstate(over="ignore"):
        x = x + _GAMMA
        x = (x ^ (x >> np.uint64(30))) * _M1
        x = (x ^ (x >> np.uint64(27))) * _M2
        return x ^ (x >> np.uint64(31))


def uniform(seeds: np.ndarray, step: int) -> Tensor:
    """One number in [0, 1) per request, a function of its seed and the step alone: [B] float32."""
    with np.errstate(over="ignore"):
        bits = mix(mix(seeds) + np.uint64(step)) >> np.uint64(40)
    return torch.from_numpy(bits.astype(np.float32) * np.float32(2.0**-24))


def sample(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
    """Tokens [B] by inverse CDF of softmax(logits / temperature) cut to its top_p nucleus; logits [B, V].

    Temperature 0 is greedy. The nucleus is the smallest set of most likely tokens with mass >= top_p.
    """
    if temperature == 0.0:
        return logits.argmax(-1)
    probabilities = (logits if temperature == 1.0 else logits / temperature).softmax(-1)
    if top_p < 1.0:
        return _from_nucleus(probabilities, uniforms, top_p)
    return _inverse_cdf(probabilities, uniforms)


def _from_nucleus(probabilities: Tensor, uniforms: Tensor, top_p: float) -> Tensor:
    """A token [B] of each row's nucleus; equally likely tokens rank by their index.

    Sorting a large vocabulary would take longer than the model: first a few of the most likely tokens are looked at.
    They will do where those above the least likely of them (its equals may be outside) have the mass; for the other
    rows all are sorted, so that a row's token does not depend on the other rows.
    """
    if probabilities.shape[-1] > MOST_LIKELY:
        order = probabilities.topk(MOST_LIKELY, sorted=False).indices.sort(-1).values
        likely = probabilities.gather(-1, order)
        above = torch.where(likely > likely.amin(-1, keepdim=True), likely, 0.0)
        enough = above.sum(-1) > top_p + ROUNDING
        chosen = order.gather(-1, _ranked(likely, uniforms, top_p)[:, None])[:, 0]
        rest = ~enough
        if rest.any():
            chosen[rest] = _ranked(probabilities[rest], uniforms[rest], top_p)
        return chosen
    return _ranked(probabilities, uniforms, top_p)


def _ranked(probabilities: Tensor, uniforms: Tensor, top_p: float) -> Tensor:
    """An index [B] of the smallest set of the largest probabilities [B, N] with mass >= top_p."""
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
    ranked = torch.where(ranked.cumsum(-1) - ranked < top_p, ranked, 0.0)
    return order.gather(-1, _inverse_cdf(ranked, uniforms)[:, None])[:, 0]


def _inverse_cdf(mass: Tensor, uniforms: Tensor) -> Tensor:
    """The first index at which the running sum of `mass` [B, V] passes uniform * total: [B]; never one without mass."""
    cdf = mass.cumsum(-1)
    index = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)[:, 0]
    beyond = index >= mass.shape[-1]
    if not beyond.any():
        return index
    # Rounding may run past the last one; to look for it in every row would take longer than the rest.
    last = mass.shape[-1] - 1 - (mass[beyond].flip(-1) > 0).int().argmax(-1)
    return index.index_put((beyond,), last)
