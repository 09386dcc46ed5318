"""The verification stage: every response is graded on its text, and its reward follows from the verdict."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from vapo import recipe
from vapo.errors import UserError
from vapo.problems.grading import answer_line
from vapo.progress import Progress
from vapo.rl.rewards import soft_overlong
from vapo.schemas import PROMPTS, REWARDS, ROLLOUTS
from vapo.tables import ragged, read_table, write_table


def verification(
    section: recipe.Verification, *, prompts: Path, rollouts: Path, rewards: Path, iteration: int, purpose: str
) -> dict[str, float]:
    """Write REWARDS [B] for ROLLOUTS [B]; returns accuracy, mean reward and the count of every verdict."""
    known = read_table(prompts, PROMPTS)
    truth = dict(zip(known["prompt_id"].to_pylist(), known["ground_truth"].to_pylist(), strict=True))
    sampled = read_table(rollouts, ROLLOUTS)
    table = sampled.select(["rollout_id", "prompt_id", "response", "finish_reason"])
    progress = Progress("responses graded", len(table))
    verdicts = []
    for row in table.to_pylist():
        if row["prompt_id"] not in truth:
            raise UserError(f"{rollouts}: column prompt_id: {row['prompt_id']!r} is not in {prompts}")
        verdicts.append(answer_line(row["response"], truth[row["prompt_id"]], row["finish_reason"]))
        if len(verdicts) % 1000 == 0:
            progress(len(verdicts), 1000, "responses")
    values = np.array([section.reward_correct if v.correct else section.reward_wrong for v in verdicts])
    punished = np.zeros(len(values))
    if section.overlong_tokens:  # added to the reward; what is correct stays correct
        lengths = np.diff(ragged(sampled, "response_tokens")[1])
        punished = soft_overlong(lengths, section.overlong_tokens, section.overlong_cache)
    write_table(
        rewards,
        REWARDS,
        {
            "rollout_id": table["rollout_id"],
            "correct": [v.correct for v in verdicts],
            "reward": values + punished,
            "extracted": [v.extracted for v in verdicts],
            "verdict": [v.why for v in verdicts],
        },
    )
    counts = Counter(v.why for v in verdicts)
    return {
        "accuracy": sum(v.correct for v in verdicts) / max(len(verdicts), 1),
        "reward_mean": float((values + punished).mean()) if len(values) else 0.0,
        **({"overlong_share": float((punished < 0).sum()) / max(len(punished), 1)} if section.overlong_tokens else {}),
        **{f"verdict_{why}": counts[why] for why in ("matched", "different", "no_answer", "truncated")},
    }
