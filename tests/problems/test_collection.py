"""From rows to distinct problems: published files, mapped columns, each prompt once, and what is refused where."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapo.errors import UserError
from vapo.problems.collection import LISTED, Collection, collect, read_problems
from vapo.problems.problem import Problem, identity, split
from vapo.problems.rows import Row
from vapo.problems.templates import renderer
from vapo.progress import parse
from vapo.recipe import Problems


def read(path: Path | str, key: str = "problems.path", **keys: Any) -> Collection:
    section = Problems(source="file", path=str(path), **keys)
    return read_problems(section, section.path, key, renderer(section))


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines), encoding="utf-8")
    return path


def row(i: int) -> dict[str, str]:
    return {"prompt": f"What is {i} + {i}?", "ground_truth": str(2 * i)}


def published(i: int, index: str | int, name: str = "math_dapo") -> dict[str, Any]:
    return {
        "data_source": name,
        "prompt": [{"content": f"Problem {i}\n\nEnd with Answer: $Answer", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": f"0{i}", "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def refused(path: Path | str, **keys: Any) -> str:
    with pytest.raises(UserError) as error:
        read(path, **keys)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_plain_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", row(1), {**row(2), "family": "sums", "other": [1]}, {**row(3), "family": None})
    found = read(path)
    assert found.problems == [
        Problem(identity("What is 1 + 1?"), "What is 1 + 1?", "2", "file", 0),
        Problem(identity("What is 2 + 2?"), "What is 2 + 2?", "4", "sums", 0),
        Problem(identity("What is 3 + 3?"), "What is 3 + 3?", "6", "file", 0),
    ]
    assert (found.rows, found.bad_rows) == (3, 0)


@pytest.mark.parametrize("index", ["3f2c", 7])
def test_published_files(tmp_path: Path, index: str | int) -> None:
    """DAPO-Math-17k has texts as index, AIME-2024 integers."""
    path = parquet(tmp_path / "p.parquet", [published(i % 30, index) for i in range(960)])
    found = read(path)
    assert (found.rows, len(found.problems), found.bad_rows) == (960, 30, 0)
    text = "Problem 7\n\nEnd with Answer: $Answer"
    assert found.problems[7] == Problem(identity(text), text, "07", "math_dapo", 0)
    lines = write(tmp_path / "p.jsonl", *[published(i, index) for i in range(30)])
    assert read(lines).problems == found.problems  # the same in any format


def test_both_kinds_of_index_in_one_read(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", [published(1, "x")])
    parquet(tmp_path / "b.parquet", [published(2, 5), published(1, 6)])
    found = read(f"{tmp_path}/*.parquet")
    assert (found.rows, [p.ground_truth for p in found.problems]) == (3, ["01", "02"])


def test_mapped_columns(tmp_path: Path) -> None:
    rows = [{"task": {"text": "2 + 2", "kind": {"name": "sums"}}, "answer": 4, "task.text": "flat"}]
    keys = {"prompt_column": "task.text", "ground_truth_column": "answer", "family_column": "task.kind.name"}
    for path in (write(tmp_path / "p.jsonl", *rows), parquet(tmp_path / "p.parquet", rows)):
        (problem,) = read(path, **keys).problems
        assert (problem.prompt, problem.ground_truth, problem.family) == ("flat", "4", "sums")  # a whole name first
        (problem,) = read(path, **{**keys, "prompt_column": "task.kind.name"}).problems
        assert problem.prompt == "sums"


def test_one_mapped_column_leaves_the_others_known(tmp_path: Path) -> None:
    path = parquet(tmp_path / "p.parquet", [published(1, 1)])
    (problem,) = read(path, family_column="ability").problems
    assert (problem.ground_truth, problem.family) == ("01", "MATH")


def test_an_integer_is_its_digits(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "x", "ground_truth": -7}, {"prompt": "x", "ground_truth": "-7"})
    assert [p.ground_truth for p in read(path).problems] == ["-7"]


PROBLEMS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1)), min_size=1, max_size=30)


@given(PROBLEMS, st.randoms(use_true_random=False), st.integers(0, 30))
def test_no_order_and_no_cut_into_files_changes_what_is_found(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[int, int]], shuffling: random.Random, cut: int
) -> None:
    """Not even where rows contradict each other: then none of them is right, and all are counted."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"prompt": str(i), "ground_truth": str(truth)} for i, truth in drawn]
    truths: dict[str, set[str]] = {}
    for r in rows:
        truths.setdefault(r["prompt"], set()).add(r["ground_truth"])
    wanted = {prompt for prompt, said in truths.items() if len(said) == 1}
    bad = sum(r["prompt"] not in wanted for r in rows)
    write(folder / "one.jsonl", *rows)
    shuffling.shuffle(rows)
    write(folder / "x1.jsonl", *rows[:cut])
    write(folder / "x2.jsonl", *rows[cut:])
    for pattern in ("one", "x*"):
        if not wanted:
            assert "holds no problem: all" in refused(f"{folder}/{pattern}.jsonl", skip_bad_rows=True)
            continue
        found = read(f"{folder}/{pattern}.jsonl", skip_bad_rows=True)
        assert {p.prompt for p in found.problems} == wanted
        assert (found.rows, found.bad_rows) == (len(rows), bad)


