"""Evaluation as a sub-pipeline: rollout on held-out prompts, verification, accuracy."""

from functools import cache
from typing import NamedTuple

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.evaluation.component import evaluation
from components.history.component import history as record
from components.verification.component import verification
from pipelines.sampling import sampled as sampled_by


class Outputs(NamedTuple):
    history: dsl.Dataset
    evaluation: dsl.Dataset
    rollouts: dsl.Dataset
    rewards: dsl.Dataset
    accuracy: float


@cache
def evaluation_of(shards: int) -> BaseComponent:
    """The sub-pipeline of every evaluation; so many tasks share the prompts."""

    @dsl.pipeline(name="evaluation", description="Accuracy of a policy on held-out prompts")
    def evaluate(
        policy: dsl.Input[dsl.Model],
        prompts: dsl.Input[dsl.Dataset],
        history: dsl.Input[dsl.Dataset],
        rollout_section: str,
        verification_section: str,
        evaluation_section: str,
        block_start: int,
        offset: int,
        seed: int,
    ) -> Outputs:
        sampled = sampled_by(
            shards,
            section=rollout_section,
            seed=seed,
            # Not the iteration's: a policy is asked with the same random numbers whenever it is evaluated.
            block_start=0,
            offset=0,
            draw=1,
            wanted_groups=0,
            purpose="evaluation",
            prompts=prompts,
            policy=policy,
        )
        graded = verification(
            section=verification_section,
            block_start=block_start,
            offset=offset,
            purpose="evaluation",
            prompts=prompts,
            rollouts=sampled["rollouts"],
        )
        measured = evaluation(
            section=evaluation_section,
            seed=seed,
            block_start=block_start,
            offset=offset,
            prompts=prompts,
            rollouts=sampled["rollouts"],
            rewards=graded.outputs["rewards"],
        )
        recorded = record(
            block_start=block_start,
            offset=offset,
            purpose="evaluation",
            previous=history,
            rollout=sampled["metrics"],
            verification=graded.outputs["metrics"],
            evaluation=measured.outputs["metrics"],
        )
        return Outputs(
            history=recorded.outputs["new_history"],
            evaluation=measured.outputs["evaluation"],
            rollouts=sampled["rollouts"],
            rewards=graded.outputs["rewards"],
            accuracy=measured.outputs["Output"],
        )

    made: BaseComponent = evaluate
    return made
