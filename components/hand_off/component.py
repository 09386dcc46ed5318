"""What the next segment starts from, and where it lies."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def hand_off(
    store: str,
    chain: str,
    segment: int,
    segments: int,
    stopped: bool,
    policy: dsl.Input[dsl.Model],
    reference: dsl.Input[dsl.Model],
    prompts: dsl.Input[dsl.Dataset],
    heldout_prompts: dsl.Input[dsl.Dataset],
    history: dsl.Input[dsl.Dataset],
    first_rollouts: dsl.Input[dsl.Dataset],
    first_rewards: dsl.Input[dsl.Dataset],
    first_experience: dsl.Input[dsl.Dataset],
    handed_over: dsl.Output[dsl.Artifact],
    critic: dsl.Input[dsl.Model] | None = None,
    pretraining: dsl.Input[dsl.Dataset] | None = None,
) -> None:
    """Write the address and digest of everything that the next segment needs."""
    from vapo.stage import run

    run(
        "hand_off",
        section="",
        parameters={
            "store": store,
            "chain": chain,
            "segment": segment,
            "segments": segments,
            "stopped": stopped,
        },
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
        outputs={"handed_over": handed_over},
    )
