"""Which tasks of a run are meant, from records alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.choosing import chosen, following, iterations_of, listed
from vapo.errors import UserError
from vapo.lineage.graph import Node
from vapo.lineage.record import Host, Product, Record, Source


def node(stage: str, iteration: int, *makers: Node, purpose: str = "", draw: int = 1) -> Node:
    parameters: dict[str, Any] = {"iteration": iteration, "draw": draw}
    name = f"{stage}-{iteration}-{purpose}-{draw}-{'-'.join(maker.digest for maker in makers)}"
    facts = Record(
        stage=stage,
        iteration=iteration,
        purpose=purpose,
        seed=0,
        parameters=parameters,
        section={},
        section_sha256="",
        inputs={f"i{i}": Source(path="p", sha256="s", bytes=1, record=m.digest) for i, m in enumerate(makers)},
        outputs={"o": Product(path="o", sha256="s", bytes=1)},
        metrics={},
        started=0,
        ended=0,
        seconds=0,
        vapo="",
        commit="",
        image="",
        python="",
        libraries={},
        host=Host(name="", machine="", cpus=1),
    )
    return Node(name, Path("/nowhere"), facts)


BASE = node("base_model", 0)
BEFORE = node("rollout", 0, BASE, purpose="evaluation")
PRETRAINING = node("rollout", 0, BASE, purpose="value_pretraining")
ROLLOUTS = [node("rollout", 1, BASE, purpose="training", draw=draw) for draw in (1, 2)]
CREDIT = node("advantages", 1, *ROLLOUTS)
UPDATE = node("ppo_update", 1, BASE, CREDIT)
AFTER = node("rollout", 0, UPDATE, purpose="evaluation")
MEASURED = node("evaluation", 1, AFTER)
RUN = [BASE, BEFORE, PRETRAINING, *ROLLOUTS, CREDIT, UPDATE, AFTER, MEASURED]


WHOLE = node("concatenation", 0, AFTER, purpose="evaluation")


def test_rollouts_of_an_evaluation_have_the_iteration_of_their_policy() -> None:
    found = iterations_of([WHOLE, *RUN])
    assert (found[BEFORE.digest], found[AFTER.digest], found[PRETRAINING.digest]) == (0, 1, 0)
    assert found[WHOLE.digest] == 1  # its shards are of that


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (("rollout", 1), ROLLOUTS),  # all draws; what trained comes before what was measured
        (("rollout", 1, "evaluation"), [AFTER]),
        (("rollout", 0, "evaluation"), [BEFORE]),
        (("rollout", None), ROLLOUTS),  # trained in one iteration only
        (("rollout", None, "value_pretraining"), [PRETRAINING]),
        (("advantages", None), [CREDIT]),
        (("evaluation", 1), [MEASURED]),
    ],
)
def test_what_is_meant(asked: tuple[Any, ...], found: list[Node]) -> None:
    assert chosen(RUN, *asked) == found


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("rollouts", None), "--stage rollouts: no such task in the run: there are base_model, rollout, advantages"),
        (("advantages", 2), "--iteration 2: advantages ran in iteration 1"),
        (("rollout", 2), "--iteration 2: rollout ran in iterations 0 to 1"),
        (("rollout", 0), "it ran for evaluation, value_pretraining: say which with --purpose"),
        (("rollout", 1, "report"), "--purpose report: rollout ran for training, evaluation"),
        (("rollout", None, "evaluation"), "it ran in iterations 0 to 1: say which with --iteration"),
    ],
)
def test_what_is_not_clear_is_refused(asked: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError) as told:
        chosen(RUN, *asked)
    assert message in str(told.value)


def test_what_follows() -> None:
    assert following(RUN, [CREDIT]) == [CREDIT, UPDATE, AFTER, MEASURED]
    assert following(RUN, [BASE]) == RUN
    assert following(RUN, [MEASURED]) == [MEASURED]


@pytest.mark.parametrize(("numbers", "text"), [([3], "iteration 3"), ([0, 2, 3, 4, 9], "iterations 0, 2 to 4, 9")])
def test_iterations_as_text(numbers: list[int], text: str) -> None:
    assert listed(numbers) == text
