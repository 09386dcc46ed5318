"""One iteration as a sub-pipeline: rollout and verification, as often as is drawn, then advantages and PPO update."""

from functools import cache
from typing import Any

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.advantages.component import advantages
from components.history.component import history as record
from components.ppo_update.component import ppo_update
from components.ppo_update.without_critic import ppo_update as ppo_update_without_critic
from components.verification.component import verification
from pipelines.sampling import sampled as sampled_by
from pipelines.signature import pipeline_of

TAKES = {
    "policy": dsl.Input[dsl.Model],
    "reference": dsl.Input[dsl.Model],
    "critic": dsl.Input[dsl.Model],
    "prompts": dsl.Input[dsl.Dataset],
    "history": dsl.Input[dsl.Dataset],
    "rollout_section": str,
    "verification_section": str,
    "advantages_section": str,
    "ppo_update_section": str,
    "wanted_groups": int,
    "block_start": int,
    "offset": int,
    "seed": int,
    "store": str,
}
GIVES = {
    "policy": dsl.Model,
    "critic": dsl.Model,
    "history": dsl.Dataset,
    "rollouts": dsl.Dataset,
    "rewards": dsl.Dataset,
    "experience": dsl.Dataset,
}


@cache
def iteration_pipeline(draws: int, has_critic: bool, shards: int = 1) -> BaseComponent:
    """The sub-pipeline of every iteration of a run; which one it is, is block_start + offset.

    Args:
        draws: how often prompts are drawn at most (dynamic sampling): a later draw samples only if groups are wanting.
        has_critic: whether a critic comes in and goes out.
        shards: how many tasks share the prompts of a draw.
    """

    def iterate(**given: Any) -> dict[str, Any]:
        return _update(_draw(draws, shards, **given), **given)

    models = "policy and critic" if has_critic else "the policy"
    description = f"Sample, grade, estimate advantages, update {models}"
    takes, gives = ({k: v for k, v in t.items() if has_critic or k != "critic"} for t in (TAKES, GIVES))
    return pipeline_of(iterate, "iteration", description, takes, gives)


def _draw(
    draws: int,
    shards: int,
    *,
    policy: Any,
    prompts: Any,
    history: Any,
    rollout_section: Any,
    verification_section: Any,
    wanted_groups: Any,
    block_start: Any,
    offset: Any,
    seed: Any,
    **_: Any,
) -> dict[str, Any]:
    """Rollouts and rewards of all draws, the metrics of the last one, and the history with those before."""
    found: dict[str, Any] = {}
    when = {"block_start": block_start, "offset": offset}
    for draw in range(1, draws + 1):
        if found:
            earlier = {name: found[f"{name}_metrics"] for name in ("rollout", "verification")}
            recorded = record(**when, purpose=f"draw-{draw - 1}", previous=history, **earlier)
            history = recorded.outputs["new_history"]
        sampled = sampled_by(
            shards,
            section=rollout_section,
            seed=seed,
            **when,
            draw=draw,
            wanted_groups=wanted_groups if found else 0,  # nothing is known before the first draw
            purpose="training",
            prompts=prompts,
            policy=policy,
            **{f"previous_{name}": found[name] for name in ("rollouts", "rewards") if found},
        )
        graded = verification(
            section=verification_section,
            **when,
            purpose="training",
            prompts=prompts,
            rollouts=sampled["rollouts"],
        )
        found = {
            "rollouts": sampled["rollouts"],
            "rewards": graded.outputs["rewards"],
            "rollout_metrics": sampled["metrics"],
            "verification_metrics": graded.outputs["metrics"],
        }
    return {**found, "history": history}


def _update(
    sampled: dict[str, Any],
    *,
    policy: Any,
    reference: Any,
    advantages_section: Any,
    ppo_update_section: Any,
    block_start: Any,
    offset: Any,
    seed: Any,
    store: Any,
    critic: Any = None,
    **_: Any,
) -> dict[str, Any]:
    """Advantages and PPO update of what `_draw` found, and what the iteration hands on."""
    critics = {} if critic is None else {"critic": critic}
    when = {"block_start": block_start, "offset": offset}
    estimated = advantages(
        section=advantages_section,
        **when,
        rollouts=sampled["rollouts"],
        rewards=sampled["rewards"],
        **critics,
    )
    updated = (ppo_update if critics else ppo_update_without_critic)(
        section=ppo_update_section,
        seed=seed,
        **when,
        store=store,
        rollouts=sampled["rollouts"],
        rewards=sampled["rewards"],
        experience=estimated.outputs["experience"],
        policy=policy,
        reference=reference,
        **critics,
    )
    recorded = record(
        **when,
        purpose="training",
        previous=sampled["history"],
        rollout=sampled["rollout_metrics"],
        verification=sampled["verification_metrics"],
        advantages=estimated.outputs["metrics"],
        ppo_update=updated.outputs["metrics"],
    )
    return {
        "policy": updated.outputs["new_policy"],
        **{name: updated.outputs[f"new_{name}"] for name in critics},
        "history": recorded.outputs["new_history"],
        "rollouts": sampled["rollouts"],
        "rewards": sampled["rewards"],
        "experience": estimated.outputs["experience"],
    }
