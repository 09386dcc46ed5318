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


def rollouts(path: Path, found: list[tuple[str, str, str]]) -> None:
    count = len(found)
    tokens = (np.ones(count, np.int32), offsets_of([1] * count))
    columns: dict[str, Any] = {
        "rollout_id": [f"1/{i}" for i in range(count)],
        "prompt_id": [row[0] for row in found],
        "sample_index": list(range(count)),
        "seed": list(range(count)),
        "prompt_tokens": tokens,
        "response_tokens": tokens,
        "rollout_logprobs": (np.zeros(count, np.float32), offsets_of([1] * count)),
        "response": [row[1] for row in found],
        "finish_reason": [row[2] for row in found],
    }
    write_table(path, ROLLOUTS, columns)


def run(place: Path, **section: float) -> dict[str, float]:
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


def test_a_response_to_an_unknown_prompt(place: Path) -> None:
    rollouts(place / "rollouts", [("p", "answer 7", "stop"), ("x", "answer 7", "stop")])
    with pytest.raises(UserError, match=r"rollouts: column prompt_id: 'x' is not in .*prompts"):
        run(place)
    assert not (place / "rewards").exists()
