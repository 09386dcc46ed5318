"""A prompt's identity, and the choices that follow from it: no order changes them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vapo.problems.problem import Problem, choose, identity, split

TEXTS = st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=40)


def made(prompts: list[str]) -> list[Problem]:
    return [Problem(identity(p), p, "7", "f", 0) for p in prompts]


def test_identity_is_the_texts_and_never_changes() -> None:
    assert identity("") == "e3b0c44298fc1c14"  # the start of sha256 of nothing
    assert identity("a") != identity("a ")


@given(TEXTS, st.randoms(use_true_random=False), st.floats(0.01, 0.99), st.integers(1, 40))
def test_the_split_and_the_choice_depend_on_no_order(prompts: list[str], random: object, share: float, n: int) -> None:
    problems = made(prompts)
    shuffled = problems[:]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for before, after in zip(split(problems, share), split(shuffled, share), strict=True):
        assert set(before) == set(after)
    assert set(choose(problems, n)) == set(choose(shuffled, n))
    assert len(choose(problems, n)) == min(n, len(problems))


@given(TEXTS, TEXTS, st.floats(0.01, 0.5))
def test_files_split_alone_or_merged_split_alike(one: list[str], two: list[str], share: float) -> None:
    """And a new problem moves no other."""
    merged = made(list(dict.fromkeys(one + two)))
    for part in range(2):
        assert set(split(merged, share)[part]) == set(split(made(one), share)[part]) | set(
            split(made(two), share)[part]
        )


def test_a_split_is_two_parts_near_their_shares() -> None:
    problems = made([str(i) for i in range(2000)])
    train, heldout = split(problems, 0.25)
    assert set(train).isdisjoint(heldout)
    assert len(train) + len(heldout) == 2000
    assert 430 < len(heldout) < 570
    assert set(heldout) < set(split(problems, 0.5)[1])  # a larger share holds out all that a smaller one does


def test_a_choice_keeps_the_order_and_grows() -> None:
    problems = made([str(i) for i in range(50)])
    few, some = choose(problems, 10), choose(problems, 20)
    assert [p for p in problems if p in few] == few
    assert set(few) < set(some)
    assert few != problems[:10]  # by hash, not by place
    assert choose(problems, 50) == problems
