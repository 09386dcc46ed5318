"""Advantages and value targets of a rollout: ours over ragged rows against the loop over padded time steps of peers."""

import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from vapo.rl.advantages import decoupled_gae, length_adaptive_lambda

RESPONSES, MEAN, LONGEST = 8192, 2000, 16384
ALPHA = 0.05
REPEATS = 9
SAMPLE = 32  # rows that are checked against the direct sum, which takes T^2 steps
FLOOR = 1e-3  # an error below this share of the reward is none: the advantages cross 0

Batch = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # values, offsets, rewards, lambdas of the policy


def main() -> int:
    """Print the table of speed, memory and error; 1 if one of the limits is missed."""
    extra = extra_memory()  # first: a child's peak starts at its parent's size
    values, offsets, _, lambdas = batch = make_batch()
    lengths = np.diff(offsets)
    outputs = 2 * values.nbytes
    # Before the padded loop: the memory that it gives back would not be fresh.
    times = {critic: time_ours(batch, critic) for critic in (0.95, 1.0)}
    padded = pad(*batch[:3])

    console = Console(width=120)
    console.print(
        f"{RESPONSES:,} responses, {len(values):,} tokens: mean {lengths.mean():,.0f}, longest {lengths.max():,}; "
        f"{len(values) / padded[0].numel():.0%} of the padded cells are real. {len(os.sched_getaffinity(0))} cores."
    )
    console.print("Reading and writing: the values once, two outputs of their size, fresh, by one thread of numpy.")
    table = Table(box=None)
    for name in (
        "lambda_critic",
        "ours",
        "one thread",
        "read, write",
        "padded loop",
        "times faster",
        "times read, write",
        "extra memory / outputs",
        "relative error",
    ):
        table.add_column(name, justify="right")
    missed = False
    for lambda_critic, (ours, alone, copying) in times.items():
        loop = padded_decoupled_gae(*padded, lambdas, lambda_critic)
        share, error = extra / outputs, largest_error(batch, lambda_critic)
        missed |= loop / ours < 40 or ours / copying > 3 or share >= 1 or error > 1e-5
        table.add_row(
            f"{lambda_critic}",
            f"{ours:.3f} s",
            f"{alone:.3f} s",
            f"{copying:.3f} s",
            f"{loop:.1f} s",
            f"{loop / ours:.0f}",
            f"{ours / copying:.2f}",
            f"{share:.3f}",
            f"{error:.0e}",
        )
    table.add_row("limit", "", "", "", "", ">= 40", "<= 3", "< 1", "<= 1e-05")
    console.print(table)
    return int(missed)


def make_batch() -> Batch:
    """Heavy-tailed lengths, as a model that reasons has them: lognormal with mean MEAN, the longest LONGEST."""
    generator = np.random.default_rng(0)
    drawn = generator.lognormal(sigma=1.0, size=RESPONSES)
    lengths = np.clip(drawn * MEAN / drawn.mean(), 1, LONGEST).astype(np.int64)
    for _ in range(5):  # clipping took from the mean: give it back
        lengths = np.clip(lengths * MEAN / lengths.mean(), 1, LONGEST).astype(np.int64)
    lengths[lengths.argmax()] = LONGEST
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = generator.standard_normal(offsets[-1], np.float32)
    rewards = generator.choice(np.array([-1.0, 1.0], np.float32), RESPONSES)
    return values, offsets, rewards, length_adaptive_lambda(lengths, ALPHA)


