"""The verification stage: verdicts become rewards, row by row, on the response alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vapo.errors import UserError
from vapo.problems.verification import verification
from vapo.recipe import Verification
from vapo.schemas import PROMPTS, REWARDS, ROLLOUTS
from vapo.tables import offsets_of, read_table, write_table

ROWS = [  # prompt_id, response, finish_reason, verdict
    ("p", "answer 7", "stop", "matched"),
    ("q", "answer 7", "stop", "different"),
    ("q", "answer 03", "stop", "matched"),
    ("p", "7", "stop", "no_answer"),
    ("p", "answer 7", "length", "truncated"),
    ("p", "", "stop", "no_answer"),
]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """PROMPTS in which one prompt ends like an answer, and ROLLOUTS of ROWS."""
    write_table(
        tmp_path / "prompts",
        PROMPTS,
        {
            "prompt_id": ["p", "q"],
            "prompt": ["say answer 7", "answer 3"],
            "ground_truth": ["7", "3"],
            "family": ["f", "f"],
            "difficulty": [0, 0],
        },
    )
    rollouts(tmp_path / "rollouts", [row[:3] for row in ROWS])
    return tmp_path


def rollouts(path: Path, found: list[tuple[str, str, str]], lengths: list[int] | None = None) -> None:
    count = len(found)
    lengths = lengths or [1] * count
    tokens = (np.ones(count, np.int32), offsets_of([1] * count))
    sampled = (np.ones(sum(lengths), np.int32), offsets_of(lengths))
    columns: dict[str, Any] = {
        "rollout_id": [f"1/{i}" for i in range(count)],
        "prompt_id": [row[0] for row in found],
        "sample_index": list(range(count)),
        "seed": list(range(count)),
        "prompt_tokens": tokens,
        "response_tokens": sampled,
        "rollout_logprobs": (np.zeros(sum(lengths), np.float32), offsets_of(lengths)),
        "response": [row[1] for row in found],
        "finish_reason": [row[2] for row in found],
    }
    write_table(path, ROLLOUTS, columns)


def run(place: Path, **section: Any) -> dict[str, float]:
    return verification(
        Verification(**section),
        prompts=place / "prompts",
        rollouts=place / "rollouts",
        rewards=place / "rewards",
        iteration=1,
        purpose="train",
    )


def test_rewards_follow_the_verdicts(place: Path) -> None:
    metrics = run(place)
    table = read_table(place / "rewards", REWARDS)
    assert table["rollout_id"].to_pylist() == [f"1/{i}" for i in range(6)]
    assert table["verdict"].to_pylist() == [row[3] for row in ROWS]
    assert table["correct"].to_pylist() == [row[3] == "matched" for row in ROWS]
    assert table["reward"].to_pylist() == [1, -1, 1, -1, -1, -1]
    assert table["extracted"].to_pylist() == ["7", "7", "03", "", "", ""]
    assert metrics == {
        "accuracy": pytest.approx(2 / 6),
        "reward_mean": pytest.approx(-2 / 6),
        "verdict_matched": 2,
        "verdict_different": 1,
        "verdict_no_answer": 2,
        "verdict_truncated": 1,
    }


def test_other_reward_values_change_no_verdict(place: Path) -> None:
    run(place)
    before = read_table(place / "rewards", REWARDS).drop_columns("reward").to_pylist()
    run(place, reward_correct=1.0, reward_wrong=0.0)
    table = read_table(place / "rewards", REWARDS)
    assert table["reward"].to_pylist() == [1, 0, 1, 0, 0, 0]
    assert table.drop_columns("reward").to_pylist() == before


# Soft overlong punishment, DAPO (arXiv 2503.14476) section 3.4

LENGTHS = [1, 16384, 16385, 18432, 20480, 20481]
PUNISHMENTS = [0.0, 0.0, -0.000244140625, -0.5, -1.0, -1.0]  # L_max 20480, L_cache 4096


def test_punishment_is_added_to_the_reward(place: Path) -> None:
    """Golden values, at correct responses (rows 0 and 2) and wrong ones."""
    rollouts(place / "rollouts", [row[:3] for row in ROWS], LENGTHS)
    metrics = run(place, overlong_tokens=20480, overlong_cache=4096)
    table = read_table(place / "rewards", REWARDS)
    wanted = [base + punishment for base, punishment in zip([1, -1, 1, -1, -1, -1], PUNISHMENTS, strict=True)]
    assert table["reward"].to_pylist() == wanted  # float32 holds these exactly
    assert wanted[2:] == [0.999755859375, -1.5, -2.0, -2.0]
    assert metrics["reward_mean"] == pytest.approx(sum(wanted) / 6, abs=1e-12)
    assert metrics["overlong_share"] == pytest.approx(4 / 6)


def test_punishment_changes_the_reward_alone(place: Path) -> None:
    """What is correct stays correct, for the positive examples and accuracy."""
    rollouts(place / "rollouts", [row[:3] for row in ROWS], LENGTHS)
    before = run(place)
    plain = read_table(place / "rewards", REWARDS)
    after = run(place, overlong_tokens=20480)
    shaped = read_table(place / "rewards", REWARDS)
    assert shaped.drop_columns("reward").equals(plain.drop_columns("reward"))
    assert plain["reward"].to_pylist() == [1, -1, 1, -1, -1, -1]
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"reward_mean", "overlong_share"}
    assert "overlong_share" not in before  # off: 0


def test_punishment_goes_by_the_responses_own_tokens(place: Path) -> None:
    """Not by the prompt's, nor by the text."""
    rollouts(place / "rollouts", [("p", "answer 7", "stop"), ("p", "answer 7" + " x" * 99, "stop")], [10, 3])
    assert run(place, overlong_tokens=10, overlong_cache=4)["overlong_share"] == 0.5
    assert read_table(place / "rewards", REWARDS)["reward"].to_pylist() == [0.0, -1.0]  # 1 - 1, and no answer


