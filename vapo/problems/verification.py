"""The verification stage: every response is graded on its text, and its reward follows from the verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vapo import recipe
from vapo.errors import UserError
from vapo.problems.graders import Row, grade
from vapo.problems.grading import Verdict
from vapo.progress import Progress
from vapo.rl.rewards import soft_overlong
from vapo.schemas import PROMPTS, REWARDS, ROLLOUTS
from vapo.tables import ragged, read_table, write_table

ALWAYS = ("matched", "different", "no_answer", "truncated")  # counted by every grader; the others where they can occur
FAILED = ("time_out", "error")


def verification(
    section: recipe.Verification, *, prompts: Path, rollouts: Path, rewards: Path, iteration: int, purpose: str
) -> dict[str, float]:
    """Write REWARDS [B] for ROLLOUTS [B]; returns accuracy, mean reward and the count of every verdict.

    `correct` is the grader's and nothing shapes it; the reward is reward_correct or reward_wrong, plus the overlong
    punishment and the format's reward.

    Raises:
        UserError: a prompt that is not there, a ground truth that cannot be graded, a custom grader that is not
            there, or more than `max_error_share` of the answers ended in a time-out or an error.
    """
    known = read_table(prompts, PROMPTS)
    truth = dict(zip(known["prompt_id"].to_pylist(), known["ground_truth"].to_pylist(), strict=True))
    sampled = read_table(rollouts, ROLLOUTS)
    table = sampled.select(["rollout_id", "prompt_id", "response", "finish_reason"])
    progress = Progress("responses graded", len(table))
    rows, done = [], 0
    for row in table.to_pylist():
        if row["prompt_id"] not in truth:
            raise UserError(f"{rollouts}: column prompt_id: {row['prompt_id']!r} is not in {prompts}")
        rows.append(Row(row["response"], truth[row["prompt_id"]], row["finish_reason"]))

    def report(now: int) -> None:
        nonlocal done
        progress(now, now - done, "responses")
        done = now

    occurring = {prompt: truth[prompt] for prompt in dict.fromkeys(table["prompt_id"].to_pylist())}
    try:
        verdicts, formats, said = grade(section, rows, occurring, report)
    except UserError as error:
        raise UserError(f"{prompts}: {error}" if str(error).startswith("prompt_id") else str(error)) from None
    counts = Counter(v.why for v in verdicts)
    _refuse_noise(section, counts, verdicts, table["rollout_id"].to_pylist(), said)
    step = section.reward_correct - section.reward_wrong
    values = np.array(
        [section.reward_correct if v.correct else section.reward_wrong + v.partial * step for v in verdicts], np.float64
    )
    punished = np.zeros(len(values))
    if section.overlong_tokens:  # added to the reward; what is correct stays correct
        lengths = np.diff(ragged(sampled, "response_tokens")[1])
        punished = soft_overlong(lengths, section.overlong_tokens, section.overlong_cache)
    added = section.format_reward * np.array(formats, np.float64)
    write_table(
        rewards,
        REWARDS,
        {
            "rollout_id": table["rollout_id"],
            "correct": [v.correct for v in verdicts],
            "reward": values + punished + added,
            "extracted": [v.extracted for v in verdicts],
            "verdict": [v.why for v in verdicts],
        },
    )
    whys = ALWAYS if section.grader == "answer_line" else (*ALWAYS, "unparseable", *FAILED)
    return {
        "accuracy": sum(v.correct for v in verdicts) / max(len(verdicts), 1),
        "reward_mean": float((values + punished + added).mean()) if len(values) else 0.0,
        **({"overlong_share": float((punished < 0).sum()) / max(len(punished), 1)} if section.overlong_tokens else {}),
        **({"format_mean": float(added.mean()) if len(added) else 0.0} if section.format_reward else {}),
        **{f"verdict_{why}": counts[why] for why in whys},
    }


def _refuse_noise(
    section: recipe.Verification, counts: Counter[str], verdicts: Sequence[Verdict], ids: list[str], said: list[str]
) -> None:
    """More failures of grading than allowed: to train on them would be to train on noise."""
    failed = sum(counts[why] for why in FAILED)
    if not failed or failed <= section.max_error_share * len(verdicts):
        return
    some = [name for name, verdict in zip(ids, verdicts, strict=True) if verdict.why in FAILED][:3]
    counted = ", ".join(f"{counts[why]} {why}" for why in FAILED)
    raise UserError(
        f"verification: grading failed for {failed} of {len(verdicts)} responses ({counted}), say {', '.join(some)}"
        f"{': ' + said[0] if said else ''}; verification.max_error_share is {section.max_error_share:g}: "
        "look at those responses and their ground truths, raise verification.time_limit or memory_limit, "
        "or raise max_error_share (1: never fail)"
    )
