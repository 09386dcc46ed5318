"""The page a person reads."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def report(
    section: str,
    recipe: str,
    history: dsl.Input[dsl.Dataset],
    policy: dsl.Input[dsl.Model],
    evaluation: dsl.Input[dsl.Dataset],
    evaluation_prompts: dsl.Input[dsl.Dataset],
    evaluation_rollouts: dsl.Input[dsl.Dataset],
    evaluation_rewards: dsl.Input[dsl.Dataset],
    page: dsl.Output[dsl.HTML],
    lineage: dsl.Output[dsl.HTML],
    prompts: dsl.Input[dsl.Dataset] | None = None,
    first_rollouts: dsl.Input[dsl.Dataset] | None = None,
    first_rewards: dsl.Input[dsl.Dataset] | None = None,
    first_experience: dsl.Input[dsl.Dataset] | None = None,
    last_rollouts: dsl.Input[dsl.Dataset] | None = None,
    last_rewards: dsl.Input[dsl.Dataset] | None = None,
    last_experience: dsl.Input[dsl.Dataset] | None = None,
    pretraining: dsl.Input[dsl.Dataset] | None = None,
) -> None:
    """Make the self-contained HTML page; without training's tables it is that of an evaluation alone."""
    from vapo.stage import run

    run(
        "report",
        section=section,
        parameters={"recipe": recipe},
        inputs={
            "history": history,
            "policy": policy,
            "evaluation": evaluation,
            "evaluation_prompts": evaluation_prompts,
            "evaluation_rollouts": evaluation_rollouts,
            "evaluation_rewards": evaluation_rewards,
            "prompts": prompts,
            "first_rollouts": first_rollouts,
            "first_rewards": first_rewards,
            "first_experience": first_experience,
            "last_rollouts": last_rollouts,
            "last_rewards": last_rewards,
            "last_experience": last_experience,
            "pretraining": pretraining,
        },
        outputs={"page": page, "lineage": lineage},
    )