def test_punishment_of_other_reward_values(place: Path) -> None:
    rollouts(place / "rollouts", [("p", "answer 7", "stop")] * 3, [6, 8, 12])
    metrics = run(place, overlong_tokens=10, overlong_cache=4, reward_correct=2.0, reward_wrong=0.0)
    assert read_table(place / "rewards", REWARDS)["reward"].to_pylist() == [2.0, 1.5, 1.0]
    assert (metrics["reward_mean"], metrics["accuracy"]) == (1.5, 1.0)


def test_a_response_to_an_unknown_prompt(place: Path) -> None:
    rollouts(place / "rollouts", [("p", "answer 7", "stop"), ("x", "answer 7", "stop")])
    with pytest.raises(UserError, match=r"rollouts: column prompt_id: 'x' is not in .*prompts"):
        run(place)
    assert not (place / "rewards").exists()


# Failures of grading, format rewards and partial scores


GRADER = """
import time
def grade(response, truth):
    if response == "late":
        while True: pass
    if response == "fails":
        raise RuntimeError("no such key")
    return 0.25 if response == "near" else response == truth
"""


@pytest.fixture
def custom(place: Path) -> dict[str, Any]:
    (place / "mine.py").write_text(GRADER)
    return {"grader": "custom", "custom": f"{place}/mine.py:grade", "time_limit": 0.3}


def test_failures_of_grading_are_counted_and_wrong(place: Path, custom: dict[str, Any]) -> None:
    rollouts(place / "rollouts", [("p", r, "stop") for r in ("7", "8", "late", "fails")])
    metrics = run(place, **custom, max_error_share=0.5)
    table = read_table(place / "rewards", REWARDS)
    assert table["verdict"].to_pylist() == ["matched", "different", "time_out", "error"]
    assert table["reward"].to_pylist() == [1, -1, -1, -1]
    assert {name: value for name, value in metrics.items() if name.startswith("verdict_")} == {
        "verdict_matched": 1,
        "verdict_different": 1,
        "verdict_no_answer": 0,
        "verdict_truncated": 0,
        "verdict_unparseable": 0,
        "verdict_time_out": 1,
        "verdict_error": 1,
    }


def test_too_many_failures_of_grading_fail_the_stage(place: Path, custom: dict[str, Any]) -> None:
    """Instead of training on noise; nothing is written."""
    rollouts(place / "rollouts", [("p", r, "stop") for r in ("7", "8", "late", "fails")])
    with pytest.raises(UserError) as raised:
        run(place, **custom, max_error_share=0.49)
    for said in ("2 of 4 responses (1 time_out, 1 error)", "say 1/2, 1/3", "RuntimeError: no such key", "is 0.49"):
        assert said in str(raised.value)
    assert not (place / "rewards").exists()
    run(place, **custom, max_error_share=1)


def test_partial_scores_are_rewards_only(place: Path, custom: dict[str, Any]) -> None:
    rollouts(place / "rollouts", [("p", r, "stop") for r in ("7", "8", "near")])
    run(place, **custom)
    before = read_table(place / "rewards", REWARDS)
    metrics = run(place, **custom, partial_scores=True)
    after = read_table(place / "rewards", REWARDS)
    assert before["reward"].to_pylist() == [1, -1, -1]
    assert after["reward"].to_pylist() == [1, -1, -0.5]
    assert after.drop_columns("reward").equals(before.drop_columns("reward"))
    assert metrics["accuracy"] == pytest.approx(1 / 3)


def test_a_format_reward_is_added_and_changes_nothing_else(place: Path) -> None:
    """Also to a truncated response and to a wrong one."""
    before = run(place)
    plain = read_table(place / "rewards", REWARDS)
    after = run(place, format_pattern=r"^answer \d", format_reward=0.5)
    shaped = read_table(place / "rewards", REWARDS)
    assert shaped.drop_columns("reward").equals(plain.drop_columns("reward"))
    assert shaped["reward"].to_pylist() == [1.5, -0.5, 1.5, -1, -0.5, -1]
    assert after["format_mean"] == pytest.approx(0.5 * 4 / 6)
    assert "format_mean" not in before  # off: 0
    assert after["reward_mean"] == pytest.approx(before["reward_mean"] + after["format_mean"])
    assert after["accuracy"] == before["accuracy"]


def test_a_ground_truth_that_cannot_be_graded_is_refused_first(place: Path) -> None:
    """Only of prompts that occur."""
    write_table(
        place / "prompts",
        PROMPTS,
        {
            "prompt_id": ["p", "q"],
            "prompt": ["a", "b"],
            "ground_truth": ["7", "\\frac{1}{"],
            "family": ["f", "f"],
            "difficulty": [0, 0],
        },
    )
    with pytest.raises(UserError, match=r"prompts: prompt_id 'q': ground_truth .*frac.* correct it or leave"):
        run(place, grader="math")
    rollouts(place / "rollouts", [("p", "\\boxed{7}", "stop")])
    assert run(place, grader="math")["accuracy"] == 1


def test_no_responses(place: Path) -> None:
    rollouts(place / "rollouts", [])
    assert run(place)["accuracy"] == 0
    assert run(place, grader="math", format_pattern="x", format_reward=1)["format_mean"] == 0
