"""The evaluation stage: its table and metrics by hand, families, intervals, and what does not depend on the order."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapo.errors import UserError
from vapo.evaluate.accuracy import evaluation
from vapo.recipe import Evaluation
from vapo.schemas import EVALUATION, PROMPTS, REWARDS, ROLLOUTS
from vapo.tables import read_table, write_table

# prompt -> its samples in order: (extracted answer, correct, tokens, finish_reason)
Samples = dict[str, list[tuple[str, bool, int, str]]]
HAND: Samples = {
    "a": [("8", False, 2, "stop"), ("7", True, 4, "stop"), ("8", False, 6, "stop"), ("", False, 8, "length")],
    "b": [("7", True, 1, "stop"), ("07", True, 1, "stop"), ("7", True, 1, "stop"), ("7", True, 5, "stop")],
}
FAMILIES = {"a": "fa", "b": "fb"}


def write(place: Path, samples: Samples, order: list[tuple[str, int]], families: dict[str, str]) -> None:
    """The three tables of an evaluation whose rows are sampled in this order of (prompt, sample)."""
    names = sorted({*families, *samples}, reverse=True)
    columns: dict[str, Any] = dict.fromkeys(("prompt_id", "prompt"), names)
    columns |= {
        "ground_truth": ["7"] * len(names),
        "family": [families.get(name, "f") for name in names],
        "difficulty": [ord(name[0]) - ord("a") + 1 for name in names],
    }
    write_table(place / "prompts", PROMPTS, columns)
    rows = [samples[name][at] for name, at in order]
    ids = [f"0/{name}/{at}" for name, at in order]
    lengths = [row[2] for row in rows]
    rollouts: dict[str, Any] = {
        "rollout_id": ids,
        "prompt_id": [name for name, _ in order],
        "sample_index": [at for _, at in order],
        "seed": list(range(len(rows))),
        "prompt_tokens": [[1]] * len(rows),
        "response_tokens": [[1] * length for length in lengths],
        "rollout_logprobs": [[0.0] * length for length in lengths],
        "response": [""] * len(rows),
        "finish_reason": [row[3] for row in rows],
    }
    write_table(place / "rollouts", ROLLOUTS, rollouts)
    rewards: dict[str, Any] = {
        "rollout_id": ids,
        "correct": [row[1] for row in rows],
        "reward": [0.0] * len(rows),
        "extracted": [row[0] for row in rows],
        "verdict": [""] * len(rows),
    }
    write_table(place / "rewards", REWARDS, rewards)


def in_order(samples: Samples) -> list[tuple[str, int]]:
    return [(name, at) for name in samples for at in range(len(samples[name]))]


def run(place: Path, seed: int = 0, **section: Any) -> dict[str, float]:
    return evaluation(
        Evaluation(**section),
        prompts=place / "prompts",
        rollouts=place / "rollouts",
        rewards=place / "rewards",
        evaluation=place / "evaluation",
        iteration=0,
        seed=seed,
    )


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Three prompts of which "b" and "a" were sampled, interleaved: a 1 of 4, b 4 of 4."""
    write(tmp_path, HAND, [(name, at) for at in range(4) for name in "ba"], {**FAMILIES, "c": "fc"})
    return tmp_path


def test_the_stage_by_hand(place: Path) -> None:
    found = run(place)
    overall = {
        "accuracy": (1 / 4 + 4 / 4) / 2,
        "samples_per_prompt": 4,
        "confidence": 0.95,
        "problems": 2,
        "pass_at_1": (1 / 4 + 1) / 2,
        "pass_at_2": (1 / 2 + 1) / 2,
        "pass_at_4": 1.0,
        "cons_at_1": (1 / 4 + 1) / 2,
        "cons_at_2": (1 / 4 + 1) / 2,  # of a: a tie, then 8 alone
        "cons_at_4": (0 + 1) / 2,
        "length_mean": 28 / 8,
        "truncated_share": 1 / 8,
    }
    of_a = {"accuracy": 1 / 4, "pass_at_4": 1.0, "cons_at_4": 0, "length_mean": 5, "truncated_share": 1 / 4}
    of_b = {"accuracy": 1, "pass_at_4": 1.0, "cons_at_4": 1, "length_mean": 2, "truncated_share": 0}
    families = {f"{name}/fa": value for name, value in {**of_a, "problems": 1}.items()}
    families |= {f"{name}/fb": value for name, value in {**of_b, "problems": 1}.items()}
    # Two prompts drawn twice: both ends are the prompts' own values.
    low, high = zip(*(sorted((of_a[name], of_b[name])) for name in of_a if name != "pass_at_4"), strict=True)
    measured = [name for name in of_a if name != "pass_at_4"]
    limits = {f"{name}_low": value for name, value in zip(measured, low, strict=True)}
    limits |= {f"{name}_high": value for name, value in zip(measured, high, strict=True)}
    limits |= {"pass_at_1_low": 1 / 4, "pass_at_1_high": 1, "pass_at_2_low": 1 / 2, "pass_at_2_high": 1}
    limits |= {"cons_at_1_low": 1 / 4, "cons_at_1_high": 1, "cons_at_2_low": 1 / 4, "cons_at_2_high": 1}
    assert found == pytest.approx({**overall, **families, **limits})
    assert read_table(place / "evaluation", EVALUATION).to_pylist() == [
        {
            "prompt_id": "a",
            "family": "fa",
            "difficulty": 1,
            "samples": 4,
            "correct": 1,
            "truncated": 1,
            "majority": "8",
            "mean_length": 5.0,
        },
        {
            "prompt_id": "b",
            "family": "fb",
            "difficulty": 2,
            "samples": 4,
            "correct": 4,
            "truncated": 0,
            "majority": "7",
            "mean_length": 2.0,
        },
    ]


