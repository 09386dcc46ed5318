"""reasoning-gym's task families: every one works, from the seed alone, and its grader finds its own answers right."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest

from vapo.errors import UserError
from vapo.problems.problem import Problem, identity
from vapo.problems.task_families import distinct, draw, serve
from vapo.problems.templates import renderer
from vapo.recipe import Problems

reasoning_gym = pytest.importorskip("reasoning_gym")
FAMILIES = sorted(reasoning_gym.factory.DATASETS.keys() - {"composite"})  # that one is a mixture of the others
WITHOUT_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}  # many answers are right
# Whose problems follow Python's hash seed, and codeio's the global generators too (knight_swap as well, which is slow).
UNSEEDED = ("codeio", "isomorphic_strings", "polynomial_multiplication", "ransom_note", "word_ladder")


def drawn(families: dict[str, Any], count: int, seed: int = 3, **keys: Any) -> list[Problem]:
    section = Problems(source="reasoning_gym", families=families, **keys)
    return draw(section, renderer(section), seed, count)


@pytest.fixture(scope="module")
def two_of_each() -> list[Problem]:
    """Two problems of every family."""
    return drawn({family: {} for family in FAMILIES}, 2 * len(FAMILIES))


def test_every_family(two_of_each: list[Problem]) -> None:
    assert len(FAMILIES) >= 105
    assert [p.family for p in two_of_each] == FAMILIES * 2
    assert len({p.prompt_id for p in two_of_each}) == len(two_of_each)
    for problem in two_of_each:
        truth = json.loads(problem.ground_truth)
        assert (truth["dataset"], truth["config"]) == (problem.family, {})
        assert problem.prompt == truth["entry"]["question"]
        assert problem.prompt_id == identity(problem.prompt)


def test_every_familys_own_answer_is_right(two_of_each: list[Problem]) -> None:
    """After its way through JSON, by the grader of this package; some families hold none."""
    gym = pytest.importorskip("vapo.problems.gym")
    scores = {}
    for problem in two_of_each:
        own = json.loads(problem.ground_truth)["entry"]["answer"]
        if problem.family in WITHOUT_ANSWER:
            assert own is None, problem.family
        else:
            scores[problem.family] = gym.judge(problem.ground_truth, own)
    assert {family: score for family, score in scores.items() if score != 1} == {}


def test_the_seed_decides() -> None:
    """Nothing else, though it is another process each time."""
    families: dict[str, Any] = {family: {} for family in UNSEEDED}
    one, two, other = drawn(families, 50), drawn(families, 50), drawn(families, 5, seed=4)
    assert one == two
    assert {p.prompt for p in one}.isdisjoint(p.prompt for p in other)


def test_more_begin_with_the_same() -> None:
    """Even beyond one seed's entries; coin_flip has few different ones, acre depends on how many it is asked for."""
    families: dict[str, Any] = {"coin_flip": {}, "acre": {}, "gcd": {"max_numbers": 2}}
    few, many = drawn(families, 30), drawn(families, 700)
    assert many[:30] == few
    assert len({p.prompt_id for p in many}) == 700
    assert [p.family for p in many[:4]] == ["coin_flip", "acre", "gcd", "coin_flip"]


def test_no_question_stands_in_two_families() -> None:
    """A prompt's ID would then mean two ground truths."""
    seen: set[str] = set()
    first = next(distinct("gcd", {}, 0, seen))
    assert seen == {identity(first["question"])}
    assert next(distinct("gcd", {}, 0, set())) == first
    assert next(distinct("gcd", {}, 0, seen)) != first


def test_parameters_are_the_familys_and_go_with_the_ground_truth() -> None:
    found = drawn({"chain_sum": {"min_terms": 5, "max_terms": 5}}, 20, template="{prompt}\nAnswer:")
    for problem in found:
        truth = json.loads(problem.ground_truth)
        assert truth["config"] == {"min_terms": 5, "max_terms": 5}
        assert truth["entry"]["metadata"]["num_terms"] == 5
        assert problem.prompt == f"{truth['entry']['question']}\nAnswer:"
        assert problem.prompt_id == identity(truth["entry"]["question"])


@pytest.mark.parametrize(
    ("families", "said"),
    [
        (
            {"chain_sm": {}},
            "'chain_sm': reasoning-gym has no such family: take one of ['chain_sum', 'decimal_chain_sum'",
        ),
        ({"composite": {}}, "'composite': reasoning-gym has no such family"),
        ({"gcd": {}, "zzz": {}}, "'zzz': reasoning-gym has no such family: take one of ['ab', 'acre', "),
        (
            {"chain_sum": {"max_trms": 3}},
            "has no parameters ['max_trms'] (seed and size are ours): it has ['allow_nega",
        ),
        ({"chain_sum": {"seed": 3}}, "has no parameters ['seed']"),
        ({"chain_sum": {"min_terms": -3}}, "refuses the parameters {'min_terms': -3}: min_terms must be positive"),
        ({"chain_sum": {"min_terms": "x"}}, "refuses the parameters {'min_terms': 'x'}: '>' not supported"),
        (
            {"gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 3}},
            "500 draws brought none beyond 9 distinct problems: lower problems.train and problems.heldout",
        ),
    ],
)
def test_what_is_refused(families: dict[str, Any], said: str) -> None:
    answers = io.StringIO()
    serve({"families": families, "seed": 0, "count": 50}, answers)  # what the process does, without starting it
    fault = json.loads(answers.getvalue().splitlines()[-1])["fault"]
    assert fault.startswith("problems.families '")
    assert said in fault
    assert "\n" not in fault


def test_what_the_process_refuses_is_the_users_to_cure() -> None:
    with pytest.raises(UserError, match=r"^problems\.families 'chain_sm': reasoning-gym has no such family"):
        drawn({"gcd": {}, "chain_sm": {}}, 3)


def test_a_process_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """No problems are silently few."""
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RuntimeError, match="drawing problems of reasoning-gym ended with code 1"):
        drawn({"gcd": {}}, 3)
