"""avg@k, pass@k and cons@k on held-out problems, with confidence intervals."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluation(
    section: str,
    seed: int,
    block_start: int,
    offset: int,
    prompts: dsl.Input[dsl.Dataset],
    rollouts: dsl.Input[dsl.Dataset],
    rewards: dsl.Input[dsl.Dataset],
    evaluation: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Make the EVALUATION table."""
    from vapo.stage import run

    run(
        "evaluation",
        section=section,
        parameters={"seed": seed, "iteration": block_start + offset},
        inputs={"prompts": prompts, "rollouts": rollouts, "rewards": rewards},
        outputs={"evaluation": evaluation, "metrics": metrics},
    )
