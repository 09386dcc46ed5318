"""avg@k, pass@k and cons@k on held-out problems, with confidence intervals."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluation(
    section: str,
    seed: int,
    iteration: int,
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
        parameters={"seed": seed, "iteration": iteration},
        inputs={"prompts": prompts, "rollouts": rollouts, "rewards": rewards},
        outputs={"evaluation": evaluation, "metrics": metrics},
    )