def pad(
    values: np.ndarray, offsets: np.ndarray, rewards: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, rewards and mask as peers hold them: [B, T_max] float32, right-padded with 0."""
    lengths = np.diff(offsets)
    mask = np.arange(lengths.max()) < lengths[:, None]
    padded_values, padded_rewards = np.zeros(mask.shape, np.float32), np.zeros(mask.shape, np.float32)
    padded_values[mask] = values
    padded_rewards[np.arange(len(lengths)), lengths - 1] = rewards
    return torch.from_numpy(padded_values), torch.from_numpy(padded_rewards), torch.from_numpy(mask).float()


def padded_decoupled_gae(
    values: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor, lambdas: np.ndarray, lambda_critic: float
) -> float:
    """Seconds that the padded loop takes for both lambdas, each in a pass of its own."""
    start = time.perf_counter()
    advantages = padded_gae(values, rewards, mask, torch.from_numpy(lambdas).float())
    targets = padded_gae(values, rewards, mask, torch.full((len(values),), lambda_critic)) + values
    seconds = time.perf_counter() - start
    assert advantages.shape == targets.shape
    return seconds


def padded_gae(values: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor, lambdas: torch.Tensor) -> torch.Tensor:
    """GAE as verl, OpenRLHF and TRL write it: a step for each column of [B, T_max], all rows at once."""
    following_value = following = torch.zeros(len(values))
    reversed_advantages = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + following_value - values[:, t]
        advantage = delta + lambdas * following
        following_value = values[:, t] * mask[:, t] + (1 - mask[:, t]) * following_value
        following = advantage * mask[:, t] + (1 - mask[:, t]) * following
        reversed_advantages.append(following)
    return torch.stack(reversed_advantages[::-1], dim=1)


def read_once_write_twice(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least that any way does: the second copy of a block finds it in the cache."""
    first, second = np.empty_like(values), np.empty_like(values)
    for start in range(0, len(values), 1 << 16):
        block = slice(start, start + (1 << 16))
        np.copyto(first[block], values[block])
        np.copyto(second[block], values[block])
    return first, second


def time_ours(batch: Batch, lambda_critic: float) -> list[float]:
    """Seconds of `decoupled_gae`, of the same on one thread, and of reading and writing alone."""
    ours = partial(decoupled_gae, *batch, lambda_critic)
    return median_times(ours, partial(ours, threads=1), partial(read_once_write_twice, batch[0]))


def median_times(*functions: Callable[[], object]) -> list[float]:
    """Median seconds of REPEATS calls of each, after one that warms up; in turns, so that all see the same machine."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(1 + REPEATS):
        for function, found in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function()
            found.append(time.perf_counter() - start)
    return [statistics.median(found[1:]) for found in seconds]


def extra_memory() -> int:
    """Bytes that `decoupled_gae` needs at its peak beyond its two outputs, seen in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_extra_memory).result()


def _extra_memory() -> int:
    values, offsets, rewards, lambdas = batch = make_batch()
    decoupled_gae(values[: offsets[2]], offsets[:3], rewards[:2], lambdas[:2], 0.95)  # compiles
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    outputs = decoupled_gae(*batch, 0.95)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(0, peak - before - sum(part.nbytes for part in outputs))


def largest_error(batch: Batch, lambda_critic: float) -> float:
    """The largest relative error of advantages and targets against the definition's sum in float64, on a sample."""
    values, offsets, rewards, lambdas = batch
    advantages, targets = decoupled_gae(*batch, lambda_critic)
    lengths = np.diff(offsets)
    worst = 0.0
    for row in [int(lengths.argmax()), *np.random.default_rng(1).integers(0, RESPONSES, SAMPLE).tolist()]:
        here = slice(offsets[row], offsets[row + 1])
        exact = values[here].astype(np.float64)
        for found, expected in (
            (advantages[here], direct_sum(exact, rewards[row], lambdas[row])),
            (targets[here], exact + direct_sum(exact, rewards[row], lambda_critic)),
        ):
            worst = max(worst, float((np.abs(found - expected) / np.maximum(np.abs(expected), FLOOR)).max()))
    return worst


def direct_sum(values: np.ndarray, reward: float, lambda_: float) -> np.ndarray:
    """A[t] = sum over k of lambda^k * delta[t+k], term by term: no recursion."""
    delta = np.append(values[1:], reward) - values
    powers = lambda_ ** np.arange(len(values))
    return np.array([delta[t:] @ powers[: len(values) - t] for t in range(len(values))])


if __name__ == "__main__":
    sys.exit(main())
