"""The page a person reads."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def report(
    section: str,
    recipe: str,
    history: dsl.Input[dsl.Dataset],
    prompts: dsl.Input[dsl.Dataset],
    policy: dsl.Input[dsl.Model],
    first_rollouts: dsl.Input[dsl.Dataset],
    first_rewards: dsl.Input[dsl.Dataset],
    first_experience: dsl.Input[dsl.Dataset],
    last_rollouts: dsl.Input[dsl.Dataset],
    last_rewards: dsl.Input[dsl.Dataset],
    last_experience: dsl.Input[dsl.Dataset],
    evaluation: dsl.Input[dsl.Dataset],
    page: dsl.Output[dsl.HTML],
    pretraining: dsl.Input[dsl.Dataset] | None = None,
) -> None:
    """Make the self-contained HTML page."""
    from vapo.stage import run

    run(
        "report",
        section=section,
        parameters={"recipe": recipe},
        inputs={
            "history": history,
            "prompts": prompts,
            "policy": policy,
            "first_rollouts": first_rollouts,
            "first_rewards": first_rewards,
            "first_experience": first_experience,
            "last_rollouts": last_rollouts,
            "last_rewards": last_rewards,
            "last_experience": last_experience,
            "evaluation": evaluation,
            "pretraining": pretraining,
        },
        outputs={"page": page},
    )
