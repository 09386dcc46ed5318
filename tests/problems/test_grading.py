"""The grader: only what a response ends with counts, integers are integers, and nothing makes it slow."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapo.problems.grading import Verdict, answer_line


@pytest.mark.parametrize(
    ("response", "truth", "extracted"),
    [
        ("#1 +3 = 0 answer 7", "7", "7"),
        ("answer 7", "7", "7"),
        ("so\nAnswer: 7", "7", "7"),
        ("the ANSWER :  7  \n", "7", "7"),
        ("answer 016", "16", "016"),
        ("answer 16", "016", "16"),
        ("answer +16", "16", "+16"),
        ("answer -0", "0", "-0"),
        ("answer -3", "-3", "-3"),
        ("answer x", "x", "x"),
        ("answer 3 no answer 7", "7", "7"),
    ],
)
def test_matched(response: str, truth: str, extracted: str) -> None:
    assert answer_line(response, truth, "stop") == Verdict(True, extracted, "matched")


@pytest.mark.parametrize(
    ("response", "truth", "extracted"),
    [
        ("answer 8", "7", "8"),
        ("answer -7", "7", "-7"),
        ("answer 77", "7", "77"),
        ("answer 7x", "7", "7x"),
        ("answer 7.5", "7", "7.5"),
        ("answer 7 answer 3", "7", "3"),  # the truth in the middle, another at the end
        ("7 7 7 answer 0", "7", "0"),
        ("answer X", "x", "X"),
    ],
)
def test_different(response: str, truth: str, extracted: str) -> None:
    assert answer_line(response, truth, "stop") == Verdict(False, extracted, "different")


@pytest.mark.parametrize(
    "response",
    [
        "",
        "7",
        "it is 7",
        "answer",
        "answer ",
        "answer:",
        "answer7",
        "answer 7 and so on",
        "answer 7 #3 +1 = 8",
        "the answer 7 is right",
        "reanswer 7",
        "answer seven times 7",
    ],
)
def test_no_answer(response: str) -> None:
    """The truth is in most of them, but it is not what the response ends with as its answer."""
    assert answer_line(response, "7", "stop") == Verdict(False, "", "no_answer")


@given(st.sampled_from(["answer 7", "", "7", "answer 3"]))
def test_a_truncated_response_has_no_answer(response: str) -> None:
    assert answer_line(response, "7", "length") == Verdict(False, "", "truncated")


@given(st.integers(-(10**30), 10**30), st.integers(0, 5), st.text("#0123456789+x-=~ again", max_size=40))
def test_an_integer_is_its_value_however_it_is_written(number: int, zeros: int, before: str) -> None:
    written = f"{'-' if number < 0 else ''}{'0' * zeros}{abs(number)}"
    assert answer_line(f"{before} answer {written}", str(number), "stop").correct
    assert not answer_line(f"{before} answer {written}", str(number + 1), "stop").correct


@given(st.text(max_size=60), st.text(max_size=10))
def test_any_text_has_a_verdict(response: str, truth: str) -> None:
    found = answer_line(response, truth, "stop")
    assert found.correct is (found.why == "matched")
    assert found.why in {"matched", "different", "no_answer"}
    assert found.extracted in response
    assert (found.extracted == "") is (found.why == "no_answer")


LONG = 40_000  # more than the longest response's characters between words


@pytest.mark.parametrize(
    "response",
    [
        "answer " + "9" * LONG,
        "answer " + "9" * LONG + " x",
        "answer" + " " * LONG,
        "answer" + " " * LONG + "x y",
        "answer :" + " " * LONG + "x y",
        "answer x" + " " * LONG + "y",
        " " * LONG,
        "answer " * (LONG // 7),
        "answer : " * (LONG // 9) + "?" * LONG,
        "answer " + "\u0663" * LONG,
    ],
)
def test_no_response_takes_long(response: str) -> None:
    """Spaces and digits without end: the grader meets whatever a model says."""
    began = time.perf_counter()
    answer_line(response, "7", "stop")
    assert time.perf_counter() - began < 0.5


def test_a_huge_integer_is_compared_as_text() -> None:
    """Beyond Python's limit for int(): no exception, still itself and nothing else."""
    huge = "9" * 100_000
    assert answer_line(f"answer {huge}", huge, "stop").why == "matched"
    assert answer_line(f"answer {huge}", huge[1:], "stop").why == "different"
