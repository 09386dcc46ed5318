"""Several iterations as a sub-pipeline, with the evaluations that fall between them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from pipelines.evaluation import evaluation_of
from pipelines.iteration import GIVES as OF_AN_ITERATION
from pipelines.iteration import TAKES as FOR_AN_ITERATION
from pipelines.iteration import iteration_pipeline
from pipelines.signature import pipeline_of
from pipelines.stopping import FOR_A_CONDITION
from vapo.recipe import Recipe

TABLES = ("rollouts", "rewards", "experience")  # of an iteration, which the report shows
FOR_AN_EVALUATION = {
    "heldout_prompts": dsl.Input[dsl.Dataset],
    "evaluation_rollout_section": str,
    "evaluation_section": str,
}
MEASURED = ("evaluation", "evaluation_rollouts", "evaluation_rewards")  # of the last evaluation, for the report


@dataclass(frozen=True)
class Block:
    """Iterations that follow one another: the first, how many, and the offsets of those that are evaluated."""

    first: int
    length: int
    evaluated: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, tuple[int, ...]]:
        """What blocks that share a component have in common."""
        return self.length, self.evaluated

    @property
    def last(self) -> int:
        return self.first + self.length - 1

    @property
    def name(self) -> str:
        """As the root shows it: iterations-011-020."""
        return f"iterations-{self.first:03d}-{self.last:03d}" if self.length > 1 else f"iteration-{self.first:03d}"


def evaluated_iterations(recipe: Recipe) -> list[int]:
    """After which iterations the policy is evaluated: 0, every few, and the last."""
    every = range(0, recipe.iterations, recipe.evaluation.every)
    return [*every, recipe.iterations]


def blocks_of(recipe: Recipe, first: int = 1, last: int | None = None) -> list[Block]:
    """The blocks of the iterations from `first` to `last`, by default to the recipe's last."""
    end = (last or recipe.iterations) + 1
    evaluated = evaluated_iterations(recipe)
    made = []
    for start in range(first, end, recipe.iterations_per_block):
        length = min(recipe.iterations_per_block, end - start)
        made.append(Block(start, length, tuple(n - start for n in evaluated if start <= n < start + length)))
    return made


def pipelines_of(blocks: Sequence[Block], recipe: Recipe) -> list[BaseComponent]:
    """Every block's pipeline.

    A block that no other is like has the numbers of its iterations in the names that the UI shows. Blocks of the same
    shape are one component in the merged pipeline, which could not be if each had its own numbers in it: their
    iterations are `iteration-03-of-10`, below a block whose name says which ten.
    """
    alike = Counter(block.shape for block in blocks)
    shards = recipe.rollout.shards, recipe.rollout_for_evaluation().shards
    graph = (recipe.rollout.draws, recipe.has_critic, recipe.target_accuracy > 0, shards)
    return [_pipeline(*block.shape, block.first if alike[block.shape] == 1 else 0, *graph) for block in blocks]


@cache
def _pipeline(
    length: int,
    evaluated: tuple[int, ...],
    first: int,
    draws: int,
    has_critic: bool,
    may_stop: bool,
    shards: tuple[int, int],
) -> BaseComponent:
    """The pipeline of blocks of one shape; `first` is the first iteration if it is known here, else 0."""
    iterate, evaluate = iteration_pipeline(draws, has_critic, shards[0]), evaluation_of(shards[1])
    models = ("policy", "critic") if has_critic else ("policy",)
    takes = {name: kind for name, kind in FOR_AN_ITERATION.items() if name != "offset"}
    gives = {name: OF_AN_ITERATION[name] for name in ("policy", "critic", "history")}
    gives |= {f"{when}_{table}": dsl.Dataset for when in ("first", "last") for table in TABLES}
    if evaluated:
        takes, gives = takes | FOR_AN_EVALUATION, gives | dict.fromkeys(MEASURED, dsl.Dataset) | {"accuracy": float}
    if may_stop:
        takes = takes | FOR_A_CONDITION
    if not has_critic:
        takes, gives = ({key: kind for key, kind in found.items() if key != "critic"} for found in (takes, gives))

    def several(**given: Any) -> dict[str, Any]:
        for_iterations = {name: value for name, value in given.items() if name in FOR_AN_ITERATION}
        state = {name: given[name] for name in (*models, "history")}
        found: dict[str, Any] = {}
        for offset in range(length):
            done = iterate(**for_iterations | state, offset=offset)
            done.set_display_name(_name("iteration", offset, length, first))
            state = {name: done.outputs[name] for name in state}
            if not offset:
                found |= {f"first_{table}": done.outputs[table] for table in TABLES}
            if offset in evaluated:
                measured = evaluate(
                    policy=state["policy"],
                    prompts=given["heldout_prompts"],
                    history=state["history"],
                    rollout_section=given["evaluation_rollout_section"],
                    verification_section=given["verification_section"],
                    evaluation_section=given["evaluation_section"],
                    block_start=given["block_start"],
                    offset=offset,
                    seed=given["seed"],
                )
                measured.set_display_name(_name("evaluation", offset, length, first))
                state["history"] = measured.outputs["history"]
                found |= {name: measured.outputs[name] for name in ("evaluation", "accuracy")}
                found |= {f"evaluation_{table}": measured.outputs[table] for table in ("rollouts", "rewards")}
        return {**found, **{f"last_{table}": done.outputs[table] for table in TABLES}, **state}

    return pipeline_of(several, "block", "Iterations, and the evaluations between them", takes, gives)


def _name(what: str, offset: int, length: int, first: int) -> str:
    if first:
        return f"{what}-{first + offset:03d}"
    return f"{what}-{offset + 1:0{len(str(length))}d}-of-{length}"
