"""The whole training run: problems, base model, value-pretraining, blocks of iterations with evaluations, report."""

from collections.abc import Mapping
from typing import Any

from kfp.dsl.base_component import BaseComponent

from components.base_model.component import base_model
from components.history.component import history as record
from components.problems.component import problems
from pipelines.chain import chain_of, outputs_of
from pipelines.evaluation import evaluation_of
from pipelines.segments import Segment, handed, taken_over
from pipelines.signature import pipeline_of
from pipelines.value_pretraining import value_pretraining_of
from vapo.recipe import Recipe, Section


def training_pipeline(recipe: Recipe, segment: Segment | None = None) -> BaseComponent:
    """The pipeline of a recipe; its sections are the pipeline's parameters.

    What shapes the graph: iterations, iterations_per_block, evaluation.every, rollout.draws, rollout.shards, whether
    there is a critic (advantages.estimator), and whether a run may end early (target_accuracy).

    Args:
        segment: the part of the training that this run does; None: all of it.
    """
    part = segment or Segment(1, 1, recipe.iterations, 1)
    go_on = chain_of(recipe, part)
    evaluate = evaluation_of(recipe.rollout_for_evaluation().shards)
    pretrain_critic = value_pretraining_of(recipe.rollout_for_value_pretraining().shards) if recipe.has_critic else None

    def training(**given: Any) -> dict[str, Any]:
        state = _begun(given, evaluate, pretrain_critic) if part.number == 1 else taken_over(given, recipe.has_critic)
        return go_on({**given, **state})

    description = "VAPO: value-based augmented PPO, arXiv 2504.05118"
    return pipeline_of(
        training, f"vapo-{recipe.name}", description, _parameters(recipe, part), outputs_of(recipe, part)
    )


def as_json(section: Section) -> str:
    """A section as the one JSON parameter of its stage; equal settings give equal text, so that caches hit."""
    return section.model_dump_json()


def _parameters(recipe: Recipe, segment: Segment) -> dict[str, Any]:
    """The pipeline's parameters with their defaults: name -> type, or (type, default)."""
    takes: dict[str, Any] = {
        "store": str,
        "seed": (int, recipe.seed),
        "problems_section": (str, as_json(recipe.problems)),
        "base_model_section": (str, as_json(recipe.base_model)),
        "rollout_section": (str, as_json(recipe.rollout)),
        "evaluation_rollout_section": (str, as_json(recipe.rollout_for_evaluation())),
        "pretraining_rollout_section": (str, as_json(recipe.rollout_for_value_pretraining())),
        "verification_section": (str, as_json(recipe.verification)),
        "value_pretraining_section": (str, as_json(recipe.for_stage("value_pretraining"))),
        "advantages_section": (str, as_json(recipe.for_stage("advantages"))),
        "ppo_update_section": (str, as_json(recipe.for_stage("ppo_update"))),
        "evaluation_section": (str, as_json(recipe.evaluation)),
        "report_section": (str, as_json(recipe.report)),
        "wanted_groups": (int, recipe.advantages.keep_groups),
        "recipe_json": (str, as_json(recipe)),
    }
    if recipe.target_accuracy:
        takes["target_accuracy"] = (float, recipe.target_accuracy)
    if segment.of > 1:
        takes = {"chain": str, **takes, "submission": (str, "{}")}
    if segment.number > 1:
        uris = {f"{name}_uri": str for name in handed(recipe.has_critic)}
        takes = {"handed_over": str, **uris, **takes}
        for name in ("problems", "base_model", "pretraining_rollout", "value_pretraining"):
            del takes[f"{name}_section"]
    return takes


def _begun(given: Mapping[str, Any], evaluate: BaseComponent, pretrain_critic: BaseComponent | None) -> dict[str, Any]:
    """What comes before the first iteration, and what it leaves by the names of `handed`."""
    seed, store = given["seed"], given["store"]
    made = problems(section=given["problems_section"], seed=seed)
    base = base_model(section=given["base_model_section"], seed=seed, store=store, examples=made.outputs["examples"])
    begun = record(
        block_start=0,
        offset=0,
        purpose="training",
        problems=made.outputs["metrics"],
        base_model=base.outputs["metrics"],
    )
    state = {
        "policy": base.outputs["policy"],
        "reference": base.outputs["policy"],
        "prompts": made.outputs["train_prompts"],
        "heldout_prompts": made.outputs["heldout_prompts"],
    }
    measured = evaluate(
        policy=state["policy"],
        prompts=state["heldout_prompts"],
        history=begun.outputs["new_history"],
        rollout_section=given["evaluation_rollout_section"],
        verification_section=given["verification_section"],
        evaluation_section=given["evaluation_section"],
        block_start=0,
        offset=0,
        seed=seed,
    )
    measured.set_display_name("evaluation-000")
    if pretrain_critic is None:
        return {**state, "history": measured.outputs["history"]}
    pretrained = pretrain_critic(
        policy=state["policy"],
        prompts=state["prompts"],
        history=measured.outputs["history"],
        rollout_section=given["pretraining_rollout_section"],
        verification_section=given["verification_section"],
        value_pretraining_section=given["value_pretraining_section"],
        seed=seed,
        store=store,
    )
    pretrained.set_display_name("value-pretraining")
    return state | {name: pretrained.outputs[name] for name in ("history", "critic", "pretraining")}
