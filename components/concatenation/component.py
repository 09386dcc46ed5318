"""The responses of all shards."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def concatenation(
    section: str,
    block_start: int,
    offset: int,
    purpose: str,
    parts: dsl.Input[list[dsl.Dataset]],
    metrics_of_parts: dsl.Input[list[dsl.Metrics]],
    rollouts: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    previous_rollouts: dsl.Input[dsl.Dataset] | None = None,
) -> None:
    """Make the ROLLOUTS table of one iteration from those of its shards."""
    from vapo.stage import run

    run(
        "concatenation",
        section=section,
        parameters={"iteration": block_start + offset, "purpose": purpose},
        inputs={
            "parts": parts,
            "metrics_of_parts": metrics_of_parts,
            "previous_rollouts": previous_rollouts,
        },
        outputs={"rollouts": rollouts, "metrics": metrics},
    )
