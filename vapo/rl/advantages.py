"""Advantages and value targets over ragged rows: GAE with a lambda per response, decoupled.

Axes: B responses, N all tokens of all responses; row i holds tokens offsets[i]:offsets[i+1], as they lie in Arrow.
values[t] is V before token t is emitted, the reward sits on a response's last token, gamma is 1 and V after the last
token is 0. Nothing is padded, so a response's own length is the only one there is.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import njit

ALONE = 1 << 16  # fewer tokens than this are not worth a second thread


def length_adaptive_lambda(lengths: np.ndarray, alpha: float) -> np.ndarray:
    """lambda_policy[i] = 1 - 1 / (alpha * lengths[i]), clamped to [0, 1]: [B] float64.

    VAPO (arXiv 2504.05118) section 4.2.1, from sum_t lambda^t ~ 1 / (1 - lambda) = alpha * length. The paper is
    silent on alpha * length <= 1, where the formula leaves [0, 1] (-19 at length 1 and alpha 0.05): we clamp, so
    that very short responses get pure TD errors. A response of length 0 gets 0.
    """
    raw = 1.0 - 1.0 / np.maximum(alpha * np.asarray(lengths, np.float64), 1e-12)
    return np.clip(raw, 0.0, 1.0)


def decoupled_gae(
    values: np.ndarray,
    offsets: np.ndarray,
    rewards: np.ndarray,
    lambda_policy: np.ndarray | float,
    lambda_critic: float,
    mask: np.ndarray | None = None,
    threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages [N] at lambda_policy and value targets [N] at lambda_critic, both float32, in one pass.

    delta[t] = r[t] + V[t+1] - V[t]; A[t] = delta[t] + lambda_policy * A[t+1] (GAE, arXiv 1506.02438, equation 16);
    target[t] = V[t] + C[t] with C[t] = delta[t] + lambda_critic * C[t+1]: the critic's targets have their own lambda
    and never come from the policy's advantages (VC-PPO, arXiv 2503.01491, section 3.2; VAPO section 4.1.2). With
    lambda_critic = 1 they are exactly the rewards, the Monte-Carlo returns. The recursions run in float64.

    Args:
        values: [N] float32, V before each token.
        offsets: [B+1].
        rewards: [B], given on the last token of each response.
        lambda_policy: [B], one per response (VAPO section 4.2.1), or a scalar for all.
        lambda_critic: a scalar.
        mask: [N] bool, the response_mask: a token that is False is no action. It is stepped over, whatever its
            value (NaN included), and gets 0 and 0; the reward sits on the last token that is one.
        threads: how many work side by side; None: one per core.
    """
    advantages, targets = np.empty(len(values), np.float32), np.empty(len(values), np.float32)
    _in_threads(values, offsets, rewards, lambda_policy, lambda_critic, mask, advantages, targets, threads)
    return advantages, targets


def gae(
    values: np.ndarray,
    offsets: np.ndarray,
    rewards: np.ndarray,
    lambdas: np.ndarray | float,
    mask: np.ndarray | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """The advantages [N] of `decoupled_gae` alone; `lambdas` is [B] or a scalar."""
    out = np.empty(len(values), np.float32)
    _in_threads(values, offsets, rewards, lambdas, 1.0, mask, out, None, threads)
    return out


def whiten(advantages: np.ndarray) -> np.ndarray:
    """(A - mean) / std over all tokens of the batch: [N]; unchanged scale when there is no variance."""
    if not len(advantages):
        return advantages.astype(np.float32)
    # In float64: float32's rounding gives equal advantages a spread of their own, and dividing by it makes them +-1.
    centred = advantages - advantages.mean(dtype=np.float64)
    spread = float(np.sqrt(np.mean(centred**2)))
    return (centred / spread if spread > 1e-8 else centred).astype(np.float32)


def _in_threads(
    values: np.ndarray,
    offsets: np.ndarray,
    rewards: np.ndarray,
    lambda_policy: np.ndarray | float,
    lambda_critic: float,
    mask: np.ndarray | None,
    advantages: np.ndarray,
    targets: np.ndarray | None,
    threads: int | None,
) -> None:
    """Cut the rows into parts of about as many tokens; the kernel lets go of the interpreter's lock."""
    assert offsets[0] == 0
    assert offsets[-1] == len(values)
    assert mask is None or len(mask) == len(values)
    lambdas = np.broadcast_to(np.asarray(lambda_policy, np.float64), rewards.shape)
    threads = threads or os.cpu_count() or 1
    parts = 1 if threads == 1 or len(values) < ALONE else 4 * threads
    cuts = np.searchsorted(offsets, np.linspace(0, len(values), parts + 1)[1:-1])
    bounds = [0, *cuts.tolist(), len(rewards)]

    def part(first: int, last: int) -> None:
        _gae(values, offsets, rewards, lambdas, float(lambda_critic), mask, advantages, targets, first, last)

    if parts == 1:
        part(0, len(rewards))
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, bounds[:-1], bounds[1:]))


# "contract": one fused multiply-add per step, rounded once; the loop waits for it, so it sets the speed.
@njit(cache=True, nogil=True, fastmath={"contract"})
def _gae(  # type: ignore[no-untyped-def]
    values, offsets, rewards, lambdas, lambda_critic, mask, advantages, targets, first, last
):
    monte_carlo = lambda_critic == 1.0
    for row in range(first, last):
        start, end, lambda_policy = offsets[row], offsets[row + 1], lambdas[row]
        reward, following_value = np.float64(rewards[row]), np.float64(0.0)
        advantage, towards_target = np.float64(0.0), np.float64(0.0)
        for t in range(end - 1, start - 1, -1):
            if mask is not None and not mask[t]:
                advantages[t] = 0.0
                if targets is not None:
                    targets[t] = 0.0
                continue
            value = np.float64(values[t])
            delta = reward + following_value - value
            advantage = delta + lambda_policy * advantage
            advantages[t] = advantage
            if targets is not None:
                towards_target = delta + lambda_critic * towards_target
                # A Monte-Carlo return is the reward itself: the recursion would leave 1e-17 of a reward of 0.
                targets[t] = rewards[row] if monte_carlo else value + towards_target
            following_value, reward = value, np.float64(0.0)
