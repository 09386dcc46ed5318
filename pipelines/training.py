"""The whole training run: problems, base model, value-pretraining, iterations with evaluations between, report."""

from typing import NamedTuple

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.base_model.component import base_model
from components.history.component import history as record
from components.problems.component import problems
from components.report.component import report
from pipelines.block import TABLES, blocks_of, pipelines_of
from pipelines.evaluation import evaluate
from pipelines.value_pretraining import pretrain_critic
from vapo.recipe import Recipe, Section


class Outputs(NamedTuple):
    policy: dsl.Model
    history: dsl.Dataset
    page: dsl.HTML


def training_pipeline(recipe: Recipe) -> BaseComponent:
    """The pipeline of a recipe; its sections are the pipeline's parameters.

    What shapes the graph: iterations, iterations_per_block, evaluation.every, rollout.draws, and whether there is a
    critic (advantages.estimator).
    """
    blocks = blocks_of(recipe)
    pipelines = pipelines_of(blocks, recipe.rollout.draws, recipe.has_critic)

    @dsl.pipeline(name=f"vapo-{recipe.name}", description="VAPO: value-based augmented PPO, arXiv 2504.05118")
    def training(
        store: str,
        seed: int = recipe.seed,
        problems_section: str = as_json(recipe.problems),
        base_model_section: str = as_json(recipe.base_model),
        rollout_section: str = as_json(recipe.rollout),
        evaluation_rollout_section: str = as_json(recipe.rollout_for_evaluation()),
        pretraining_rollout_section: str = as_json(recipe.rollout_for_value_pretraining()),
        verification_section: str = as_json(recipe.verification),
        value_pretraining_section: str = as_json(recipe.for_stage("value_pretraining")),
        advantages_section: str = as_json(recipe.for_stage("advantages")),
        ppo_update_section: str = as_json(recipe.for_stage("ppo_update")),
        evaluation_section: str = as_json(recipe.evaluation),
        report_section: str = as_json(recipe.report),
        wanted_groups: int = recipe.advantages.keep_groups,
        recipe_json: str = as_json(recipe),
    ) -> Outputs:
        made = problems(section=problems_section, seed=seed)
        train_prompts, heldout_prompts = made.outputs["train_prompts"], made.outputs["heldout_prompts"]
        base = base_model(section=base_model_section, seed=seed, store=store, examples=made.outputs["examples"])
        begun = record(
            block_start=0,
            offset=0,
            purpose="training",
            problems=made.outputs["metrics"],
            base_model=base.outputs["metrics"],
        )
        policy, history = base.outputs["policy"], begun.outputs["new_history"]

        for_evaluation = {
            "heldout_prompts": heldout_prompts,
            "evaluation_rollout_section": evaluation_rollout_section,
            "evaluation_section": evaluation_section,
        }
        before = evaluate(
            policy=policy,
            prompts=heldout_prompts,
            history=history,
            rollout_section=evaluation_rollout_section,
            verification_section=verification_section,
            evaluation_section=evaluation_section,
            block_start=0,
            offset=0,
            seed=seed,
        )
        before.set_display_name("evaluation-000")
        history, critic, pretraining = before.outputs["history"], {}, {}
        if recipe.has_critic:
            pretrained = pretrain_critic(
                policy=policy,
                prompts=train_prompts,
                history=history,
                rollout_section=pretraining_rollout_section,
                verification_section=verification_section,
                value_pretraining_section=value_pretraining_section,
                seed=seed,
                store=store,
            )
            pretrained.set_display_name("value-pretraining")
            history, critic = pretrained.outputs["history"], {"critic": pretrained.outputs["critic"]}
            pretraining = {"pretraining": pretrained.outputs["pretraining"]}
        done = []
        for block, pipeline in zip(blocks, pipelines, strict=True):
            done.append(
                pipeline(
                    **critic,
                    **(for_evaluation if block.evaluated else {}),
                    policy=policy,
                    reference=base.outputs["policy"],
                    prompts=train_prompts,
                    history=history,
                    rollout_section=rollout_section,
                    verification_section=verification_section,
                    advantages_section=advantages_section,
                    ppo_update_section=ppo_update_section,
                    wanted_groups=wanted_groups,
                    block_start=block.first,
                    seed=seed,
                    store=store,
                ).set_display_name(block.name)
            )
            policy, history = done[-1].outputs["policy"], done[-1].outputs["history"]
            critic = {name: done[-1].outputs[name] for name in critic}
        shown = {
            f"{when}_{table}": of.outputs[f"{when}_{table}"]
            for when, of in (("first", done[0]), ("last", done[-1]))
            for table in TABLES
        }
        written = report(
            section=report_section,
            recipe=recipe_json,
            history=history,
            prompts=train_prompts,
            policy=policy,
            evaluation=done[-1].outputs["evaluation"],
            evaluation_rollouts=done[-1].outputs["evaluation_rollouts"],
            evaluation_rewards=done[-1].outputs["evaluation_rewards"],
            **shown,
            evaluation_prompts=heldout_prompts,
            **pretraining,
        )
        return Outputs(policy=policy, history=history, page=written.outputs["page"])

    return training


def as_json(section: Section) -> str:
    """A section as the one JSON parameter of its stage; equal settings give equal text, so that caches hit."""
    return section.model_dump_json()
