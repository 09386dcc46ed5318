"""reasoning-gym's scorers: every family finds its own answer right, and none runs an answer or pays for nonsense."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from vapo.errors import UserError
from vapo.problems.graders import Row, check_ground_truth, grade
from vapo.problems.grading import Verdict
from vapo.recipe import Verification

reasoning_gym = pytest.importorskip("reasoning_gym")
FAMILIES = (
    "binary_matrix",
    "countdown",
    "intermediate_integration",
    "n_queens",
    "number_sorting",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
)
MARK = "VAPO_TEST_MARK"
CODE = f"__import__('os').environ.__setitem__('{MARK}', '1')"
# The same by names alone, without a quote, a dot or an underscore.
SPELLED = "exec({})".format("+".join(f"chr({ord(c)})" for c in f"import os;os.environ['{MARK}']='1'"))


def truth(family: str, index: int = 0, **config: Any) -> str:
    entry = reasoning_gym.create_dataset(family, size=index + 1, seed=3, **config)[index]
    return json.dumps({"dataset": family, "entry": entry}, default=str)


def graded(rows: list[tuple[str, str]], **changed: Any) -> list[Verdict]:
    section = Verification(**{"grader": "reasoning_gym", **changed})
    found = [Row(f"<answer>{answer}</answer>", t, "stop") for answer, t in rows]
    return grade(section, found, {f"p{i}": row.truth for i, row in enumerate(found)}, lambda done: None)[0]


def test_every_family() -> None:
    from reasoning_gym.factory import DATASETS

    rows, wanted = [], []
    for family in sorted(set(DATASETS) - {"composite"}):
        t = truth(family)
        own = json.loads(t)["entry"]["answer"]
        if own is not None:
            rows.append((own, t))
            wanted.append((family, True))
        rows += [("zzz", t), (CODE, t), (SPELLED, t)]
        wanted += [(family, False)] * 3
    found = graded(rows)
    assert len(rows) > 400
    assert [(family, v.correct) for (family, _), v in zip(wanted, found, strict=True)] == wanted
    assert not {v.why for v in found} & {"error", "time_out"}


@pytest.mark.parametrize("code", [CODE, SPELLED, f"[{CODE}]", f"({CODE},)"])
def test_no_scorer_runs_an_answer(code: str) -> None:
    """The families whose scorers reach eval, asked in this process, where a mark would show."""
    from vapo.problems import gym

    for family in FAMILIES:
        os.environ.pop(MARK, None)
        gym.judge(truth(family), code)
        assert MARK not in os.environ, family


@pytest.mark.parametrize(
    "text",
    [
        "x.subs",
        "(x).subs",
        "'x'",
        "x[0]",
        "x__y",
        "x; y",
        "lambda: x",
        "eval(x)",
        "chr(x)",
        "sympify(x)",
        "Integral(x, x)",
    ],
)
def test_algebra_is_all_that_is_read(text: str) -> None:
    """Each alone, so that no single rule is the only one."""
    from vapo.problems import gym

    with pytest.raises(ValueError, match=r"more than algebra|no unknown and no function"):
        gym._parse_expr(text)
    assert str(gym._parse_expr("2*x + sqrt(y)*1.5")) == "2*x + 1.5*sqrt(y)"


def test_every_place_that_evaluates_text_is_known() -> None:
    """A new release of reasoning-gym may bring another: then `gym` must seal it too."""
    from vapo.problems import gym

    root = Path(reasoning_gym.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        if re.search(r"(?<![\w.])(eval|exec)\(|(?<!def )\bparse_expr\(|\bsympify\(", path.read_text()):
            found.add("reasoning_gym." + ".".join(path.relative_to(root).with_suffix("").parts))
    sealed = {
        *gym.READS_LITERALS,
        *gym.READS_ALGEBRA,
        # These three ask sympy's own module, whose parse_expr is replaced.
        "reasoning_gym.algebra.simple_integration",
        "reasoning_gym.algebra.intermediate_integration",
        "reasoning_gym.algebra.polynomial_multiplication",
    }
    of_no_answer = {  # they evaluate problems that they made themselves, or have a parse_expr of their own
        "reasoning_gym.code.codeio",
        "reasoning_gym.arithmetic.basic_arithmetic",
        "reasoning_gym.arithmetic.bitwise_arithmetic",
        "reasoning_gym.arithmetic.gsm_symbolic.generators_00_49",
        "reasoning_gym.arithmetic.gsm_symbolic.generators_50_99",
        "reasoning_gym.logic.propositional_logic",
    }
    assert found == sealed | of_no_answer


def test_an_unevaluated_integral_is_no_answer() -> None:
    """Its derivative is the integrand: the scorer would find the question itself right."""
    t = truth("simple_integration")
    meta = json.loads(t)["entry"]["metadata"]
    assert not graded([(f"Integral({meta['integrand']}, {meta['variable']})", t)])[0].correct


def test_a_scorer_that_takes_anything() -> None:
    """game_of_life_halting compares bool(answer) with bool(text): any text would be right."""
    dataset = reasoning_gym.create_dataset("game_of_life_halting", size=1, seed=3)
    assert dataset.score_answer("zzz", dataset[0]) == 1.0
    t = truth("game_of_life_halting")
    own = json.loads(t)["entry"]["answer"]
    other = {"True": "False", "False": "True"}[own]
    assert [v.correct for v in graded([(own, t), (own.lower(), t), (other, t), ("zzz", t)])] == [
        True,
        True,
        False,
        False,
    ]


def test_partial_scores_are_no_correctness() -> None:
    """leg_counting and most others give a share for an answer that contains the right one."""
    t = truth("letter_counting")
    own = json.loads(t)["entry"]["answer"]
    plain, partial = graded([(f"it is {own}", t)])[0], graded([(f"it is {own}", t)], partial_scores=True)[0]
    assert (plain.correct, plain.why, plain.partial) == (False, "different", 0.0)
    assert (partial.correct, partial.why) == (False, "different")
    assert 0 < partial.partial < 1
    assert graded([(f"it is {own}", t)], min_score=0.05)[0].correct


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("7", 'is no {"dataset": name, "entry"'),
        ("{", "is not JSON"),
        ('{"dataset": "chess", "entry": {"question": "", "answer": "7", "metadata": {}}}', "names no scorer"),
        ('{"dataset": "gcd", "config": {"no": 1}, "entry": {"answer": "7"}}', "names no scorer"),
        ('{"dataset": "countdown", "entry": {"question": "", "answer": "7", "metadata": {}}}', "its own scorer gives"),
    ],
)
def test_a_ground_truth_that_cannot_be_graded(bad: str, said: str) -> None:
    with pytest.raises(UserError, match="prompt_id 'p0': ground_truth ") as raised:
        graded([("7", bad)])
    assert said in str(raised.value)


def test_what_can_be_said_without_the_library() -> None:
    assert check_ground_truth("reasoning_gym", truth("gcd")) is None
    assert check_ground_truth("reasoning_gym", "7") is not None
    assert check_ground_truth("math", " ") == "is empty"
    assert check_ground_truth("math", r"\frac{") is None  # a worker says
