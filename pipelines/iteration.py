"""One iteration as a sub-pipeline: rollout, verification, advantages, PPO update."""

from typing import NamedTuple

from kfp import dsl

from components.advantages.component import advantages
from components.history.component import history as record
from components.ppo_update.component import ppo_update
from components.rollout.component import rollout
from components.verification.component import verification


class Outputs(NamedTuple):
    policy: dsl.Model
    critic: dsl.Model
    history: dsl.Dataset
    rollouts: dsl.Dataset
    rewards: dsl.Dataset
    experience: dsl.Dataset


@dsl.pipeline(name="iteration", description="Sample, grade, estimate advantages, update policy and critic")
def iterate(
    policy: dsl.Input[dsl.Model],
    critic: dsl.Input[dsl.Model],
    prompts: dsl.Input[dsl.Dataset],
    history: dsl.Input[dsl.Dataset],
    rollout_section: str,
    verification_section: str,
    advantages_section: str,
    ppo_update_section: str,
    iteration: int,
    seed: int,
    store: str,
) -> Outputs:
    sampled = rollout(
        section=rollout_section, seed=seed, iteration=iteration, purpose="training", prompts=prompts, policy=policy
    )
    graded = verification(
        section=verification_section,
        iteration=iteration,
        purpose="training",
        prompts=prompts,
        rollouts=sampled.outputs["rollouts"],
    )
    estimated = advantages(
        section=advantages_section,
        iteration=iteration,
        rollouts=sampled.outputs["rollouts"],
        rewards=graded.outputs["rewards"],
        critic=critic,
    )
    updated = ppo_update(
        section=ppo_update_section,
        seed=seed,
        iteration=iteration,
        store=store,
        rollouts=sampled.outputs["rollouts"],
        rewards=graded.outputs["rewards"],
        experience=estimated.outputs["experience"],
        policy=policy,
        critic=critic,
    )
    recorded = record(
        iteration=iteration,
        purpose="training",
        previous=history,
        rollout=sampled.outputs["metrics"],
        verification=graded.outputs["metrics"],
        advantages=estimated.outputs["metrics"],
        ppo_update=updated.outputs["metrics"],
    )
    return Outputs(
        policy=updated.outputs["new_policy"],
        critic=updated.outputs["new_critic"],
        history=recorded.outputs["new_history"],
        rollouts=sampled.outputs["rollouts"],
        rewards=graded.outputs["rewards"],
        experience=estimated.outputs["experience"],
    )
