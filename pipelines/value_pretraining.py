"""Value-pretraining as a sub-pipeline: rollouts of the fixed policy, verification, the first critic."""

from typing import NamedTuple

from kfp import dsl

from components.history.component import history as record
from components.rollout.component import rollout
from components.value_pretraining.component import value_pretraining
from components.verification.component import verification


class Outputs(NamedTuple):
    critic: dsl.Model
    pretraining: dsl.Dataset
    history: dsl.Dataset


@dsl.pipeline(name="value-pretraining", description="The critic learns the fixed policy's returns")
def pretrain_critic(
    policy: dsl.Input[dsl.Model],
    prompts: dsl.Input[dsl.Dataset],
    history: dsl.Input[dsl.Dataset],
    rollout_section: str,
    verification_section: str,
    value_pretraining_section: str,
    seed: int,
    store: str,
) -> Outputs:
    sampled = rollout(
        section=rollout_section,
        seed=seed,
        block_start=0,
        offset=0,
        draw=1,
        wanted_groups=0,
        purpose="value_pretraining",
        prompts=prompts,
        policy=policy,
    )
    graded = verification(
        section=verification_section,
        block_start=0,
        offset=0,
        purpose="value_pretraining",
        prompts=prompts,
        rollouts=sampled.outputs["rollouts"],
    )
    pretrained = value_pretraining(
        section=value_pretraining_section,
        seed=seed,
        store=store,
        rollouts=sampled.outputs["rollouts"],
        rewards=graded.outputs["rewards"],
        policy=policy,
    )
    recorded = record(
        block_start=0,
        offset=0,
        purpose="value_pretraining",
        previous=history,
        rollout=sampled.outputs["metrics"],
        verification=graded.outputs["metrics"],
        value_pretraining=pretrained.outputs["metrics"],
    )
    return Outputs(
        critic=pretrained.outputs["critic"],
        pretraining=pretrained.outputs["pretraining"],
        history=recorded.outputs["new_history"],
    )
