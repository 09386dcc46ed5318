"""avg@k, pass@k and cons@k against counting, by hand, and in the relations that hold between them."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapo.evaluate.measures import avg_at_k, cons_at_k, leaders, normal, pass_at_k

verdicts = st.integers(1, 7).flatmap(
    lambda k: st.lists(st.lists(st.booleans(), min_size=k, max_size=k), min_size=1, max_size=4)
)
votes = st.lists(st.sampled_from(["", "1", "2", "3"]), min_size=1, max_size=12)


def counted(graded: list[list[bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([len(g) for g in graded], np.int32), np.array([sum(g) for g in graded], np.int32)


def ones(answers: list[str]) -> list[bool]:
    """Verdicts where "1" is the truth."""
    return [answer == "1" for answer in answers]


@given(verdicts, st.data())
def test_point_20_pass_at_k_is_the_share_of_choices(graded: list[list[bool]], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(graded[0])))
    expected = [np.mean([any(chosen) for chosen in combinations(g, k)]) for g in graded]
    assert pass_at_k(*counted(graded), k) == pytest.approx(expected, abs=1e-12)


@given(verdicts)
def test_point_20_avg_at_k_is_the_mean_of_means_and_pass_at_1(graded: list[list[bool]]) -> None:
    samples, correct = counted(graded)
    assert avg_at_k(samples, correct) == pytest.approx([np.mean(g) for g in graded])
    assert pass_at_k(samples, correct, 1) == pytest.approx(avg_at_k(samples, correct))


@given(verdicts)
def test_pass_at_k_never_falls_with_k(graded: list[list[bool]]) -> None:
    samples, correct = counted(graded)
    curve = np.array([pass_at_k(samples, correct, k) for k in range(1, len(graded[0]) + 1)])
    assert (np.diff(curve, axis=0) >= -1e-12).all()
    assert (curve[-1] == (correct > 0)).all()


def test_prompts_count_alike_whatever_their_samples() -> None:
    assert avg_at_k(np.array([1, 99]), np.array([1, 0])).mean() == 0.5


def test_pass_at_k_of_many_samples_is_exact() -> None:
    """Numbers whose factorials overflow floats: one of 2000 correct, half of them chosen."""
    assert pass_at_k(np.array([2000], np.int32), np.array([1], np.int32), 1000)[0] == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize(
    ("answers", "k", "expected"),
    [
        (["1", "1", "2"], 3, 1.0),
        (["1", "2", "2"], 3, 0.0),
        (["1", "2"], 2, 0.5),  # a tie is broken by lot
        (["1", "2", "3", "3", "2", "1"], 6, 1 / 3),
        (["2", "3", "1"], 3, 1 / 3),
        (["", "", "1"], 3, 1.0),  # who has no answer has no vote
        (["", "", ""], 3, 0.0),
        (["", "2", "1", "1", "2", "2"], 3, 0.25),  # blocks: a tie, then 2
        (["1", "2", "2", "1", "1"], 2, 0.5),  # two ties; the fifth sample is left over
        (["1", "1", "2", "2", "2"], 2, 0.5),
        (["1"], 1, 1.0),
    ],
)
def test_cons_at_k_by_hand(answers: list[str], k: int, expected: float) -> None:
    assert cons_at_k(answers, ones(answers), k) == pytest.approx(expected)


@given(votes)
def test_cons_at_1_is_avg_at_k(answers: list[str]) -> None:
    assert cons_at_k(answers, ones(answers), 1) == pytest.approx(np.mean(ones(answers)))


@given(votes, st.randoms())
def test_the_vote_of_all_samples_ignores_their_order(answers: list[str], random: object) -> None:
    shuffled = list(answers)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    n = len(answers)
    assert cons_at_k(shuffled, ones(shuffled), n) == cons_at_k(answers, ones(answers), n)


@given(st.lists(st.sampled_from(["", "1", "2"]), min_size=1, max_size=6), st.data())
def test_blocks_are_unbiased(answers: list[str], data: st.DataObject) -> None:
    """Over all orders of the samples the mean is that over all choices of k of them."""
    k = data.draw(st.integers(1, len(answers)))
    every = np.mean([cons_at_k(list(o), ones(list(o)), k) for o in permutations(answers)])
    choices = np.mean([cons_at_k(list(c), ones(list(c)), k) for c in combinations(answers, k)])
    assert every == pytest.approx(choices)


@given(votes, st.integers(1, 12))
def test_nobody_is_right_by_vote_where_nobody_is_right(answers: list[str], k: int) -> None:
    none = [False] * len(answers)
    assert cons_at_k(answers, none, min(k, len(answers))) == 0.0


def test_leaders() -> None:
    assert leaders(["2", "1", "", "2", "1", "3"]) == ["2", "1"]
    assert leaders(["", "7", ""]) == ["7"]
    assert leaders(["", ""]) == leaders([]) == []


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (" 16", "016", True),
        ("+16", "16", True),
        ("-0", "0", True),
        ("\u0661\u0666", "16", True),  # Arabic-Indic digits
        ("x  + 1", "x + 1\n", True),
        ("-16", "16", False),
        ("1/2", "0.5", False),
        ("a", "A", False),
        ("9" * 5000, "0" + "9" * 5000, False),  # more digits than Python reads: compared as text
    ],
)
def test_equal_answers_have_one_form(one: str, other: str, same: bool) -> None:
    assert (normal(one) == normal(other)) == same


@given(st.text(max_size=20))
def test_a_form_is_its_own_form(text: str) -> None:
    assert normal(normal(text)) == normal(text)
