"""One iteration as a sub-pipeline: rollout and verification, as often as is drawn, then advantages and PPO update."""

from functools import cache
from typing import Any, NamedTuple

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.advantages.component import advantages
from components.history.component import history as record
from components.ppo_update.component import ppo_update
from components.ppo_update.without_critic import ppo_update as ppo_update_without_critic
from components.rollout.component import rollout
from components.verification.component import verification


class Outputs(NamedTuple):
    policy: dsl.Model
    critic: dsl.Model
    history: dsl.Dataset
    rollouts: dsl.Dataset
    rewards: dsl.Dataset
    experience: dsl.Dataset


class OutputsWithoutCritic(NamedTuple):
    policy: dsl.Model
    history: dsl.Dataset
    rollouts: dsl.Dataset
    rewards: dsl.Dataset
    experience: dsl.Dataset


@cache
def iteration_pipeline(draws: int, has_critic: bool) -> BaseComponent:
    """The sub-pipeline of every iteration of a run.

    Args:
        draws: how often prompts are drawn at most (dynamic sampling): a later draw samples only if groups are wanting.
        has_critic: whether a critic comes in and goes out.
    """
    return _with_critic(draws) if has_critic else _without_critic(draws)


def _with_critic(draws: int) -> BaseComponent:
    @dsl.pipeline(name="iteration", description="Sample, grade, estimate advantages, update policy and critic")
    def iterate(
        policy: dsl.Input[dsl.Model],
        reference: dsl.Input[dsl.Model],
        critic: dsl.Input[dsl.Model],
        prompts: dsl.Input[dsl.Dataset],
        history: dsl.Input[dsl.Dataset],
        rollout_section: str,
        verification_section: str,
        advantages_section: str,
        ppo_update_section: str,
        wanted_groups: int,
        iteration: int,
        seed: int,
        store: str,
    ) -> Outputs:
        sampled = _draw(
            draws, policy, prompts, history, rollout_section, verification_section, wanted_groups, iteration, seed
        )
        updated = _update(
            sampled,
            {"critic": critic},
            policy,
            reference,
            advantages_section,
            ppo_update_section,
            iteration,
            seed,
            store,
        )
        return Outputs(**updated)

    return iterate


def _without_critic(draws: int) -> BaseComponent:
    @dsl.pipeline(name="iteration", description="Sample, grade, estimate advantages from groups, update the policy")
    def iterate(
        policy: dsl.Input[dsl.Model],
        reference: dsl.Input[dsl.Model],
        prompts: dsl.Input[dsl.Dataset],
        history: dsl.Input[dsl.Dataset],
        rollout_section: str,
        verification_section: str,
        advantages_section: str,
        ppo_update_section: str,
        wanted_groups: int,
        iteration: int,
        seed: int,
        store: str,
    ) -> OutputsWithoutCritic:
        sampled = _draw(
            draws, policy, prompts, history, rollout_section, verification_section, wanted_groups, iteration, seed
        )
        updated = _update(
            sampled, {}, policy, reference, advantages_section, ppo_update_section, iteration, seed, store
        )
        return OutputsWithoutCritic(**updated)

    return iterate


def _draw(
    draws: int,
    policy: Any,
    prompts: Any,
    history: Any,
    rollout_section: str,
    verification_section: str,
    wanted_groups: int,
    iteration: int,
    seed: int,
) -> dict[str, Any]:
    """Rollouts and rewards of all draws, the metrics of the last one, and the history with those before."""
    found: dict[str, Any] = {}
    for draw in range(1, draws + 1):
        if found:
            earlier = {name: found[f"{name}_metrics"] for name in ("rollout", "verification")}
            recorded = record(iteration=iteration, purpose=f"draw-{draw - 1}", previous=history, **earlier)
            history = recorded.outputs["new_history"]
        sampled = rollout(
            section=rollout_section,
            seed=seed,
            iteration=iteration,
            draw=draw,
            wanted_groups=wanted_groups if found else 0,  # nothing is known before the first draw
            purpose="training",
            prompts=prompts,
            policy=policy,
            **{f"previous_{name}": found[name] for name in ("rollouts", "rewards") if found},
        )
        graded = verification(
            section=verification_section,
            iteration=iteration,
            purpose="training",
            prompts=prompts,
            rollouts=sampled.outputs["rollouts"],
        )
        found = {
            "rollouts": sampled.outputs["rollouts"],
            "rewards": graded.outputs["rewards"],
            "rollout_metrics": sampled.outputs["metrics"],
            "verification_metrics": graded.outputs["metrics"],
        }
    return {**found, "history": history}


def _update(
    sampled: dict[str, Any],
    critic: dict[str, Any],
    policy: Any,
    reference: Any,
    advantages_section: str,
    ppo_update_section: str,
    iteration: int,
    seed: int,
    store: str,
) -> dict[str, Any]:
    """Advantages and PPO update of what `_draw` found, and what the iteration hands on; `critic` may be empty."""
    estimated = advantages(
        section=advantages_section,
        iteration=iteration,
        rollouts=sampled["rollouts"],
        rewards=sampled["rewards"],
        **critic,
    )
    updated = (ppo_update if critic else ppo_update_without_critic)(
        section=ppo_update_section,
        seed=seed,
        iteration=iteration,
        store=store,
        rollouts=sampled["rollouts"],
        rewards=sampled["rewards"],
        experience=estimated.outputs["experience"],
        policy=policy,
        reference=reference,
        **critic,
    )
    recorded = record(
        iteration=iteration,
        purpose="training",
        previous=sampled["history"],
        rollout=sampled["rollout_metrics"],
        verification=sampled["verification_metrics"],
        advantages=estimated.outputs["metrics"],
        ppo_update=updated.outputs["metrics"],
    )
    return {
        "policy": updated.outputs["new_policy"],
        **{name: updated.outputs[f"new_{name}"] for name in critic},
        "history": recorded.outputs["new_history"],
        "rollouts": sampled["rollouts"],
        "rewards": sampled["rewards"],
        "experience": estimated.outputs["experience"],
    }
