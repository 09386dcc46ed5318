"""The rollout stage: rows that say where they come from, and whose response anyone can sample again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from vapo.errors import UserError
from vapo.recipe import Rollout
from vapo.rollout.decoder import Decoder
from vapo.rollout.engine import generate
from vapo.rollout.generate import rollout, stop_token_of
from vapo.schemas import REWARDS, ROLLOUTS
from vapo.store import save_checkpoint
from vapo.tables import flat, read_table, rows, write_table

from .conftest import EOS, VOCABULARY
from .policies import write_prompts

Make = Callable[[str], tuple[Path, Any]]
WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, VOCABULARY))]
TEXTS = [" ".join(WORDS[2 + (i * k) % 20] for k in range(1, 3 + i % 4)) for i in range(7)]
SECTION = Rollout(prompts=3, samples=4, max_new_tokens=20, batch_size=8)


@pytest.fixture(scope="module")
def folder(checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer of words."""
    copy = shutil.copytree(checkpoint("qwen2")[0], tmp_path_factory.mktemp("policy") / "files")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    tokenizer.save(str(copy / "tokenizer.json"))
    return copy


@pytest.fixture(scope="module")
def place(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the policy's manifest and PROMPTS."""
    root = tmp_path_factory.mktemp("rollout")
    save_checkpoint(folder, root / "policy.json", store=str(root / "store"), kind="policy", facts={})
    write_prompts(root / "prompts", TEXTS)
    return root


def run(place: Path, name: str, section: Rollout = SECTION, **changed: Any) -> dict[str, float]:
    parameters: dict[str, Any] = {
        "iteration": 1,
        "draw": 1,
        "wanted_groups": 0,
        "purpose": "train",
        "seed": 0,
        "prompts": place / "prompts",
    }
    return rollout(section, policy=place / "policy.json", rollouts=place / name, **{**parameters, **changed})


def test_rows_are_complete(place: Path, folder: Path) -> None:
    metrics = run(place, "r")
    table = read_table(place / "r", ROLLOUTS)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert table["prompt_id"].to_pylist() == [f"p{i}" for i in range(3) for _ in range(4)]
    assert table["sample_index"].to_pylist() == [0, 1, 2, 3] * 3
    assert table["rollout_id"].to_pylist() == [f"1/p{i}/{k}" for i in range(3) for k in range(4)]
    assert len(set(table["seed"].to_pylist())) == 12
    columns = (rows(table, name) for name in ("prompt_tokens", "response_tokens", "rollout_logprobs"))
    texts, reasons = table["response"].to_pylist(), table["finish_reason"].to_pylist()
    for i, (prompt, response, logprobs) in enumerate(zip(*columns, strict=True)):
        assert tokenizer.decode(prompt.tolist()) == TEXTS[i // 4]
        assert len(response) == len(logprobs)
        assert (logprobs <= 0).all()
        stopped = response[-1] == EOS
        assert reasons[i] == ("stop" if stopped else "length")
        assert texts[i].split() == [WORDS[t] for t in response if t > 1]
    lengths = np.array([len(r) for r in rows(table, "response_tokens")])
    assert metrics["responses"] == 12
    assert metrics["tokens"] == lengths.sum()
    assert metrics["length_mean"] == pytest.approx(lengths.mean())
    assert metrics["length_max"] == lengths.max()
    assert metrics["truncated_share"] == reasons.count("length") / 12
    entropy = -np.concatenate(rows(table, "rollout_logprobs")).mean()
    assert metrics["sampled_entropy"] == pytest.approx(entropy, rel=1e-6)


def test_the_seed_of_a_row_gives_its_response_again(place: Path, folder: Path) -> None:
    run(place, "again")
    table = read_table(place / "again", ROLLOUTS)
    for i in (0, 6, 11):
        (response,) = generate(
            Decoder(folder),
            [rows(table, "prompt_tokens")[i].tolist()],
            flat(table, "seed")[i : i + 1],
            samples=1,
            max_new_tokens=20,
            temperature=1.0,
            top_p=1.0,
            stop_token=EOS,
            batch_size=1,
        )
        assert response.tokens == rows(table, "response_tokens")[i].tolist()


def test_same_seed_same_bytes_and_other_streams_differ(place: Path) -> None:
    run(place, "one")
    run(place, "two")
    assert (place / "one").read_bytes() == (place / "two").read_bytes()
    seen = [read_table(place / "one", ROLLOUTS)["response_tokens"].to_pylist()]
    for changed in ({"seed": 1}, {"purpose": "evaluation"}):
        run(place, "other", **changed)
        seen.append(read_table(place / "other", ROLLOUTS)["response_tokens"].to_pylist())
    assert all(seen[i] != seen[j] for i, j in ((0, 1), (0, 2), (1, 2)))


def test_iterations_walk_through_the_prompts_and_begin_again(place: Path) -> None:
    walked = []
    for iteration in (0, 1, 2, 3):
        run(place, "walk", Rollout(prompts=3, samples=1, max_new_tokens=2), iteration=iteration)
        walked.append(read_table(place / "walk", ROLLOUTS)["prompt_id"].to_pylist())
    assert walked == [["p0", "p1", "p2"], ["p0", "p1", "p2"], ["p3", "p4", "p5"], ["p6", "p0", "p1"]]


def test_more_prompts_than_there_are_means_all_once(place: Path) -> None:
    run(place, "all", Rollout(prompts=100, samples=1, max_new_tokens=2), iteration=2)
    assert sorted(read_table(place / "all", ROLLOUTS)["prompt_id"].to_pylist()) == [f"p{i}" for i in range(7)]


def test_a_prompt_without_a_token(place: Path) -> None:
    write_prompts(place / "empty", ["w3", "  "])
    with pytest.raises(UserError, match="prompt p1 has no token"):
        run(place, "x", prompts=place / "empty")


def test_a_prompt_that_leaves_no_room(place: Path) -> None:
    write_prompts(place / "long", [" ".join(["w3"] * 237)])
    with pytest.raises(UserError, match=r"prompt p0 has 237 tokens; .*max_new_tokens 20 .* 256 positions"):
        run(place, "x", prompts=place / "long")
    write_prompts(place / "fits", [" ".join(["w3"] * 236)])
    assert run(place, "x", prompts=place / "fits")["responses"] == 4


@pytest.mark.parametrize(("eos", "expected"), [(5, 5), ([7, 8], 7), (0, 0)])
def test_the_stop_token(tmp_path: Path, eos: object, expected: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert stop_token_of(tmp_path) == expected


@pytest.mark.parametrize("config", [{}, {"eos_token_id": None}, {"eos_token_id": []}])
def test_no_stop_token(tmp_path: Path, config: dict[str, object]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no eos_token_id"):
        stop_token_of(tmp_path)


def grade(place: Path, name: str, correct: Callable[[int, int], bool]) -> Path:
    """REWARDS of these rollouts: right or wrong by (number of the prompt, sample)."""
    table = read_table(place / name, ROLLOUTS)
    prompt_ids, samples = table["prompt_id"].to_pylist(), table["sample_index"].to_pylist()
    right = [correct(int(p[1:]), k) for p, k in zip(prompt_ids, samples, strict=True)]
    columns = {
        "rollout_id": table["rollout_id"],
        "correct": right,
        "reward": [1.0 if r else -1.0 for r in right],
        "extracted": [""] * len(right),
        "verdict": ["matched" if r else "different" for r in right],
    }
    write_table(place / f"{name}-rewards", REWARDS, columns)
    return place / f"{name}-rewards"


DRAWS = SECTION.model_copy(update={"prompts": 2, "draws": 3})  # of seven prompts


def again(
    place: Path, name: str, draw: int, before: str, rewards: Path, wanted: int, **changed: Any
) -> dict[str, float]:
    more = {"previous_rollouts": place / before, "previous_rewards": rewards}
    return run(place, name, DRAWS, draw=draw, wanted_groups=wanted, **more, **changed)


def test_a_further_draw_adds_prompts_behind_those_there(place: Path) -> None:
    """Groups are wanting: two more prompts, none of them seen before; what was sampled stays as it was."""
    run(place, "d1", DRAWS)
    rewards = grade(place, "d1", lambda p, k: k == 0 and p == 0)  # one informative group
    metrics = again(place, "d2", 2, "d1", rewards, wanted=2)
    first, both = read_table(place / "d1", ROLLOUTS), read_table(place / "d2", ROLLOUTS)
    assert (metrics["prompts"], metrics["responses"]) == (4, 16)
    assert both.slice(0, 8).equals(first)
    assert both["prompt_id"].to_pylist() == [f"p{i}" for i in range(4) for _ in range(4)]
    assert len(set(both["seed"].to_pylist())) == 16
    assert len(set(both["rollout_id"].to_pylist())) == 16


def test_enough_groups_end_the_drawing(place: Path) -> None:
    """Both verdicts count, not the number of correct ones; the table is handed on as it is."""
    run(place, "d1", DRAWS)
    rewards = grade(place, "d1", lambda p, k: k == 0)
    metrics = again(place, "d2", 2, "d1", rewards, wanted=2)
    assert metrics["prompts"] == 2
    assert read_table(place / "d2", ROLLOUTS).equals(read_table(place / "d1", ROLLOUTS))
    everything_right = grade(place, "d1", lambda p, k: True)
    assert again(place, "d2", 2, "d1", everything_right, wanted=1)["prompts"] == 4


def test_no_prompt_comes_twice_in_an_iteration(place: Path) -> None:
    """Three draws in each of two iterations, two prompts each, of seven: slices follow one another."""
    found = []
    for iteration in (1, 2):
        run(place, "d", DRAWS, iteration=iteration)
        for draw in (2, 3):
            again(place, "e", draw, "d", grade(place, "d", lambda p, k: False), wanted=9, iteration=iteration)
            (place / "e").replace(place / "d")
        found.append(list(dict.fromkeys(read_table(place / "d", ROLLOUTS)["prompt_id"].to_pylist())))
    assert found == [["p0", "p1", "p2", "p3", "p4", "p5"], ["p6", "p0", "p1", "p2", "p3", "p4"]]


def test_rewards_of_other_rollouts_end_no_drawing(place: Path) -> None:
    run(place, "d1", DRAWS)
    run(place, "other", DRAWS, iteration=2)
    with pytest.raises(UserError, match="rollout_id"):
        again(place, "d2", 2, "d1", grade(place, "other", lambda p, k: k == 0), wanted=1)
