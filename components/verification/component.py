"""Rewards from a grader that reads the responses."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def verification(
    section: str,
    block_start: int,
    offset: int,
    purpose: str,
    prompts: dsl.Input[dsl.Dataset],
    rollouts: dsl.Input[dsl.Dataset],
    rewards: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Make the REWARDS table."""
    from vapo.stage import run

    run(
        "verification",
        section=section,
        parameters={"iteration": block_start + offset, "purpose": purpose},
        inputs={"prompts": prompts, "rollouts": rollouts},
        outputs={"rewards": rewards, "metrics": metrics},
    )
