"""The problems stage: disjoint tables that depend on nothing they should not."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vapo.errors import UserError
from vapo.problems.make import problems
from vapo.problems.problem import identity
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


READ = ("rows", "distinct_prompts", "bad_rows")


def counts(made: tuple[int, int], read: tuple[int, ...], heldout: tuple[int, ...] = ()) -> dict[str, float]:
    """The stage's metrics: how many prompts train and are held out, and what was read of READ for them."""
    found = {"train_prompts": made[0], "heldout_prompts": made[1], "examples": 0, **dict(zip(READ, read, strict=True))}
    return {**found, **dict(zip([f"heldout_{name}" for name in READ], heldout, strict=True))} if heldout else found


def test_problems_from_a_file(tmp_path: Path) -> None:
    path = problem_file(tmp_path / "p.jsonl", 300)
    found = make(tmp_path, source="file", path=path, examples=0, heldout_share=0.2)
    assert found == counts((120, 30), (300, 300, 0))
    train, heldout = (prompts(tmp_path / name).to_pylist() for name in ("train", "heldout"))
    assert {r["prompt"] for r in train}.isdisjoint(r["prompt"] for r in heldout)
    assert all(int(r["ground_truth"]) == int(r["prompt"].split()[0]) + 1 for r in train + heldout)
    assert len(read_table(tmp_path / "examples", EXAMPLES)) == 0


def test_a_file_that_is_all_held_out(tmp_path: Path) -> None:
    """As `vapo evaluate` reads one."""
    path = problem_file(tmp_path / "p.jsonl", 20)
    found = make(tmp_path, source="file", path=path, examples=0, heldout_share=1.0, heldout=10**9)
    assert found == counts((0, 20), (20, 20, 0))
    assert len(prompts(tmp_path / "train")) == 0


def test_a_file_too_small_to_split(tmp_path: Path) -> None:
    path = problem_file(tmp_path / "p.jsonl", 1)
    with pytest.raises(UserError, match=r"p\.jsonl.*the file needs more problems"):
        make(tmp_path, source="file", path=path, examples=0)


def test_heldout_problems_from_a_file_of_their_own(tmp_path: Path) -> None:
    """All of the other file trains; heldout_share has no say."""
    path, heldout_path = problem_file(tmp_path / "p.jsonl", 50), problem_file(tmp_path / "h.jsonl", 12, first=1000)
    found = make(tmp_path, source="file", path=path, heldout_path=heldout_path, examples=0, heldout_share=0.9)
    assert found == counts((50, 12), (50, 50, 0), (12, 12, 0))
    train, heldout = (prompts(tmp_path / name)["prompt"].to_pylist() for name in ("train", "heldout"))
    assert train == [f"{i} + 1 =" for i in range(50)]
    assert heldout == [f"{i} + 1 =" for i in range(1000, 1012)]


def test_what_is_held_out_is_never_trained_on(tmp_path: Path) -> None:
    """Also what stands in both files, and what stands beyond the first problems.heldout of its file."""
    path, heldout_path = problem_file(tmp_path / "p.jsonl", 50), problem_file(tmp_path / "h.jsonl", 30, first=40)
    found = make(tmp_path, source="file", path=path, heldout_path=heldout_path, examples=0, heldout=5)
    assert (found["train_prompts"], found["heldout_prompts"]) == (40, 5)
    train, heldout = (prompts(tmp_path / name)["prompt"].to_pylist() for name in ("train", "heldout"))
    assert train == [f"{i} + 1 =" for i in range(40)]
    assert set(heldout) < {f"{i} + 1 =" for i in range(40, 70)}


def test_problems_train_counts_what_is_left(tmp_path: Path) -> None:
    path, heldout_path = problem_file(tmp_path / "p.jsonl", 50), problem_file(tmp_path / "h.jsonl", 10)
    make(tmp_path, source="file", path=path, heldout_path=heldout_path, examples=0, train=7)
    train = prompts(tmp_path / "train")["prompt"].to_pylist()
    assert len(train) == 7
    assert set(train) < {f"{i} + 1 =" for i in range(10, 50)}


