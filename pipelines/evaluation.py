"""Evaluation as a sub-pipeline: rollout on held-out prompts, verification, accuracy."""

from typing import NamedTuple

from kfp import dsl

from components.evaluation.component import evaluation
from components.history.component import history as record
from components.rollout.component import rollout
from components.verification.component import verification


class Outputs(NamedTuple):
    history: dsl.Dataset
    evaluation: dsl.Dataset
    rollouts: dsl.Dataset
    rewards: dsl.Dataset
    accuracy: float


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
    sampled = rollout(
        section=rollout_section,
        seed=seed,
        block_start=0,  # not the iteration's: a policy is asked with the same random numbers whenever it is evaluated
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
        rollouts=sampled.outputs["rollouts"],
    )
    measured = evaluation(
        section=evaluation_section,
        seed=seed,
        block_start=block_start,
        offset=offset,
        prompts=prompts,
        rollouts=sampled.outputs["rollouts"],
        rewards=graded.outputs["rewards"],
    )
    recorded = record(
        block_start=block_start,
        offset=offset,
        purpose="evaluation",
        previous=history,
        rollout=sampled.outputs["metrics"],
        verification=graded.outputs["metrics"],
        evaluation=measured.outputs["metrics"],
    )
    return Outputs(
        history=recorded.outputs["new_history"],
        evaluation=measured.outputs["evaluation"],
        rollouts=sampled.outputs["rollouts"],
        rewards=graded.outputs["rewards"],
        accuracy=measured.outputs["Output"],
    )
