"""Hundreds of hostile answers: each has its expected verdict, and none kills, delays or fattens the stage."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.problems.hostile import KINDS, ROWS, box
from vapo.problems import graders
from vapo.problems.graders import Row, grade
from vapo.problems.grading import WHYS, Verdict
from vapo.problems.pool import Job, Pool
from vapo.recipe import Verification

pytest.importorskip("math_verify")
LIMIT = 0.5


def graded(rows: list[tuple[str, str]], **changed: Any) -> list[Verdict]:
    section = Verification(**{"grader": "math", "time_limit": LIMIT, **changed})
    found = [Row(response, truth, "stop") for response, truth in rows]
    return grade(section, found, {row.truth: row.truth for row in found}, lambda done: None)[0]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> list[Verdict]:
    """Of all rows at once, in a folder in which code that runs would leave its mark; checks time and memory."""
    folder = tmp_path_factory.mktemp("hostile")
    before, began = Path.cwd(), time.perf_counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    os.chdir(folder)
    try:
        found = graded([(response, truth) for _, response, truth, _ in ROWS])
    finally:
        os.chdir(before)
    assert list(folder.iterdir()) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200 * 1024  # KiB
    late = sum(verdict.why == "time_out" for verdict in found)
    assert time.perf_counter() - began < 60 + late * LIMIT * 4
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_expected_verdicts(kind: str, verdicts: list[Verdict]) -> None:
    wrong = [
        (response[:80], truth[:40], why, verdict.why)
        for (of, response, truth, why), verdict in zip(ROWS, verdicts, strict=True)
        if of == kind and verdict.why != why
    ]
    assert wrong == []


def test_there_are_enough_and_of_every_verdict(verdicts: list[Verdict]) -> None:
    assert len({(response, truth) for _, response, truth, _ in ROWS}) > 450
    assert {verdict.why for verdict in verdicts} == set(WHYS) - {"truncated", "error"}
    assert all(verdict.correct == (verdict.why == "matched") for verdict in verdicts)


def test_a_truncated_response_has_no_answer_whatever_it_contains() -> None:
    rows = [Row(response, truth, "length") for _, response, truth, _ in ROWS]
    found = grade(Verification(grader="math"), rows, {"a": "7"}, lambda done: None)[0]
    assert set(found) == {Verdict(False, "", "truncated")}


def test_verdicts_do_not_depend_on_workers_or_order(verdicts: list[Verdict]) -> None:
    """Without those that take their whole time."""
    chosen = [i for i, verdict in enumerate(verdicts) if verdict.why != "time_out" and len(ROWS[i][1]) < 10_000]
    turned = chosen[::-1]
    found = graded([ROWS[i][1:3] for i in turned], workers=1)
    assert found == [verdicts[i] for i in turned]


# Where math-verify's own verdict is wrong or unsafe

THEIRS = [  # truth, answer, and why ours is another
    ("7", r"7\text{ million}", "it drops the word: seven million is not seven"),
    ("8", "7 = 8", "it takes an equation's last side: this one is false, and a chain of them holds any number"),
    ("3", "1 2", "it reads a mixed number without its fraction, and adds"),
    (r"7\text{ cm}", r"7\text{ km}", "it drops units, also two that differ"),
    (r"\frac{1}{10^{8}}\cdot 2", "0.00000003", "it rounds to six places: small numbers are all equal"),
    (r"\sqrt{2}\cdot 10^{-5}", "0.0000141424", "it rounds to six places, not to six digits"),
]


@pytest.mark.parametrize(("truth", "answer", "reason"), THEIRS)
def test_where_ours_differs_from_math_verify(truth: str, answer: str, reason: str) -> None:
    """If math-verify is mended this fails, and ours can go."""
    from math_verify import parse, verify

    theirs = verify(parse(f"${truth}$", parsing_timeout=None), parse(f"${answer}$", parsing_timeout=None))
    assert theirs, reason
    assert graded([(box(answer), truth)])[0].why == "different", reason


def test_math_verify_reads_prose_by_its_last_number() -> None:
    """It would find 42 in any text, and evaluate arithmetic in it: only its LaTeX grammar is asked."""
    from math_verify import parse, verify

    prose = "I do not know, 41 or 42"
    assert verify(parse("42", parsing_timeout=None), parse(prose, parsing_timeout=None))
    assert [v.why for v in graded([(prose, "42"), (box(prose), "42")])] == ["no_answer", "different"]


def test_the_fast_grammar_reads_as_the_slow_one() -> None:
    """What SLL prediction accepts, LL reads alike: over every short answer of the corpus that is read at all."""
    import importlib

    from vapo.problems import symbolic
    from vapo.problems.extraction import extract
    from vapo.problems.numbers import plain

    symbolic.prepare()  # the grammar is replaced
    kind = importlib.import_module("latex2sympy2_extended.latex2sympy2")._Latex2Sympy
    texts = {plain(extract(response, ("boxed",)) or "") for _, response, _, _ in ROWS if len(response) < 40}
    read = 0
    for text in sorted(texts):
        try:
            fast = kind(is_real=True)
            found = fast.parse(text)
        except Exception:  # noqa: BLE001 - not read by either
            continue
        slow = kind(is_real=True)
        slow.create_parser = lambda t, slow=slow: (setattr(slow, "sll", False), kind.create_parser(slow, t))[1]
        assert repr(slow.parse(text)) == repr(found), text
        read += fast.sll
    assert read > 100


PIECES = [
    "\\boxed{", "}", "{", "\\frac", "{1}", "{2}", "7", "-", "+", "^", "_", "\\sqrt", "\\{", "\\}", "(", ")", "[",
    ",", "x", "=", "\\text{", " cm", "0.5", "\\%", "\\pi", "\\infty", "$", "\\,", "\\left", "\\cup", "<", "\\int",
    "!", "٣", "−", "|",
]  # fmt: skip


@settings(max_examples=60)
@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text(max_size=20), max_size=12))
def test_fuzz(answers: list[str]) -> None:
    """Whatever is in the box: a verdict, no failure of grading, and the truth itself is matched."""
    found = Staying().fuzz([box(answer) for answer in answers])
    assert {verdict.why for verdict in found} <= set(WHYS) - {"error", "truncated"}
    assert all(verdict.correct is (verdict.why == "matched") for verdict in found)


class Staying:
    """Grades with workers that stay for all examples: starting them costs a second."""

    pool: Pool | None = None

    def fuzz(self, responses: list[str]) -> list[Verdict]:
        section = Verification(grader="math", time_limit=LIMIT)
        settled = [graders._settle(section, Row(response, "7", "stop")) for response in responses]
        jobs = [s.job for s in settled if isinstance(s, graders.Question)]
        cls = type(self)
        cls.pool = cls.pool or Pool(
            workers=2, cpu=LIMIT, memory=1 << 30, prepare=[Job("vapo.problems.symbolic:prepare")]
        )
        outcomes = iter(list(cls.pool.map(jobs)))
        return [s if isinstance(s, Verdict) else graders._judge(section, s, next(outcomes)) for s in settled]


@pytest.fixture(scope="module", autouse=True)
def _close() -> Any:
    yield
    if Staying.pool:
        Staying.pool.close()
        Staying.pool = None