def test_the_same_problems_whatever_their_order_and_files(tmp_path: Path) -> None:
    """Also where the recipe asks for fewer than there are."""
    lines = [json.dumps({"prompt": f"{i} + 1 =", "ground_truth": str(i + 1)}) for i in range(300)]
    (tmp_path / "one.jsonl").write_text("\n".join(lines))
    random.Random(0).shuffle(lines)
    for part in range(3):
        (tmp_path / f"of3_{part}.jsonl").write_text("\n".join(lines[part::3]))
    found = []
    for name, path in (("a", "one.jsonl"), ("b", "of3_*.jsonl")):
        make(tmp_path / name, source="file", path=f"{tmp_path}/{path}", examples=0, train=100, heldout=20)
        found.append([prompts(tmp_path / name / table).to_pylist() for table in ("train", "heldout")])
    for one, other in zip(*found, strict=True):
        assert one != other
        assert sorted(one, key=str) == sorted(other, key=str)


def test_bad_rows_are_a_metric(tmp_path: Path) -> None:
    problem_file(tmp_path / "p.jsonl", 300)
    (tmp_path / "q.jsonl").write_text('{"prompt": "x"}\n\nnonsense\n')
    path = f"{tmp_path}/*.jsonl"
    with pytest.raises(UserError, match=r"q\.jsonl:1: column 'ground_truth': found none \(columns \['prompt'\]\)"):
        make(tmp_path, source="file", path=path, examples=0)
    found = make(tmp_path, source="file", path=path, examples=0, skip_bad_rows=True)
    assert (found["rows"], found["distinct_prompts"], found["bad_rows"]) == (302, 300, 2)


def published(path: Path, count: int, times: int, index: Any) -> str:
    """A file as DAPO-Math-17k and AIME-2024 are published, of `count` problems, each `times` times."""
    row = {"data_source": path.stem, "ability": "MATH", "extra_info": {"index": index}}
    rows = [
        {
            **row,
            "prompt": [{"content": f"{path.stem} {i}", "role": "user"}],
            "reward_model": {"ground_truth": str(i), "style": "rule"},
        }
        for i in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows * times), path)
    return str(path)


def test_the_files_of_the_published_run(tmp_path: Path) -> None:
    """960 rows of AIME-2024 are 30 problems; what is read, and what it is, are metrics."""
    train = published(tmp_path / "dapo.parquet", 200, 100, "3fa2")
    heldout = published(tmp_path / "aime.parquet", 30, 32, 7)
    keys = {"source": "file", "path": train, "heldout_path": heldout, "ground_truths": "integer"}
    found = make(tmp_path, **keys, examples=0, train=17917, heldout=30)
    assert found == counts((200, 30), (20000, 200, 0), (960, 30, 0))
    assert prompts(tmp_path / "heldout").to_pylist()[29] == {
        "prompt_id": identity("aime 29"),
        "prompt": "aime 29",
        "ground_truth": "29",
        "family": "aime",
        "difficulty": 0,
    }


def test_problems_of_task_families(tmp_path: Path) -> None:
    """More to train on leave the held-out ones as they are; no prompt is in both."""
    pytest.importorskip("reasoning_gym")
    keys: dict[str, Any] = {"source": "reasoning_gym", "families": {"gcd": {}, "chain_sum": {"max_terms": 3}}}
    assert make(tmp_path / "a", **keys, examples=0) == {"train_prompts": 120, "heldout_prompts": 30, "examples": 0}
    make(tmp_path / "b", **keys, examples=0, train=60)
    train, heldout = (prompts(tmp_path / "a" / name) for name in ("train", "heldout"))
    assert prompts(tmp_path / "b" / "heldout").equals(heldout)
    assert prompts(tmp_path / "b" / "train").equals(train.slice(0, 60))
    assert set(train["prompt"].to_pylist()).isdisjoint(heldout["prompt"].to_pylist())
    assert set(heldout["family"].to_pylist()) == {"gcd", "chain_sum"}


def test_without_torch(tmp_path: Path) -> None:
    """No problem set needs it; only a chat template needs transformers."""
    problem_file(tmp_path / "p.jsonl", 300)
    code = f"""
import sys
from pathlib import Path
from vapo.problems.make import problems
from vapo.recipe import Problems
places = {{name: Path({str(tmp_path)!r}) / name for name in ("train_prompts", "heldout_prompts", "examples")}}
problems(Problems(train=20, heldout=5, examples=5), seed=0, **places)
problems(Problems(source="file", path={str(tmp_path / "p.jsonl")!r}), seed=0, **places)
heavy = {{"torch", "transformers", "reasoning_gym", "datasets", "math_verify", "sympy"}}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])


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
