"""One iteration as a sub-pipeline: rollout, verification, advantages, PPO update."""

from typing import Any, NamedTuple

from kfp import dsl

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


def _stages(
    policy: Any,
    reference: Any,
    critic: dict[str, Any],
    prompts: Any,
    history: Any,
    sections: tuple[str, str, str, str],
    iteration: int,
    seed: int,
    store: str,
) -> dict[str, dsl.PipelineTask]:
    """The tasks of an iteration by stage; `critic` is {"critic": artifact} or empty."""
    rollout_section, verification_section, advantages_section, ppo_update_section = sections
    sampled = rollout(
        section=rollout_section, seed=seed, iteration=iteration, purpose="training", prompts=prompts, policy=policy
    )
    graded = verification(
        section=verification_section,
        iteration=iteration,
        purpose="training",
        prompts=prompts,
        rollouts=sampled.outputs["rollouts"],
    )
    estimated = advantages(
        section=advantages_section,
        iteration=iteration,
        rollouts=sampled.outputs["rollouts"],
        rewards=graded.outputs["rewards"],
        **critic,
    )
    updated = (ppo_update if critic else ppo_update_without_critic)(
        section=ppo_update_section,
        seed=seed,
        iteration=iteration,
        store=store,
        rollouts=sampled.outputs["rollouts"],
        rewards=graded.outputs["rewards"],
        experience=estimated.outputs["experience"],
        policy=policy,
        reference=reference,
        **critic,
    )
    recorded = record(
        iteration=iteration,
        purpose="training",
        previous=history,
        rollout=sampled.outputs["metrics"],
        verification=graded.outputs["metrics"],
        advantages=estimated.outputs["metrics"],
        ppo_update=updated.outputs["metrics"],
    )
    return {
        "rollout": sampled,
        "verification": graded,
        "advantages": estimated,
        "ppo_update": updated,
        "history": recorded,
    }


def _outputs(tasks: dict[str, dsl.PipelineTask]) -> dict[str, Any]:
    """What either kind of iteration hands on."""
    return {
        "policy": tasks["ppo_update"].outputs["new_policy"],
        "history": tasks["history"].outputs["new_history"],
        "rollouts": tasks["rollout"].outputs["rollouts"],
        "rewards": tasks["verification"].outputs["rewards"],
        "experience": tasks["advantages"].outputs["experience"],
    }


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
    iteration: int,
    seed: int,
    store: str,
) -> Outputs:
    sections = (rollout_section, verification_section, advantages_section, ppo_update_section)
    tasks = _stages(policy, reference, {"critic": critic}, prompts, history, sections, iteration, seed, store)
    return Outputs(critic=tasks["ppo_update"].outputs["new_critic"], **_outputs(tasks))


@dsl.pipeline(name="iteration", description="Sample, grade, estimate advantages from groups, update the policy")
def iterate_without_critic(
    policy: dsl.Input[dsl.Model],
    reference: dsl.Input[dsl.Model],
    prompts: dsl.Input[dsl.Dataset],
    history: dsl.Input[dsl.Dataset],
    rollout_section: str,
    verification_section: str,
    advantages_section: str,
    ppo_update_section: str,
    iteration: int,
    seed: int,
    store: str,
) -> OutputsWithoutCritic:
    sections = (rollout_section, verification_section, advantages_section, ppo_update_section)
    tasks = _stages(policy, reference, {}, prompts, history, sections, iteration, seed, store)
    return OutputsWithoutCritic(**_outputs(tasks))
