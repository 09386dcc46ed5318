"""Responses sampled from the policy."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def rollout(
    section: str,
    seed: int,
    block_start: int,
    offset: int,
    draw: int,
    wanted_groups: int,
    purpose: str,
    prompts: dsl.Input[dsl.Dataset],
    policy: dsl.Input[dsl.Model],
    rollouts: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    previous_rollouts: dsl.Input[dsl.Dataset] | None = None,
    previous_rewards: dsl.Input[dsl.Dataset] | None = None,
    shard: int = 0,
    shards: int = 1,
) -> None:
    """Make the ROLLOUTS table of one iteration."""
    from vapo.stage import run

    run(
        "rollout",
        section=section,
        parameters={
            "seed": seed,
            "iteration": block_start + offset,
            "draw": draw,
            "wanted_groups": wanted_groups,
            "purpose": purpose,
            "shard": shard,
            "shards": shards,
        },
        inputs={
            "prompts": prompts,
            "policy": policy,
            "previous_rollouts": previous_rollouts,
            "previous_rewards": previous_rewards,
        },
        outputs={"rollouts": rollouts, "metrics": metrics},
    )
