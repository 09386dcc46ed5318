"""Training and held-out prompts, and worked examples for the base model."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def problems(
    section: str,
    seed: int,
    train_prompts: dsl.Output[dsl.Dataset],
    heldout_prompts: dsl.Output[dsl.Dataset],
    examples: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Make the PROMPTS and EXAMPLES tables."""
    from vapo.stage import run

    run(
        "problems",
        section=section,
        parameters={"seed": seed},
        inputs={},
        outputs={
            "train_prompts": train_prompts,
            "heldout_prompts": heldout_prompts,
            "examples": examples,
            "metrics": metrics,
        },
    )