def test_the_split_is_the_prompts_whatever_is_put_around_them(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", *[row(i) for i in range(100)])
    before = split(read(path).problems, 0.2)
    after = split(read(path, template="Q: {prompt}\nA:").problems, 0.2)
    for one, two in zip(before, after, strict=True):
        assert [p.prompt_id for p in one] == [p.prompt_id for p in two]
        assert [f"Q: {p.prompt}\nA:" for p in one] == [p.prompt for p in two]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(TEXT, TEXT, TEXT, TEXT)
def test_nothing_but_the_prompt_reaches_the_prompt(one: str, two: str, before: str, after: str) -> None:
    """Another ground truth or family changes no letter of it, and what looks like a template in it stays text."""
    section = Problems(source="file", path="p", template=before.replace("{", "") + "{prompt}" + after.replace("}", ""))
    found = []
    for truth in (one, two):
        values = {"prompt": "{ground_truth} %s {prompt}", "ground_truth": truth, "family": truth, "solution": truth}
        found += collect([Row("p:1", values.keys(), values)], 1, section, renderer(section), "p").problems
    assert [p.ground_truth for p in found] == [one, two]
    assert {p.prompt for p in found} == {section.template.replace("{prompt}", "{ground_truth} %s {prompt}")}


# Bad rows

COLUMNS = "(columns ['ground_truth'])"
BAD: list[tuple[object, str]] = [
    ({"prompt": "x"}, "column 'ground_truth': found none (columns ['prompt'])"),
    ({"ground_truth": "x"}, f"column 'prompt': found none {COLUMNS}"),
    ({"prompt": "x", "ground_truth": None}, "column 'ground_truth': expected a text, found null"),
    ({"prompt": "x", "ground_truth": ""}, "column 'ground_truth': expected a text, found ''"),
    ({"prompt": "x", "ground_truth": 0.5}, "column 'ground_truth': expected a text, found 0.5"),
    ({"prompt": "x", "ground_truth": True}, "column 'ground_truth': expected a text, found True"),
    ({"prompt": "x", "ground_truth": ["7"]}, "column 'ground_truth': expected a text, found ['7']"),
    ({"prompt": " \n", "ground_truth": "7"}, "column 'prompt': expected a text or chat messages, found ' \\n'"),
    ({"prompt": 5, "ground_truth": "7"}, "column 'prompt': expected a text or chat messages, found 5"),
    ({"prompt": "x", "ground_truth": "\ud800"}, "column 'ground_truth': holds half of a surrogate pair"),
    ({"prompt": "\udfff", "ground_truth": "7"}, "column 'prompt': holds half of a surrogate pair"),
    ({"prompt": "x", "ground_truth": "7", "family": 0.5}, "column 'family': expected a text, found 0.5"),
    ({"prompt": [], "ground_truth": "7"}, "column 'prompt': expected a text or chat messages, found []"),
    ({"prompt": "x", "reward_model": "7"}, "column 'reward_model.ground_truth': found none"),
    ({"prompt": "x", "reward_model": {"style": "rule"}}, "column 'reward_model.ground_truth': found none"),
    ({"prompt": "x", "reward_model": {"ground_truth": None}}, "column 'reward_model.ground_truth': expected a text"),
    ({"prompt": "What is 1 + 1?", "ground_truth": "3"}, "the same prompt has '3' here and '2' above"),
    ({"prompt": "x", "ground_truth": "y" * 999 + "\ud800"}, "(1007 characters)"),
    ('{"prompt": "x"', "not JSON"),
    (["x", "7"], "expected an object, found list"),
]


@pytest.mark.parametrize(("line", "said"), BAD)
def test_a_bad_row_is_refused_where_it_stands(tmp_path: Path, line: object, said: str) -> None:
    path = write(tmp_path / "p.jsonl", row(1), "", line, row(2))
    found = refused(path)
    assert found.startswith(f"{path}:3: ")
    assert said in found
    assert found.endswith("; cure it, or leave such rows out with --skip-bad-rows")


def test_bad_rows_are_counted_and_listed_instead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for line, said in BAD if "the same prompt" not in said]
    path = write(tmp_path / "p.jsonl", row(1), *lines, *lines, row(2), row(1))
    found = read(path, skip_bad_rows=True)
    assert [p.prompt for p in found.problems] == [row(1)["prompt"], row(2)["prompt"]]
    assert (found.rows, found.bad_rows) == (3 + 2 * len(lines), 2 * len(lines))
    events = [event for event in map(parse, capsys.readouterr().out.splitlines()) if event]
    said = [event["row"] for event in events if event["vapo"] == "bad_row"]
    assert len(said) == LISTED
    assert said[0] == f"{path}:2: column 'ground_truth': found none (columns ['prompt'])"


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    path = parquet(tmp_path / "p.parquet", [{"question": "x", "answer": "7"}])
    said = "row 1: column 'prompt': found none (columns ['answer', 'question'])"
    assert said in refused(path)
    assert f"holds no problem: all 1 rows are bad, say {path}: {said}" in refused(path, skip_bad_rows=True)
    (tmp_path / "p.csv").write_text("question,answer\nx,7\n")
    assert "p.csv:2: column 'prompt': found none" in refused(tmp_path / "p.csv")


