"""avg@k and pass@k against counting every choice, and the evaluation stage's table."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapo.errors import UserError
from vapo.evaluate.accuracy import avg_at_k, evaluation, pass_at_k
from vapo.recipe import Evaluation
from vapo.schemas import EVALUATION, PROMPTS, REWARDS, ROLLOUTS
from vapo.tables import offsets_of, read_table, write_table

verdicts = st.integers(1, 7).flatmap(
    lambda k: st.lists(st.lists(st.booleans(), min_size=k, max_size=k), min_size=1, max_size=4)
)


def counted(graded: list[list[bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([len(g) for g in graded], np.int32), np.array([sum(g) for g in graded], np.int32)


@given(verdicts, st.data())
def test_point_20_pass_at_k_is_the_share_of_choices(graded: list[list[bool]], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(graded[0])))
    expected = np.mean([np.mean([any(chosen) for chosen in combinations(g, k)]) for g in graded])
    assert pass_at_k(*counted(graded), k) == pytest.approx(expected, abs=1e-12)


@given(verdicts)
def test_point_20_avg_at_k_is_the_mean_of_means_and_pass_at_1(graded: list[list[bool]]) -> None:
    samples, correct = counted(graded)
    assert avg_at_k(samples, correct) == pytest.approx(np.mean([np.mean(g) for g in graded]))
    assert pass_at_k(samples, correct, 1) == pytest.approx(avg_at_k(samples, correct))


def test_prompts_count_alike_whatever_their_samples() -> None:
    assert avg_at_k(np.array([1, 99]), np.array([1, 0])) == 0.5


def test_pass_at_k_of_many_samples_is_exact() -> None:
    """Numbers whose factorials overflow floats: one of 2000 correct, half of them chosen."""
    assert pass_at_k(np.array([2000], np.int32), np.array([1], np.int32), 1000) == pytest.approx(0.5, abs=1e-12)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Three prompts of which "b" and "a" were sampled, interleaved: a 1 of 4, b 4 of 4."""
    write_table(
        tmp_path / "prompts",
        PROMPTS,
        {
            "prompt_id": ["c", "b", "a"],
            "prompt": ["c", "b", "a"],
            "ground_truth": ["7"] * 3,
            "family": ["fc", "fb", "fa"],
            "difficulty": [3, 2, 1],
        },
    )
    ids = ["b", "a"] * 4
    lengths = [1, 2, 1, 4, 1, 6, 5, 8]
    total = sum(lengths)
    columns: dict[str, Any] = {
        "rollout_id": [f"0/{p}/{i // 2}" for i, p in enumerate(ids)],
        "prompt_id": ids,
        "sample_index": [i // 2 for i in range(8)],
        "seed": list(range(8)),
        "prompt_tokens": [[1]] * 8,
        "response_tokens": (np.ones(total, np.int32), offsets_of(lengths)),
        "rollout_logprobs": (np.zeros(total, np.float32), offsets_of(lengths)),
        "response": [""] * 8,
        "finish_reason": ["stop"] * 7 + ["length"],
    }
    write_table(tmp_path / "rollouts", ROLLOUTS, columns)
    rewards(tmp_path, columns["rollout_id"])
    return tmp_path


def rewards(place: Path, ids: list[str]) -> None:
    correct = [True, False, True, True, True, False, True, False]
    columns = {
        "rollout_id": ids,
        "correct": correct,
        "reward": [0.0] * 8,
        "extracted": [""] * 8,
        "verdict": [""] * 8,
    }
    write_table(place / "rewards", REWARDS, columns)


def run(place: Path) -> dict[str, float]:
    return evaluation(
        Evaluation(),
        prompts=place / "prompts",
        rollouts=place / "rollouts",
        rewards=place / "rewards",
        evaluation=place / "evaluation",
        iteration=0,
    )


def test_the_stage_by_hand(place: Path) -> None:
    assert run(place) == {
        "accuracy": pytest.approx((1 / 4 + 4 / 4) / 2),
        "samples_per_prompt": 4,
        "problems": 2,
        "pass_at_1": pytest.approx((1 / 4 + 1) / 2),
        "pass_at_2": pytest.approx((1 / 2 + 1) / 2),
        "pass_at_4": 1.0,
        "length_mean": pytest.approx(28 / 8),
        "truncated_share": pytest.approx(1 / 8),
    }
    assert read_table(place / "evaluation", EVALUATION).to_pylist() == [
        {"prompt_id": "a", "family": "fa", "difficulty": 1, "samples": 4, "correct": 1, "mean_length": 5.0},
        {"prompt_id": "b", "family": "fb", "difficulty": 2, "samples": 4, "correct": 4, "mean_length": 2.0},
    ]


def test_twice_is_the_same_bytes(place: Path) -> None:
    run(place)
    before = (place / "evaluation").read_bytes()
    run(place)
    assert (place / "evaluation").read_bytes() == before


def test_rewards_of_other_rollouts_are_refused(place: Path) -> None:
    rewards(place, [f"1/{i}" for i in range(8)])
    with pytest.raises(UserError, match="rewards: column rollout_id: row 0"):
        run(place)
