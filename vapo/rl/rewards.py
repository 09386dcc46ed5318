"""Shaping of rewards, apart from correctness."""

from __future__ import annotations

import numpy as np


def soft_overlong(lengths: np.ndarray, longest: int, cache: int) -> np.ndarray:
    """What a response's length adds to its reward: [B] float64 in [-1, 0].

    0 if l <= L_max - L_cache; ((L_max - L_cache) - l) / L_cache if L_max - L_cache < l <= L_max; -1 above. DAPO
    (arXiv 2503.14476) section 3.4, equation 13.

    Args:
        lengths: [B], response lengths l in tokens.
        longest: L_max, tokens.
        cache: L_cache, tokens: the stretch before L_max over which the punishment grows.
    """
    return np.clip((longest - cache - np.asarray(lengths, np.float64)) / cache, -1.0, 0.0)
