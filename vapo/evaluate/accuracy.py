"""The evaluation stage: avg@k and pass@k over held-out problems."""

from __future__ import annotations

from math import comb
from pathlib import Path

import numpy as np
import pyarrow as pa

from vapo import recipe
from vapo.schemas import EVALUATION, PROMPTS, REWARDS, ROLLOUTS
from vapo.tables import check_joined, flat, ragged, read_table, write_table


def evaluation(
    section: recipe.Evaluation, *, prompts: Path, rollouts: Path, rewards: Path, evaluation: Path, iteration: int
) -> dict[str, float]:
    """Write EVALUATION, one row per prompt; returns accuracy (avg@k), pass@k for k = 1, 2, 4 ... and lengths."""
    del section, iteration  # name the task in records and progress; sampling was the rollout's
    table, graded = read_table(rollouts, ROLLOUTS), read_table(rewards, REWARDS)
    check_joined(rewards, graded, table)
    _, offsets = ragged(table, "response_tokens")
    lengths = np.diff(offsets)
    joined = pa.table(
        {"prompt_id": table["prompt_id"], "correct": graded["correct"].cast(pa.int32()), "length": lengths}
    )
    grouped = joined.group_by("prompt_id").aggregate([("correct", "count"), ("correct", "sum"), ("length", "mean")])
    grouped = grouped.sort_by("prompt_id")
    known = {row["prompt_id"]: row for row in read_table(prompts, PROMPTS).to_pylist()}
    ids = grouped["prompt_id"].to_pylist()
    written = write_table(
        evaluation,
        EVALUATION,
        {
            "prompt_id": ids,
            "family": [known[i]["family"] for i in ids],
            "difficulty": [known[i]["difficulty"] for i in ids],
            "samples": grouped["correct_count"].cast(pa.int32()),
            "correct": grouped["correct_sum"].cast(pa.int32()),
            "mean_length": grouped["length_mean"].cast(pa.float32()),
        },
    )
    samples, correct = flat(written, "samples"), flat(written, "correct")
    k = int(samples.min())
    return {
        "accuracy": avg_at_k(samples, correct),
        "samples_per_prompt": k,
        "problems": len(ids),
        **{f"pass_at_{n}": pass_at_k(samples, correct, n) for n in _powers_of_two(k)},
        "length_mean": float(lengths.mean()),
        "truncated_share": float(np.mean([reason == "length" for reason in table["finish_reason"].to_pylist()])),
    }


def avg_at_k(samples: np.ndarray, correct: np.ndarray) -> float:
    """Mean over prompts of the share of correct samples; both [P]."""
    return float(np.mean(correct / samples))


def pass_at_k(samples: np.ndarray, correct: np.ndarray, k: int) -> float:
    """Unbiased probability that one of k samples is correct, 1 - C(n - c, k) / C(n, k), mean over prompts [P].

    Chen et al., arXiv 2107.03374, equation 1.
    """
    return float(np.mean([1.0 - comb(int(n - c), k) / comb(int(n), k) for n, c in zip(samples, correct, strict=True)]))


def _powers_of_two(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length())]
