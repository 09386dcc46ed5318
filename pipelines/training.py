"""The whole training run: problems, base model, value-pretraining, iterations with evaluations between, report."""

from typing import NamedTuple

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.base_model.component import base_model
from components.history.component import history as record
from components.problems.component import problems
from components.report.component import report
from pipelines.evaluation import evaluate
from pipelines.iteration import iteration_pipeline
from pipelines.value_pretraining import pretrain_critic
from vapo.recipe import Recipe, Section


class Outputs(NamedTuple):
    policy: dsl.Model
    history: dsl.Dataset
    page: dsl.HTML


def evaluated_iterations(recipe: Recipe) -> list[int]:
    """After which iterations the policy is evaluated: 0, every few, and the last."""
    every = range(0, recipe.iterations, recipe.evaluation.every)
    return [*every, recipe.iterations]


def training_pipeline(recipe: Recipe) -> BaseComponent:
    """The pipeline of a recipe; its sections are the pipeline's parameters.

    What shapes the graph: iterations, evaluation.every, rollout.draws, and whether there is a critic
    (advantages.estimator).
    """
    evaluated = evaluated_iterations(recipe)
    iterate = iteration_pipeline(recipe.rollout.draws, recipe.has_critic)

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
            iteration=0, purpose="training", problems=made.outputs["metrics"], base_model=base.outputs["metrics"]
        )
        policy, history = base.outputs["policy"], begun.outputs["new_history"]

        def evaluation_after(iteration: int) -> dsl.PipelineTask:
            task = evaluate(
                policy=policy,
                prompts=heldout_prompts,
                history=history,
                rollout_section=evaluation_rollout_section,
                verification_section=verification_section,
                evaluation_section=evaluation_section,
                iteration=iteration,
                seed=seed,
            )
            return task.set_display_name(f"evaluation-{iteration:03d}")

        measured = evaluation_after(0)
        history, critic, pretraining = measured.outputs["history"], {}, {}
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
        first = last = None
        for number in range(1, recipe.iterations + 1):
            last = iterate(
                **critic,
                policy=policy,
                reference=base.outputs["policy"],
                prompts=train_prompts,
                history=history,
                rollout_section=rollout_section,
                verification_section=verification_section,
                advantages_section=advantages_section,
                ppo_update_section=ppo_update_section,
                wanted_groups=wanted_groups,
                iteration=number,
                seed=seed,
                store=store,
            )
            last.set_display_name(f"iteration-{number:03d}")
            first = first or last
            policy, history = last.outputs["policy"], last.outputs["history"]
            critic = {name: last.outputs[name] for name in critic}
            if number in evaluated:
                measured = evaluation_after(number)
                history = measured.outputs["history"]
        assert first is not None
        assert last is not None
        written = report(
            section=report_section,
            recipe=recipe_json,
            history=history,
            prompts=train_prompts,
            policy=policy,
            first_rollouts=first.outputs["rollouts"],
            first_rewards=first.outputs["rewards"],
            first_experience=first.outputs["experience"],
            last_rollouts=last.outputs["rollouts"],
            last_rewards=last.outputs["rewards"],
            last_experience=last.outputs["experience"],
            evaluation=measured.outputs["evaluation"],
            evaluation_rollouts=measured.outputs["rollouts"],
            evaluation_rewards=measured.outputs["rewards"],
            evaluation_prompts=heldout_prompts,
            **pretraining,
        )
        return Outputs(policy=policy, history=history, page=written.outputs["page"])

    return training


def as_json(section: Section) -> str:
    """A section as the one JSON parameter of its stage; equal settings give equal text, so that caches hit."""
    return section.model_dump_json()
