"""The problems stage: disjoint tables that depend on nothing they should not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from vapo.errors import UserError
from vapo.problems.make import problems
from vapo.recipe import Problems
from vapo.schemas import EXAMPLES, PROMPTS
from vapo.tables import read_table

NAMES = ("train", "heldout", "examples")
SECTION: dict[str, Any] = {"train": 120, "heldout": 30, "examples": 200, "min_steps": 3, "max_steps": 9}


def make(folder: Path, seed: int = 0, **changed: Any) -> dict[str, float]:
    folder.mkdir(exist_ok=True)
    return problems(
        Problems(**{**SECTION, **changed}),
        train_prompts=folder / "train",
        heldout_prompts=folder / "heldout",
        examples=folder / "examples",
        seed=seed,
    )


def prompts(path: Path) -> pa.Table:
    return read_table(path, PROMPTS)


def test_counts_and_columns(tmp_path: Path) -> None:
    assert make(tmp_path) == {"train_prompts": 120, "heldout_prompts": 30, "examples": 200}
    for name, count in (("train", 120), ("heldout", 30)):
        table = prompts(tmp_path / name).to_pylist()
        assert len(table) == count
        for row in table:
            assert row["family"] == "chain"
            assert row["difficulty"] == row["prompt"].count("#")
            assert 3 <= row["difficulty"] <= 9
            assert re.fullmatch(r"\d", row["ground_truth"])
    examples = read_table(tmp_path / "examples", EXAMPLES).to_pylist()
    assert len(examples) == 200
    for row in examples:
        assert row["difficulty"] == row["prompt"].count("#") == row["response"].count("#")
        assert re.search(r" answer \d$", row["response"])


def test_heldout_prompts_are_no_training_prompts(tmp_path: Path) -> None:
    """Even where chains are so short that many are drawn twice: 3600 there are."""
    make(tmp_path, min_steps=1, max_steps=1, train=700, heldout=200)
    train, heldout = (prompts(tmp_path / name)["prompt"].to_pylist() for name in ("train", "heldout"))
    assert len(set(train)) == 700
    assert len(set(heldout)) == 200
    assert set(train).isdisjoint(heldout)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make(tmp_path / name)
    make(tmp_path / "other", seed=1)
    for name in NAMES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert (tmp_path / "one" / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({"train": 300}, ("heldout", "examples")),
        ({"examples": 10}, ("train", "heldout")),
    ],
)
def test_what_does_not_depend_on_what(tmp_path: Path, changed: dict[str, Any], same: tuple[str, ...]) -> None:
    """More training prompts leave the held-out ones as they were: scores stay comparable."""
    make(tmp_path / "one")
    make(tmp_path / "two", **changed)
    for name in NAMES:
        equal = (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert equal is (name in same)


def test_more_training_prompts_begin_with_the_same(tmp_path: Path) -> None:
    make(tmp_path / "one")
    make(tmp_path / "two", train=300)
    assert prompts(tmp_path / "two" / "train").slice(0, 120).equals(prompts(tmp_path / "one" / "train"))


def test_a_quarter_of_the_examples_is_short(tmp_path: Path) -> None:
    """The curriculum begins with them."""
    make(tmp_path, examples=2000, min_steps=20, max_steps=40)
    lengths = read_table(tmp_path / "examples", EXAMPLES)["difficulty"].to_pylist()
    short = [n for n in lengths if n < 20]
    assert set(short) == set(range(3, 9))
    assert len(short) / 2000 == pytest.approx(0.25, abs=0.04)


def test_more_prompts_than_there_are_chains(tmp_path: Path) -> None:
    """Says so rather than drawing for ever."""
    with pytest.raises(UserError, match=r"problems\.train 9000 and heldout 30 are too many .* 1 to 1 steps"):
        make(tmp_path, min_steps=1, max_steps=1, train=9000)


def problem_file(path: Path, count: int, first: int = 0) -> str:
    numbers = range(first, first + count)
    lines = (json.dumps({"prompt": f"{i} + 1 =", "ground_truth": str(i + 1)}) for i in numbers)
    path.write_text("\n".join(lines))
    return str(path)


def test_problems_from_a_file(tmp_path: Path) -> None:
    path = problem_file(tmp_path / "p.jsonl", 300)
    found = make(tmp_path, source="file", path=path, examples=0, heldout_share=0.2)
    assert found == {"train_prompts": 120, "heldout_prompts": 30, "examples": 0}
    train, heldout = (prompts(tmp_path / name).to_pylist() for name in ("train", "heldout"))
    assert {r["prompt"] for r in train}.isdisjoint(r["prompt"] for r in heldout)
    assert all(int(r["ground_truth"]) == int(r["prompt"].split()[0]) + 1 for r in train + heldout)
    assert len(read_table(tmp_path / "examples", EXAMPLES)) == 0


def test_a_file_too_small_to_split(tmp_path: Path) -> None:
    path = problem_file(tmp_path / "p.jsonl", 1)
    with pytest.raises(UserError, match=r"p\.jsonl.*the file needs more problems"):
        make(tmp_path, source="file", path=path, examples=0)


def test_heldout_problems_from_a_file_of_their_own(tmp_path: Path) -> None:
    """All of the other file trains; heldout_share has no say."""
    path, heldout_path = problem_file(tmp_path / "p.jsonl", 50), problem_file(tmp_path / "h.jsonl", 12, first=1000)
    found = make(tmp_path, source="file", path=path, heldout_path=heldout_path, examples=0, heldout_share=0.9)
    assert found == {"train_prompts": 50, "heldout_prompts": 12, "examples": 0}
    train, heldout = (prompts(tmp_path / name)["prompt"].to_pylist() for name in ("train", "heldout"))
    assert train == [f"{i} + 1 =" for i in range(50)]
    assert heldout == [f"{i} + 1 =" for i in range(1000, 1012)]


def test_what_is_held_out_is_never_trained_on(tmp_path: Path) -> None:
    """Also what stands in both files, and what stands beyond the first problems.heldout of its file."""
    path, heldout_path = problem_file(tmp_path / "p.jsonl", 50), problem_file(tmp_path / "h.jsonl", 30, first=40)
    found = make(tmp_path, source="file", path=path, heldout_path=heldout_path, examples=0, heldout=5)
    assert found == {"train_prompts": 40, "heldout_prompts": 5, "examples": 0}
    train, heldout = (prompts(tmp_path / name)["prompt"].to_pylist() for name in ("train", "heldout"))
    assert train == [f"{i} + 1 =" for i in range(40)]
    assert heldout == [f"{i} + 1 =" for i in range(40, 45)]


def test_problems_train_counts_what_is_left(tmp_path: Path) -> None:
    path, heldout_path = problem_file(tmp_path / "p.jsonl", 50), problem_file(tmp_path / "h.jsonl", 10)
    make(tmp_path, source="file", path=path, heldout_path=heldout_path, examples=0, train=7)
    assert prompts(tmp_path / "train")["prompt"].to_pylist() == [f"{i} + 1 =" for i in range(10, 17)]


def test_a_heldout_file_that_is_wrong_is_named_by_its_own_key(tmp_path: Path) -> None:
    path, gone = problem_file(tmp_path / "p.jsonl", 5), str(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match=r"problems\.heldout_path '.*gone\.jsonl': no such file"):
        make(tmp_path, source="file", path=path, heldout_path=gone, examples=0)
    with pytest.raises(UserError, match=r"problems\.path '.*gone\.jsonl': no such file"):
        make(tmp_path, source="file", path=gone, heldout_path=path, examples=0)
    (tmp_path / "gone.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"problems\.heldout_path '.*gone\.jsonl' holds no problem"):
        make(tmp_path, source="file", path=path, heldout_path=gone, examples=0)


def test_nothing_is_left_to_train_on(tmp_path: Path) -> None:
    path = problem_file(tmp_path / "p.jsonl", 5)
    with pytest.raises(UserError, match=r"problems\.path .*p\.jsonl.* held out by problems\.heldout_path .*p\.jsonl"):
        make(tmp_path, source="file", path=path, heldout_path=path, examples=0)