def test_a_tie_and_no_answer_have_no_majority(tmp_path: Path) -> None:
    samples: Samples = {
        "a": [("8", False, 1, "stop"), ("7", True, 1, "stop")],
        "b": [("", False, 1, "stop"), ("", False, 1, "length")],
    }
    write(tmp_path, samples, in_order(samples), {})
    found = run(tmp_path)
    assert read_table(tmp_path / "evaluation", EVALUATION)["majority"].to_pylist() == ["", ""]
    assert found["cons_at_2"] == pytest.approx((1 / 2 + 0) / 2)


def test_a_grader_that_does_not_say_answers_gives_no_cons_at_k(tmp_path: Path) -> None:
    samples: Samples = {"a": [("", True, 1, "stop"), ("", False, 1, "stop")]}
    write(tmp_path, samples, in_order(samples), {})
    assert not [name for name in run(tmp_path) if name.startswith("cons")]


def test_one_family_is_not_told_twice(tmp_path: Path) -> None:
    write(tmp_path, HAND, in_order(HAND), {})
    assert not [name for name in run(tmp_path) if "/" in name]


@pytest.mark.parametrize(("k", "sizes"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])])
def test_sizes_are_powers_of_two_and_k(tmp_path: Path, k: int, sizes: list[int]) -> None:
    samples: Samples = {"a": [("7", True, 1, "stop")] * k}
    write(tmp_path, samples, in_order(samples), {})
    found = run(tmp_path)
    assert {name for name in found if "_at_" in name} == {f"{kind}_at_{n}" for kind in ("pass", "cons") for n in sizes}
    assert not [name for name in found if name.endswith(("_low", "_high"))]  # one prompt
    assert all(math.isfinite(value) for value in found.values())


prompts_of_samples = st.integers(1, 4).flatmap(
    lambda k: st.lists(
        st.lists(
            st.tuples(st.sampled_from(["", "6", "7", "8"]), st.integers(1, 3), st.sampled_from(["stop", "length"])),
            min_size=k,
            max_size=k,
        ),
        min_size=1,
        max_size=6,
    )
)


@given(prompts_of_samples, st.randoms())
def test_order_changes_nothing_and_all_is_finite(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[list[tuple[str, int, str]]], random: Any
) -> None:
    """Permuting the rows of all tables gives the same bytes and metrics; every interval holds its measure."""
    samples: Samples = {
        f"{'abcdef'[at]}": [(answer, answer == "7", length, reason) for answer, length, reason in group]
        for at, group in enumerate(drawn)
    }
    families = {name: f"family {at % 2}" for at, name in enumerate(samples)}
    order = in_order(samples)
    place, other = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    write(place, samples, order, families)
    random.shuffle(order)
    write(other, samples, order, families)
    found = run(place, resamples=200)
    assert run(other, resamples=200) == found
    assert (place / "evaluation").read_bytes() == (other / "evaluation").read_bytes()
    assert all(math.isfinite(value) for value in found.values())
    assert found["cons_at_1"] == pytest.approx(found["accuracy"])
    assert found["pass_at_1"] == pytest.approx(found["accuracy"])
    passes = [found[f"pass_at_{k}"] for k in (1, 2, 3, 4) if f"pass_at_{k}" in found]
    assert passes == sorted(passes)
    for name, low in found.items():
        if "_low" in name:
            high, value = found[name.replace("_low", "_high")], found[name.replace("_low", "")]
            assert low - 1e-12 <= value <= high + 1e-12, name


def test_confidence_and_resamples_are_settings(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    samples: Samples = {
        f"p{at:02d}": [("7" if right else "6", bool(right), 1, "stop") for right in generator.random(4) < chance]
        for at, chance in enumerate(generator.random(60))
    }
    write(tmp_path, samples, in_order(samples), {})
    wide, narrow, other = run(tmp_path), run(tmp_path, confidence=0.8), run(tmp_path, resamples=100)
    assert (wide["confidence"], narrow["confidence"]) == (0.95, 0.8)
    assert wide["accuracy_low"] < narrow["accuracy_low"] < wide["accuracy"]
    assert wide["accuracy"] < narrow["accuracy_high"] < wide["accuracy_high"]
    assert other["accuracy_low"] != wide["accuracy_low"]
    assert run(tmp_path, seed=1)["accuracy_low"] != wide["accuracy_low"]
    assert run(tmp_path, seed=1)["accuracy"] == wide["accuracy"]


def test_twice_is_the_same_bytes(place: Path) -> None:
    found = run(place)
    before = (place / "evaluation").read_bytes()
    assert run(place) == found
    assert (place / "evaluation").read_bytes() == before


def test_rewards_of_other_rollouts_are_refused(place: Path) -> None:
    (place / "rewards").unlink()
    other = place / "other"
    other.mkdir()
    samples = {"b": HAND["b"]}
    write(other, samples, in_order(samples), {})
    (other / "rewards").rename(place / "rewards")
    with pytest.raises(UserError, match="rewards: column rollout_id: expected 8 rows"):
        run(place)


def test_a_prompt_that_is_not_in_prompts_is_named(place: Path) -> None:
    write_table(place / "prompts", PROMPTS, {name: [] for name in PROMPTS.names})
    with pytest.raises(UserError, match="rollouts: column prompt_id: 'a' is not in"):
        run(place)
