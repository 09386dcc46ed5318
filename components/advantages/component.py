"""Values, advantages and value targets of every token; without a critic, group-normalised advantages."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def advantages(
    section: str,
    block_start: int,
    offset: int,
    rollouts: dsl.Input[dsl.Dataset],
    rewards: dsl.Input[dsl.Dataset],
    experience: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    critic: dsl.Input[dsl.Model] | None = None,
) -> None:
    """Make the EXPERIENCE table."""
    from vapo.stage import run

    run(
        "advantages",
        section=section,
        parameters={"iteration": block_start + offset},
        inputs={"rollouts": rollouts, "rewards": rewards, "critic": critic},
        outputs={"experience": experience, "metrics": metrics},
    )
