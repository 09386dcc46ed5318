"""What a segment starts from, after its digests were checked."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def take_over(
    handed_over: str,
    policy: dsl.Input[dsl.Model],
    reference: dsl.Input[dsl.Model],
    prompts: dsl.Input[dsl.Dataset],
    heldout_prompts: dsl.Input[dsl.Dataset],
    history: dsl.Input[dsl.Dataset],
    first_rollouts: dsl.Input[dsl.Dataset],
    first_rewards: dsl.Input[dsl.Dataset],
    first_experience: dsl.Input[dsl.Dataset],
    critic: dsl.Input[dsl.Model],
    pretraining: dsl.Input[dsl.Dataset],
    new_policy: dsl.Output[dsl.Model],
    new_reference: dsl.Output[dsl.Model],
    new_prompts: dsl.Output[dsl.Dataset],
    new_heldout_prompts: dsl.Output[dsl.Dataset],
    new_history: dsl.Output[dsl.Dataset],
    new_first_rollouts: dsl.Output[dsl.Dataset],
    new_first_rewards: dsl.Output[dsl.Dataset],
    new_first_experience: dsl.Output[dsl.Dataset],
    new_critic: dsl.Output[dsl.Model],
    new_pretraining: dsl.Output[dsl.Dataset],
) -> None:
    """Check what the segment before has left, and hand it on."""
    from vapo.stage import run

    run(
        "take_over",
        section="",
        parameters={},
        known=handed_over,
        inputs={
            "policy": policy,
            "reference": reference,
            "prompts": prompts,
            "heldout_prompts": heldout_prompts,
            "history": history,
            "first_rollouts": first_rollouts,
            "first_rewards": first_rewards,
            "first_experience": first_experience,
            "critic": critic,
            "pretraining": pretraining,
        },
        outputs={
            "new_policy": new_policy,
            "new_reference": new_reference,
            "new_prompts": new_prompts,
            "new_heldout_prompts": new_heldout_prompts,
            "new_history": new_history,
            "new_first_rollouts": new_first_rollouts,
            "new_first_rewards": new_first_rewards,
            "new_first_experience": new_first_experience,
            "new_critic": new_critic,
            "new_pretraining": new_pretraining,
        },
    )
