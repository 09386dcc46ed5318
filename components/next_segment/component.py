"""The last task of a run that is a segment: it starts the next one."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def next_segment(
    section: str,
    recipe: str,
    submission: str,
    handed_over: dsl.Input[dsl.Artifact],
    submitted: dsl.Output[dsl.Artifact],
) -> None:
    """Submit the run that starts from what this one has handed over."""
    from vapo.stage import run

    run(
        "next_segment",
        section=section,
        parameters={"recipe": recipe, "submission": submission},
        inputs={"handed_over": handed_over},
        outputs={"submitted": submitted},
    )
