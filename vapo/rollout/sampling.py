"""Choosing the next token: one uniform number per request and step, whatever else is in the batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

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
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p < 1.0:
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        ranked = torch.where(ranked.cumsum(-1) - ranked < top_p, ranked, 0.0)
        chosen = _inverse_cdf(ranked, uniforms)
        return order.gather(-1, chosen[:, None])[:, 0]
    return _inverse_cdf(probabilities, uniforms)


def _inverse_cdf(mass: Tensor, uniforms: Tensor) -> Tensor:
    """The first index at which the running sum of `mass` [B, V] passes uniform * total: [B]; never one without mass."""
    cdf = mass.cumsum(-1)
    index = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)[:, 0]
    last = mass.shape[-1] - 1 - (mass.flip(-1) > 0).int().argmax(-1)  # rounding may run past the last one
    return torch.minimum(index, last)
