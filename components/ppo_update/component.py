"""The next policy and critic."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def ppo_update(
    section: str,
    seed: int,
    block_start: int,
    offset: int,
    store: str,
    rollouts: dsl.Input[dsl.Dataset],
    rewards: dsl.Input[dsl.Dataset],
    experience: dsl.Input[dsl.Dataset],
    policy: dsl.Input[dsl.Model],
    reference: dsl.Input[dsl.Model],
    critic: dsl.Input[dsl.Model],
    new_policy: dsl.Output[dsl.Model],
    new_critic: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Make the next policy and critic checkpoints."""
    from vapo.stage import run

    run(
        "ppo_update",
        section=section,
        parameters={"seed": seed, "iteration": block_start + offset, "store": store},
        inputs={
            "rollouts": rollouts,
            "rewards": rewards,
            "experience": experience,
            "policy": policy,
            "reference": reference,
            "critic": critic,
        },
        outputs={"new_policy": new_policy, "new_critic": new_critic, "metrics": metrics},
    )
