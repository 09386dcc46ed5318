"""Generalised advantage estimation over ragged rows, with a lambda per response.

Axes: B responses, N all tokens of all responses; row i holds tokens offsets[i]:offsets[i+1]. values[t] is V before
token t is emitted, the reward sits on a response's last token, gamma is 1 and V after the last token is 0.
"""

from __future__ import annotations

import numpy as np
from numba import njit


def length_adaptive_lambda(lengths: np.ndarray, alpha: float) -> np.ndarray:
    """lambda_policy[i] = 1 - 1 / (alpha * lengths[i]), clamped to [0, 1]: [B] float64.

    VAPO (arXiv 2504.05118) section 4.2.1, from sum_t lambda^t ~ 1 / (1 - lambda) = alpha * length. The paper is
    silent on alpha * length <= 1, where the formula leaves [0, 1] (-19 at length 1 and alpha 0.05): we clamp, so
    that very short responses get pure TD errors. A response of length 0 gets 0.
    """
    raw = 1.0 - 1.0 / np.maximum(alpha * np.asarray(lengths, np.float64), 1e-12)
    return np.clip(raw, 0.0, 1.0)


def gae(values: np.ndarray, offsets: np.ndarray, rewards: np.ndarray, lambdas: np.ndarray | float) -> np.ndarray:
    """A[t] = delta[t] + lambda * A[t+1] with delta[t] = r[t] + V[t+1] - V[t]: advantages [N] float32.

    GAE (arXiv 1506.02438) equation 16 with gamma = 1; the recursion runs in float64.

    Args:
        values: [N], V before each token.
        offsets: [B+1].
        rewards: [B], given on the last token of each response.
        lambdas: [B], one per response (VAPO section 4.2.1), or a scalar for all.
    """
    per_row = np.broadcast_to(np.asarray(lambdas, np.float64), rewards.shape)
    out = np.empty(len(values), np.float32)
    _gae(values, offsets, rewards, per_row, out)
    return out


def value_targets(values: np.ndarray, offsets: np.ndarray, rewards: np.ndarray, lambda_critic: float) -> np.ndarray:
    """values + GAE at lambda_critic: [N] float32; with lambda_critic = 1 exactly the Monte-Carlo return.

    Decoupled GAE, VC-PPO (arXiv 2503.01491) section 3.2: the critic's targets come from their own lambda, never from
    the policy's advantages.
    """
    if lambda_critic == 1.0:
        return np.repeat(rewards, np.diff(offsets)).astype(np.float32)
    return (values + gae(values, offsets, rewards, lambda_critic)).astype(np.float32)


def whiten(advantages: np.ndarray) -> np.ndarray:
    """(A - mean) / std over all tokens of the batch: [N]; unchanged scale when there is no variance."""
    if not len(advantages):
        return advantages.astype(np.float32)
    # In float64: float32's rounding gives equal advantages a spread of their own, and dividing by it makes them +-1.
    centred = advantages - advantages.mean(dtype=np.float64)
    spread = float(np.sqrt(np.mean(centred**2)))
    return (centred / spread if spread > 1e-8 else centred).astype(np.float32)


@njit(cache=True)
def _gae(values, offsets, rewards, lambdas, out):  # type: ignore[no-untyped-def]
    for row in range(len(offsets) - 1):
        start, end = offsets[row], offsets[row + 1]
        following_value = np.float64(0.0)
        following_advantage = np.float64(0.0)
        reward = np.float64(rewards[row])
        for t in range(end - 1, start - 1, -1):
            value = np.float64(values[t])
            following_advantage = reward + following_value - value + lambdas[row] * following_advantage
            out[t] = following_advantage
            following_value = value
            reward = np.float64(0.0)
