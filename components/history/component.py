"""The metrics of every stage so far, handed on from iteration to iteration."""

from typing import Optional

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def history(
    block_start: int,
    offset: int,
    purpose: str,
    new_history: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    previous: Optional[dsl.Input[dsl.Dataset]] = None,
    problems: Optional[dsl.Input[dsl.Metrics]] = None,
    base_model: Optional[dsl.Input[dsl.Metrics]] = None,
    rollout: Optional[dsl.Input[dsl.Metrics]] = None,
    verification: Optional[dsl.Input[dsl.Metrics]] = None,
    value_pretraining: Optional[dsl.Input[dsl.Metrics]] = None,
    advantages: Optional[dsl.Input[dsl.Metrics]] = None,
    ppo_update: Optional[dsl.Input[dsl.Metrics]] = None,
    evaluation: Optional[dsl.Input[dsl.Metrics]] = None,
) -> None:
    """Append the given stages' metrics to the HISTORY table."""
    from vapo.stage import run

    run(
        "history",
        section="",
        parameters={"iteration": block_start + offset, "purpose": purpose},
        inputs={
            "previous": previous,
            "problems": problems,
            "base_model": base_model,
            "rollout": rollout,
            "verification": verification,
            "value_pretraining": value_pretraining,
            "advantages": advantages,
            "ppo_update": ppo_update,
            "evaluation": evaluation,
        },
        outputs={"new_history": new_history, "metrics": metrics},
    )
