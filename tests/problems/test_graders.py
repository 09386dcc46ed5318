"""The graders by name: exact, custom, math's ground truths, formats, and what starts no worker."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from vapo.errors import UserError
from vapo.problems.graders import Row, grade
from vapo.problems.grading import Verdict
from vapo.recipe import Verification


def graded(rows: list[tuple[str, str]], **section: Any) -> list[Verdict]:
    found = [Row(response, truth, "stop") for response, truth in rows]
    return grade(Verification(**section), found, {row.truth: row.truth for row in found}, lambda done: None)[0]


def test_exact_is_text() -> None:
    rows = [("\\boxed{x y}", "x y"), ("Answer: 016", "16"), ("<answer>A</answer>", "a"), ("A", "A")]
    assert [v.why for v in graded(rows, grader="exact")] == ["matched", "different", "different", "no_answer"]
    assert [v.why for v in graded([(" A\n", "A"), ("A.", "A")], grader="exact", answer_in=())] == [
        "matched",
        "different",
    ]


def test_the_order_of_places_is_the_recipes() -> None:
    row = [("\\boxed{1} <answer>2</answer>", "2")]
    assert not graded(row, grader="math")[0].correct
    assert graded(row, grader="math", answer_in=("tag", "boxed"))[0].correct


def test_no_worker_starts_without_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo, exact and integers are graded here: nothing is imported and no process starts."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert graded([("answer 7", "7")], grader="answer_line")[0].correct
    assert graded([("\\boxed{7}", "7")], grader="exact")[0].correct
    rows = [("\\boxed{016}", "16"), ("\\boxed{0.5}", "1/2"), ("no", "3"), ("\\boxed{" + "(" * 99, "3")]
    assert [v.why for v in graded(rows, grader="math")] == ["matched", "matched", "no_answer", "no_answer"]


def test_equal_numbers_are_extracted_as_equal_texts() -> None:
    """So that a majority can be counted."""
    rows = [(f"\\boxed{{{a}}}", "16") for a in ("016", "16.0", "$16$", "１６", "16 cm")]
    assert {v.extracted for v in graded(rows, grader="math")} == {"16"}


@pytest.mark.parametrize(
    ("truth", "said"),
    [
        ("", "is empty"),
        ("\\frac{1}{", "no number and no LaTeX expression"),
        ("__import__('os')", "no number and no LaTeX expression"),
        ("\\frac{1}{0}", "is undefined"),
        ("7" * 1001, "is 1001 characters long"),
        ("9^{9^{9^9}} + \\int_0^1 x dx + (10^9)!", ""),
    ],
)
def test_a_ground_truth_that_math_cannot_read(truth: str, said: str) -> None:
    """Before anything is graded; one that only takes long to compare is readable."""
    pytest.importorskip("math_verify")
    if not said:
        assert graded([("no", truth)], grader="math")[0].why == "no_answer"
        return
    with pytest.raises(UserError, match=r"set verification\.grader to another than 'math'") as raised:
        graded([("\\boxed{1}", "1"), ("\\boxed{7}", truth)], grader="math")
    assert said in str(raised.value)
    assert truth[:60] in str(raised.value)


@pytest.mark.parametrize("truth", [r"\boxed{16}", "$16$", "016", " 16 "])
def test_a_ground_truth_as_data_sets_write_it(truth: str) -> None:
    assert graded([("\\boxed{16}", truth)], grader="math")[0].correct


CUSTOM = """
from vapo.problems.grading import Verdict
def same(response, truth): return response == truth
def share(response, truth): return 0.5
def record(response, truth): return Verdict(False, "mine", "different", 0.25)
def wrong(response, truth): return Verdict(True, "", "different")
def text(response, truth): return "yes"
def many(response, truth): return 2
def nothing(response, truth): return None
def fails(response, truth): raise ValueError("no key")
value = 3
"""


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(CUSTOM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("place", ["mine.py", "mine", "{}/mine.py"])
def test_a_custom_grader(custom: Path, place: str) -> None:
    section = {"grader": "custom", "custom": f"{place.format(custom)}:same"}
    assert graded([("a", "a"), ("a", "b")], **section) == [
        Verdict(True, "", "matched"),
        Verdict(False, "", "different"),
    ]


def test_a_custom_score_or_verdict(custom: Path) -> None:
    assert graded([("a", "a")], grader="custom", custom="mine:share")[0] == Verdict(False, "", "different")
    assert graded([("a", "a")], grader="custom", custom="mine:share", partial_scores=True)[0].partial == 0.5
    assert graded([("a", "a")], grader="custom", custom="mine:share", min_score=0.5)[0].correct
    assert graded([("a", "a")], grader="custom", custom="mine:record")[0] == Verdict(False, "mine", "different", 0.25)


@pytest.mark.parametrize("name", ["wrong", "text", "many", "nothing", "fails"])
def test_a_custom_grader_that_fails_is_an_error(custom: Path, name: str) -> None:
    rows = [Row("a", "a", "stop")]
    verdicts, _, said = grade(Verification(grader="custom", custom=f"mine:{name}"), rows, {"p": "a"}, lambda done: None)
    assert verdicts == [Verdict(False, "", "error")]
    assert said[0].startswith(("ValueError: ", "TypeError: "))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("mine", 'write "package.module:function"'),
        ("gone.py:f", "gone.py is not there"),
        ("gone.module:f", "No module named 'gone'"),
        ("mine.py:f", "has no function 'f', it has "),
        ("mine.py:value", "has no function 'value'"),
        ("broken.py:f", "importing it fails: SyntaxError"),
    ],
)
def test_a_custom_grader_that_is_not_there(custom: Path, path: str, said: str) -> None:
    (custom / "broken.py").write_text("def f(:\n")
    with pytest.raises(UserError, match=r"verification\.custom") as raised:
        graded([("a", "a")], grader="custom", custom=path)
    assert said in str(raised.value)


def test_a_format_is_searched_in_workers_and_changes_no_verdict() -> None:
    rows = [Row(r, "7", "stop") for r in ("<think>x</think> answer 7", "answer 7", "<think></think> answer 8")]
    section = Verification(format_pattern=r"^<think>.*</think>", format_reward=0.5)
    verdicts, formats, _ = grade(section, rows, {"p": "7"}, lambda done: None)
    assert formats == [True, False, True]
    assert verdicts == grade(Verification(), rows, {"p": "7"}, lambda done: None)[0]


def test_a_pattern_that_takes_for_ever() -> None:
    rows = [Row("a" * 60 + "b", "7", "stop")] + [Row("aaa", "7", "stop")] * 9
    pattern = {"format_pattern": "^(a+)+$", "format_reward": 1.0, "time_limit": 0.3}
    with pytest.raises(UserError, match=r"on 1 of 10 responses it did not end within 0\.3 s: write it without nested"):
        grade(Verification(**pattern), rows, {"p": "7"}, lambda done: None)
    assert (
        grade(Verification(**pattern, max_error_share=0.1), rows, {"p": "7"}, lambda done: None)[1]
        == [False] + [True] * 9
    )
