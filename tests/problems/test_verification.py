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