def test_nulls_and_other_types_in_parquet(tmp_path: Path) -> None:
    for truth, said in ((None, "null"), (0.5, "0.5"), (b"7", "b'7'"), ({"a": 1}, "{'a': 1}")):
        path = parquet(tmp_path / "p.parquet", [row(1), {"prompt": "x", "ground_truth": truth}][truth is not None :])
        assert f"column 'ground_truth': expected a text, found {said}" in refused(path)


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv"])
def test_a_file_without_problems(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\n")
    with pytest.raises(UserError, match=r"^problems\.heldout_path '.*' holds no problem$"):
        read(tmp_path / name, "problems.heldout_path")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "p.parquet")
    assert refused(tmp_path / "p.parquet").endswith("holds no problem")


@pytest.mark.parametrize(
    ("kind", "truth", "said"),
    [
        ("integer", "7.0", "ground truth '7.0' is no integer (problems.ground_truths 'integer')"),
        ("integer", "seven", "is no integer"),
        ("math", "\\frac{1}{", "is no number and no LaTeX expression"),
    ],
)
def test_ground_truths_of_the_wrong_kind(tmp_path: Path, kind: Any, truth: str, said: str) -> None:
    wrong = {"prompt": "x", "ground_truth": truth}
    path = write(tmp_path / "p.jsonl", row(1), wrong, wrong, {"prompt": "y", "ground_truth": "-016"})
    found = refused(path, ground_truths=kind)
    assert found.startswith(f"{path}:2: ")
    assert said in found
    skipped = read(path, ground_truths=kind, skip_bad_rows=True)
    assert [p.ground_truth for p in skipped.problems] == ["2", "-016"]
    assert (skipped.rows, skipped.bad_rows) == (4, 2)
    assert len(read(path).problems) == 3  # any text
