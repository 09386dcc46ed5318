"""Value-pretraining as a sub-pipeline: rollouts of the fixed policy, verification, the first critic."""

from functools import cache
from typing import NamedTuple

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.history.component import history as record
from components.value_pretraining.component import value_pretraining
from components.verification.component import verification
from pipelines.sampling import sampled as sampled_by


class Outputs(NamedTuple):
    critic: dsl.Model
    pretraining: dsl.Dataset
    history: dsl.Dataset


@cache
def value_pretraining_of(shards: int) -> BaseComponent:
    """The sub-pipeline before the first iteration; so many tasks share the prompts."""

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
        sampled = sampled_by(
            shards,
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
            rollouts=sampled["rollouts"],
        )
        pretrained = value_pretraining(
            section=value_pretraining_section,
            seed=seed,
            store=store,
            rollouts=sampled["rollouts"],
            rewards=graded.outputs["rewards"],
            policy=policy,
        )
        recorded = record(
            block_start=0,
            offset=0,
            purpose="value_pretraining",
            previous=history,
            rollout=sampled["metrics"],
            verification=graded.outputs["metrics"],
            value_pretraining=pretrained.outputs["metrics"],
        )
        return Outputs(
            critic=pretrained.outputs["critic"],
            pretraining=pretrained.outputs["pretraining"],
            history=recorded.outputs["new_history"],
        )

    made: BaseComponent = pretrain_critic
    return made
