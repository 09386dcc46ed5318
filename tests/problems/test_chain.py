"""Chains: answers checked by another reading of the prompt, and worked examples whose slips are as documented."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapo.problems import chain
from vapo.problems.chain import Chain, apply, draw, worked_example

chains = st.integers(0, 10**6).map(lambda seed: draw(random.Random(seed), 1, 40))


def solve(prompt: str) -> int:
    """The answer from the prompt's text alone, in plain arithmetic on the whole number."""
    words = prompt.split()
    assert words[0] == "start"
    assert words[-1] == "?"
    number = int(words[1])
    for operation in words[3:-1:2]:
        number = eval(f"({number}) {operation.replace('x', '*')}")
    return number % 10


@dataclass
class Step:
    """One written step: what was right given the digit before, what was written, how."""

    operation: str
    right: int
    first: int
    quick: bool
    again: int | None


def read(c: Chain, text: str) -> tuple[list[Step], int]:
    """The steps of a worked example, and its answer; refuses any text that does not follow the grammar."""
    body, _, answer = text.rpartition(" answer ")
    steps, digit = [], c.start
    rest = body
    for i, operation in enumerate(c.operations):
        found = re.match(
            rf"#{c.first_label + i} {re.escape(operation)} ([~=]) (\d)(?: again (\d))?(?: |$)",
            rest,
        )
        assert found, rest
        rest = rest[found.end() :]
        again = None if found[3] is None else int(found[3])
        steps.append(Step(operation, apply(digit, operation), int(found[2]), found[1] == "~", again))
        digit = steps[-1].first if again is None else again
    assert rest == ""
    assert int(answer) == digit
    return steps, digit


@pytest.fixture(scope="module")
def steps() -> list[Step]:
    """All steps of 3000 worked examples, about 60,000."""
    generator = random.Random(11)
    return [
        step for _ in range(3000) for c in [draw(generator, 1, 40)] for step in read(c, worked_example(generator, c))[0]
    ]


def test_golden() -> None:
    c = Chain(7, ("+3", "x7", "-2"), 12)
    assert c.prompt == "start 7 #12 +3 #13 x7 #14 -2 ?"
    assert c.answer == 8  # 0, 0, 8


@given(chains)
def test_the_answer_is_the_prompts(c: Chain) -> None:
    assert solve(c.prompt) == c.answer


@given(chains)
def test_the_prompt_holds_nothing_but_its_inputs(c: Chain) -> None:
    """Start digit, labels that run on, operations: no digit that was worked out."""
    assert re.fullmatch(r"start \d( #\d+ [+x-]\d)+ \?", c.prompt)
    labels = [int(label) for label in re.findall(r"#(\d+)", c.prompt)]
    assert labels == list(range(labels[0], labels[0] + len(c.operations)))
    assert labels[0] >= 1
    assert labels[-1] <= chain.LABELS
    assert tuple(re.findall(r"[+x-]\d", c.prompt)) == c.operations


@pytest.mark.parametrize("operation", chain.OPERATIONS)
def test_operations_are_bijections(operation: str) -> None:
    """One slip makes the answer wrong: no operation forgets the digit before it."""
    assert sorted(apply(digit, operation) for digit in range(10)) == list(range(10))
    assert [apply(digit, operation) for digit in range(10)] != list(range(10))


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(0, 39))
def test_lengths_are_as_asked(seed: int, low: int, more: int) -> None:
    high = min(40, low + more)
    assert low <= len(draw(random.Random(seed), low, high).operations) <= high


def test_every_length_start_label_and_operation_occurs() -> None:
    generator = random.Random(0)
    drawn = [draw(generator, 5, 40) for _ in range(3000)]
    assert {len(c.operations) for c in drawn} == set(range(5, 41))
    assert {c.start for c in drawn} == set(range(10))
    assert {c.first_label for c in drawn} == set(range(1, 37))
    assert {op for c in drawn for op in c.operations} == set(chain.OPERATIONS)


@given(chains, st.integers(0, 10**6))
def test_a_worked_example_follows_the_grammar_and_its_own_digits(c: Chain, seed: int) -> None:
    read(c, worked_example(random.Random(seed), c))


def share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


@pytest.mark.parametrize("kind", ["+", "-", "x"])
def test_how_often_steps_are_quick(steps: list[Step], kind: str) -> None:
    """0.14 of the sums, 0.35 of the products."""
    found = share([s.quick for s in steps if s.operation[0] == kind])
    assert found == pytest.approx(chain.QUICK[kind], abs=0.015)


def test_how_often_steps_are_wrong(steps: list[Step]) -> None:
    """Quick steps 0.6, careful ones 0.005, second looks 0.005 whatever stood before."""
    assert share([s.first != s.right for s in steps if s.quick]) == pytest.approx(0.6, abs=0.02)
    assert 0.003 < share([s.first != s.right for s in steps if not s.quick]) < 0.007
    looks = [s for s in steps if s.again is not None]
    assert len(looks) > 2000
    assert share([s.again != s.right for s in looks]) < 0.01


def test_second_looks_follow_quick_steps_right_or_wrong(steps: list[Step]) -> None:
    """ "again" is no sign of a slip: it comes as often after a right step."""
    assert not any(s.again is not None for s in steps if not s.quick)
    for wrong in (False, True):
        found = share([s.again is not None for s in steps if s.quick and (s.first != s.right) is wrong])
        assert found == pytest.approx(0.4, abs=0.03)


def test_a_slip_is_any_other_digit(steps: list[Step]) -> None:
    off = Counter((s.first - s.right) % 10 for s in steps if s.quick and s.first != s.right)
    assert set(off) == set(range(1, 10))
    assert max(off.values()) < 1.3 * min(off.values())


def test_long_chains_are_mostly_wrong() -> None:
    """What reinforcement learning starts from: an answer is right now and then."""
    generator = random.Random(2)
    drawn = [draw(generator, 20, 40) for _ in range(400)]
    assert 0.05 < share([read(c, worked_example(generator, c))[1] == c.answer for c in drawn]) < 0.4
