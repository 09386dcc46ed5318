"""What the responses to one prompt say about one another: advantages and a baseline without a critic.

Axes: B responses, P groups; `groups` [B] holds integers from 0, say the index of the prompt, and a group's rows may lie
anywhere.
"""

from __future__ import annotations

import numpy as np


def group_normalised(rewards: np.ndarray, groups: np.ndarray, *, divide_by_std: bool) -> np.ndarray:
    """(R - mean of its group) / std of its group, one per response: [B] float32.

    GRPO (arXiv 2402.03300) section 4.1.2; without the division Dr.GRPO (arXiv 2503.20783) section 3.2. The papers are
    silent on the kind of std: ours is the population's. A group of one, or one whose rewards are equal, gets 0.

    Args:
        rewards: [B].
        groups: [B].
    """
    rewards = np.asarray(rewards, np.float64)
    assert np.isfinite(rewards).all()
    counts = np.bincount(groups)
    lowest, highest = np.full(len(counts), np.inf), np.full(len(counts), -np.inf)
    np.minimum.at(lowest, groups, rewards)
    np.maximum.at(highest, groups, rewards)
    differ = (highest > lowest)[groups]  # not std > 0: the mean of equal rewards may be off by a rounding error
    centred = np.where(differ, rewards - group_mean(rewards, groups), 0.0)
    if divide_by_std:
        std = np.sqrt(np.bincount(groups, centred**2) / np.maximum(counts, 1))[groups]
        centred = np.divide(centred, std, out=centred, where=differ)
    return centred.astype(np.float32)


def group_mean(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The mean reward of each response's group, the baseline in a critic's place: [B] float64."""
    return (np.bincount(groups, rewards) / np.maximum(np.bincount(groups), 1))[groups]


def informative_groups(correct: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Which groups hold both correct and wrong responses: [P] bool (dynamic sampling, DAPO section 3.2).

    `correct` [B] bool is the verdict before any shaping, `groups` [B] as in `group_normalised`.
    """
    right = np.bincount(groups, correct)
    return (right > 0) & (right < np.bincount(groups))
