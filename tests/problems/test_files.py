"""Problem files: what is read, what is refused and where, and a split that no order changes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from vapo.errors import UserError
from vapo.problems.files import Problem, identity, read_problems, split


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines), encoding="utf-8")
    return path


def row(i: int) -> dict[str, str]:
    return {"prompt": f"What is {i} + {i}?", "ground_truth": str(2 * i)}


def test_reading(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", row(1), "", {**row(2), "family": "sums", "source": "ignored"}, "   ")
    assert read_problems(path) == [
        Problem(identity("What is 1 + 1?"), "What is 1 + 1?", "2", "file", 0),
        Problem(identity("What is 2 + 2?"), "What is 2 + 2?", "4", "sums", 0),
    ]


def test_identity_is_the_texts_and_never_changes() -> None:
    assert identity("") == "e3b0c44298fc1c14"  # the start of sha256 of nothing
    assert identity("a") != identity("a ")


def test_each_problem_once(tmp_path: Path) -> None:
    """AIME files often hold each problem 32 times."""
    path = write(tmp_path / "p.jsonl", *[row(i % 30) for i in range(960)])
    assert [p.prompt for p in read_problems(path)] == [row(i)["prompt"] for i in range(30)]


def test_contradicting_ground_truths(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", row(1), row(2), {**row(1), "ground_truth": "3"})
    with pytest.raises(UserError, match=r"p\.jsonl:3: the same prompt has ground_truth '3' here and '2' above"):
        read_problems(path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "x"', "p.jsonl:3: not JSON"),
        ({"prompt": "x"}, "p.jsonl:3: key 'ground_truth': expected a text, found none (keys ['prompt'])"),
        ({"ground_truth": "x"}, "p.jsonl:3: key 'prompt': expected a text, found none"),
        ({"prompt": "x", "ground_truth": 7}, "p.jsonl:3: key 'ground_truth': expected a text, found 7"),
        ({"prompt": "x", "ground_truth": None}, "p.jsonl:3: key 'ground_truth': expected a text, found None"),
        ({"prompt": " ", "ground_truth": "7"}, "p.jsonl:3: key 'prompt': expected a text, found ' '"),
        (["x", "7"], "p.jsonl:3: key 'prompt': expected a text, found list"),
        ("7", "p.jsonl:3: key 'prompt': expected a text, found int"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, said: str) -> None:
    """The number is the editor's: empty lines count."""
    path = write(tmp_path / "p.jsonl", row(1), "", line, row(2))
    with pytest.raises(UserError) as error:
        read_problems(path)
    assert str(error.value).startswith(str(tmp_path))
    assert said in str(error.value)


def test_no_file_no_problem_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file: give a JSONL file"):
        read_problems(tmp_path / "p.jsonl")
    with pytest.raises(UserError, match="holds no problem"):
        read_problems(write(tmp_path / "empty.jsonl", "", ""))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9", "ground_truth": "1"}')
    with pytest.raises(UserError, match=r"latin\.jsonl.*not UTF-8"):
        read_problems(tmp_path / "latin.jsonl")


@pytest.mark.parametrize("text", ["one\u2028two", "one\u2029two", "one\x85two"])
def test_only_a_newline_ends_a_line(tmp_path: Path, text: str) -> None:
    """JSON may hold Unicode's other line ends as they are, and exports do; a byte-order mark is no text either."""
    line = json.dumps({"prompt": text, "ground_truth": "1"}, ensure_ascii=False)
    (tmp_path / "p.jsonl").write_text(line + "\r\n" + line + "\n", encoding="utf-8-sig", newline="")
    assert [p.prompt for p in read_problems(tmp_path / "p.jsonl")] == [text]


def test_the_split_does_not_depend_on_the_order(tmp_path: Path) -> None:
    lines = [row(i) for i in range(400)]
    train, heldout = split(read_problems(write(tmp_path / "a.jsonl", *lines)), 0.25)
    random.Random(0).shuffle(lines)
    train_too, heldout_too = split(read_problems(write(tmp_path / "b.jsonl", *lines)), 0.25)
    assert set(train) == set(train_too)
    assert set(heldout) == set(heldout_too)
    assert set(train).isdisjoint(heldout)
    assert len(train) + len(heldout) == 400
    assert 70 < len(heldout) < 130


def test_a_new_problem_moves_no_other(tmp_path: Path) -> None:
    """And a larger share holds out all that a smaller one does."""
    problems = read_problems(write(tmp_path / "p.jsonl", *[row(i) for i in range(200)]))
    few, some = (set(split(problems[:100], share)[1]) for share in (0.1, 0.3))
    assert few < some
    assert set(split(problems, 0.3)[1]) & set(problems[:100]) == some
