"""Numbers that tell whether training is healthy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def explained_variance(values: np.ndarray, targets: np.ndarray) -> float | None:
    """1 - Var(targets - values) / Var(targets) over all tokens [N]; None, undefined, when all targets are equal."""
    different = len(targets) > 0 and np.ptp(targets) != 0  # rounding may give equal targets a variance
    spread = float(np.var(targets, dtype=np.float64)) if different else 0.0
    if spread == 0.0:
        return None
    return 1.0 - float(np.var(targets.astype(np.float64) - values)) / spread


def clipped_tokens(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[int, int]:
    """How many of n tokens the lower and the upper clip holds back (no gradient): (low, high)."""
    ratio = (logprobs - old_logprobs).exp()
    low = (ratio < 1.0 - clip_low) & (advantages < 0)
    high = (ratio > 1.0 + clip_high) & (advantages > 0)
    return int(low.sum()), int(high.sum())


def dual_clipped_tokens(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, dual_clip: float) -> int:
    """How many of n tokens the dual clip holds back (no gradient)."""
    return int((((logprobs - old_logprobs).exp() > dual_clip) & (advantages < 0)).sum())


def approx_kl(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Sum over n tokens of (r - 1) - log r, r = exp(logprobs - old_logprobs): never negative (Schulman's k3).

    Tokens come from the old policy, so this estimates KL(old policy || policy).
    """
    log_ratio = logprobs - old_logprobs
    return (torch.expm1(log_ratio) - log_ratio).sum()
