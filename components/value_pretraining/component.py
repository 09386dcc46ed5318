"""The first critic, trained on the fixed policy."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def value_pretraining(
    section: str,
    seed: int,
    store: str,
    rollouts: dsl.Input[dsl.Dataset],
    rewards: dsl.Input[dsl.Dataset],
    policy: dsl.Input[dsl.Model],
    critic: dsl.Output[dsl.Model],
    pretraining: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Make the first critic checkpoint and the PRETRAINING table."""
    from vapo.stage import run

    run(
        "value_pretraining",
        section=section,
        parameters={"seed": seed, "store": store},
        inputs={"rollouts": rollouts, "rewards": rewards, "policy": policy},
        outputs={"critic": critic, "pretraining": pretraining, "metrics": metrics},
    )
