"""The first policy, trained here or taken from a local folder."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def base_model(
    section: str,
    seed: int,
    store: str,
    examples: dsl.Input[dsl.Dataset],
    policy: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Make the first policy checkpoint."""
    from vapo.stage import run

    run(
        "base_model",
        section=section,
        parameters={"seed": seed, "store": store},
        inputs={"examples": examples},
        outputs={"policy": policy, "metrics": metrics},
    )
