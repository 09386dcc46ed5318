"""Where an answer is looked for: what decides is the last of the first place that occurs."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapo.problems.extraction import extract

ALL = ("boxed", "tag", "line")


@pytest.mark.parametrize(
    ("response", "places", "answer"),
    [
        ("\\boxed{1} <answer>2</answer>\nAnswer: 3", ALL, "1"),
        ("\\boxed{1} <answer>2</answer>\nAnswer: 3", ("tag", "line"), "2"),
        ("\\boxed{1} <answer>2</answer>\nAnswer: 3", ("line", "boxed"), "3"),
        ("\\boxed{1} <answer>2</answer>\nAnswer: 3", ("tag", "boxed"), "2"),
        ("Answer: 3", ("boxed", "line"), "3"),
        ("Answer: 3", ("boxed",), None),
        ("<answer>a\nb</answer>", ("tag",), "a\nb"),
        ("Answer: **3** \nand so on", ("line",), "3"),
        (" 3 \n", (), "3"),
        (" ", (), None),
        ("\\boxed{\\frac{1}{2}}", ALL, "\\frac{1}{2}"),
        ("\\boxed{\\{1\\}}", ALL, "\\{1\\}"),
        ("\\boxed{1} and \\boxed{", ("boxed", "line"), None),
    ],
)
def test_places(response: str, places: tuple[str, ...], answer: str | None) -> None:
    assert extract(response, places) == answer


@given(st.text(alphabet="ab12{}\\ ", max_size=30), st.text(alphabet="xy0123^+ ", min_size=1, max_size=20))
def test_the_last_box_is_found_whatever_stands_before(before: str, answer: str) -> None:
    assert extract(f"{before} \\boxed{{{answer}}} done", ALL) == (answer.strip() or None)


@given(st.text(alphabet="\\boxed{}fanswer:<>/ 7\n", max_size=80))
def test_any_text_has_an_answer_that_it_contains_or_none(response: str) -> None:
    answer = extract(response, ALL)
    assert answer is None or (answer and answer in response)


@pytest.mark.parametrize(
    "piece",
    ["\\boxed{", "{", "}", "\\}", "\\", "<answer>", "</answer>", "answer \t", "Answer:", " ", "\\boxed ", "answer*"],
)
def test_time_is_linear(piece: str) -> None:
    began = time.perf_counter()
    extract(piece * (1_000_000 // len(piece)), ALL)
    extract("\\boxed{" + piece * (1_000_000 // len(piece)), ALL)
    assert time.perf_counter() - began < 5
