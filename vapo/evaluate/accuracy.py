"""The evaluation stage: avg@k, pass@k and cons@k over held-out problems, with confidence intervals, per family too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from vapo import recipe
from vapo.errors import UserError
from vapo.evaluate.bootstrap import intervals
from vapo.evaluate.measures import avg_at_k, cons_at_k, leaders, normal, pass_at_k
from vapo.schemas import EVALUATION, PROMPTS, REWARDS, ROLLOUTS
from vapo.seeds import derive
from vapo.tables import check_joined, flat, ragged, read_table, write_table

Measures = dict[str, np.ndarray]  # name -> its value for each prompt [P]; a metric is their mean


def evaluation(
    section: recipe.Evaluation,
    *,
    prompts: Path,
    rollouts: Path,
    rewards: Path,
    evaluation: Path,
    iteration: int,
    seed: int,
) -> dict[str, float]:
    """Write EVALUATION, one row per prompt; returns the means over prompts of what is measured.

    Those are accuracy (avg@k), pass_at_K and cons_at_K for K = 1, 2, 4 ... and k, length_mean and truncated_share,
    each with its interval's ends: accuracy_low, accuracy_high. An undefined interval is left out, and so are all
    cons_at_K if the grader calls a response correct without saying its answer. Where there are several families they
    follow as, say, accuracy_low/chain, with the largest K alone.

    Raises:
        UserError: tables that do not join.
    """
    del iteration  # names the task in records and progress
    table, graded = read_table(rollouts, ROLLOUTS), read_table(rewards, REWARDS)
    check_joined(rewards, graded, table)
    # Rows in order of prompt and sample, so that nothing depends on the order in which prompts were sampled.
    ids, of_row = np.unique(np.array(table["prompt_id"].to_pylist(), object), return_inverse=True)
    order = np.lexsort((flat(table, "sample_index"), of_row))
    samples = np.bincount(of_row)
    verdicts = flat(graded, "correct")[order]
    answers = [normal(text) for text in graded["extracted"].take(pa.array(order)).to_pylist()]
    cut = np.array([reason == "length" for reason in table["finish_reason"].to_pylist()], bool)[order]
    lengths = np.diff(ragged(table, "response_tokens")[1])[order]
    starts = np.append(0, np.cumsum(samples)[:-1])
    correct, truncated, tokens = (np.add.reduceat(a.astype(np.int64), starts) for a in (verdicts, cut, lengths))
    ends = starts + samples
    votes = [(answers[a:b], verdicts[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]
    known = _known(prompts, ids, rollouts)
    families = np.array([row["family"] for row in known], object)
    leading = [leaders(found) for found, _ in votes]
    write_table(
        evaluation,
        EVALUATION,
        {
            "prompt_id": ids.tolist(),
            "family": families.tolist(),
            "difficulty": [row["difficulty"] for row in known],
            "samples": samples,
            "correct": correct,
            "truncated": truncated,
            "majority": [found[0] if len(found) == 1 else "" for found in leading],
            "mean_length": tokens / samples,
        },
    )

    k = int(samples.min())
    measured: Measures = {"accuracy": avg_at_k(samples, correct)}
    voting = not any(verdict and not answer for verdict, answer in zip(verdicts, answers, strict=True))
    for size in _sizes(k):
        measured[f"pass_at_{size}"] = pass_at_k(samples, correct, size)
        if voting:
            measured[f"cons_at_{size}"] = np.array([cons_at_k(*vote, size) for vote in votes])
    measured |= {"length_mean": tokens / samples, "truncated_share": truncated / samples}
    found = {"samples_per_prompt": k, "confidence": section.confidence, **_means(section, measured, seed)}
    names = sorted(set(families))
    if len(names) > 1:
        shown = [name for name in measured if "_at_" not in name or name.endswith(f"_at_{k}")]
        for family in names:
            rows = families == family
            found |= _means(section, {name: measured[name][rows] for name in shown}, seed, f"/{family}")
    return found


def _means(section: recipe.Evaluation, measured: Measures, seed: int, suffix: str = "") -> dict[str, float]:
    """The number of prompts, and every measure's mean with the ends of its interval, as metrics."""
    generator = np.random.default_rng(derive(seed, "evaluation", "intervals", suffix))
    values = np.stack(list(measured.values()), axis=1)
    ends = intervals(values, confidence=section.confidence, resamples=section.resamples, generator=generator)
    found: dict[str, float] = {f"problems{suffix}": len(values)}
    for (name, of_prompts), low, high in zip(measured.items(), *ends, strict=True):
        found[f"{name}{suffix}"] = float(np.mean(of_prompts))
        if np.isfinite(low):
            found |= {f"{name}_low{suffix}": float(low), f"{name}_high{suffix}": float(high)}
    return found


def _known(prompts: Path, ids: np.ndarray, rollouts: Path) -> list[dict[str, object]]:
    """The rows of PROMPTS with these IDs, in order."""
    rows = {row["prompt_id"]: row for row in read_table(prompts, PROMPTS).to_pylist()}
    if unknown := next((prompt_id for prompt_id in ids if prompt_id not in rows), None):
        raise UserError(f"{rollouts}: column prompt_id: {unknown!r} is not in {prompts}")
    return [rows[prompt_id] for prompt_id in ids]


def _sizes(k: int) -> list[int]:
    """The powers of two below k, and k."""
    return [2**i for i in range(k.bit_length()) if 2**i < k] + [k]
