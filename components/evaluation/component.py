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
) -> float:
    """Make the EVALUATION table; the accuracy, by which a run may end early."""
    from vapo.stage import run

    run(
        "evaluation",
        section=section,
        parameters={"seed": seed, "iteration": block_start + offset},
        inputs={"prompts": prompts, "rollouts": rollouts, "rewards": rewards},
        outputs={"evaluation": evaluation, "metrics": metrics},
    )
    return float(metrics.metadata["accuracy"])
