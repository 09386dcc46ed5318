"""An evaluation by itself: any local model on any problems, without training."""

from typing import NamedTuple

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.base_model.component import base_model
from components.history.component import history as record
from components.problems.component import problems
from components.report.component import report
from pipelines.evaluation import evaluation_of
from pipelines.training import as_json
from vapo.recipe import Recipe


class Outputs(NamedTuple):
    history: dsl.Dataset
    page: dsl.HTML


def evaluation_pipeline(recipe: Recipe) -> BaseComponent:
    """The recipe's held-out problems, its base_model.path as the policy, one evaluation, and its page."""

    evaluate = evaluation_of(recipe.rollout_for_evaluation().shards)

    @dsl.pipeline(name=f"vapo-evaluate-{recipe.name}", description="avg@k, pass@k and cons@k of a model on problems")
    def evaluating(
        store: str,
        seed: int = recipe.seed,
        problems_section: str = as_json(recipe.problems),
        base_model_section: str = as_json(recipe.base_model),
        rollout_section: str = as_json(recipe.rollout_for_evaluation()),
        verification_section: str = as_json(recipe.verification),
        evaluation_section: str = as_json(recipe.evaluation),
        report_section: str = as_json(recipe.report),
        recipe_json: str = as_json(recipe),
    ) -> Outputs:
        made = problems(section=problems_section, seed=seed)
        heldout_prompts = made.outputs["heldout_prompts"]
        base = base_model(section=base_model_section, seed=seed, store=store, examples=made.outputs["examples"])
        begun = record(
            block_start=0,
            offset=0,
            purpose="training",
            problems=made.outputs["metrics"],
            base_model=base.outputs["metrics"],
        )
        measured = evaluate(
            policy=base.outputs["policy"],
            prompts=heldout_prompts,
            history=begun.outputs["new_history"],
            rollout_section=rollout_section,
            verification_section=verification_section,
            evaluation_section=evaluation_section,
            block_start=0,
            offset=0,
            seed=seed,
        )
        written = report(
            section=report_section,
            recipe=recipe_json,
            history=measured.outputs["history"],
            policy=base.outputs["policy"],
            evaluation=measured.outputs["evaluation"],
            evaluation_prompts=heldout_prompts,
            evaluation_rollouts=measured.outputs["rollouts"],
            evaluation_rewards=measured.outputs["rewards"],
        )
        return Outputs(history=measured.outputs["history"], page=written.outputs["page"])

    return evaluating
