"""Responses sampled from the policy."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def rollout(
    section: str,
    seed: int,
    iteration: int,
    purpose: str,
    prompts: dsl.Input[dsl.Dataset],
    policy: dsl.Input[dsl.Model],
    rollouts: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Make the ROLLOUTS table of one iteration."""
    from vapo.stage import run

    run(
        "rollout",
        section=section,
        parameters={"seed": seed, "iteration": iteration, "purpose": purpose},
        inputs={"prompts": prompts, "policy": policy},
        outputs={"rollouts": rollouts, "metrics": metrics},
    )
