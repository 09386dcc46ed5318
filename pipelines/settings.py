"""Which settings of a recipe a stage's execution has: its section and the parameters that come from the recipe."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pipelines.training import as_json
from vapo.errors import UserError
from vapo.lineage.graph import Node
from vapo.recipe import Recipe, Section, override

SECTIONS: Mapping[tuple[str, str], Callable[[Recipe], Section]] = {  # by stage and purpose
    ("problems", ""): lambda recipe: recipe.problems,
    ("base_model", ""): lambda recipe: recipe.base_model,
    ("rollout", "training"): lambda recipe: recipe.rollout,
    ("rollout", "evaluation"): Recipe.rollout_for_evaluation,
    ("rollout", "value_pretraining"): Recipe.rollout_for_value_pretraining,
    ("concatenation", "training"): lambda recipe: recipe.rollout,
    ("concatenation", "evaluation"): Recipe.rollout_for_evaluation,
    ("concatenation", "value_pretraining"): Recipe.rollout_for_value_pretraining,
    ("verification", ""): lambda recipe: recipe.verification,
    ("value_pretraining", ""): lambda recipe: recipe.for_stage("value_pretraining"),
    ("advantages", ""): lambda recipe: recipe.for_stage("advantages"),
    ("ppo_update", ""): lambda recipe: recipe.for_stage("ppo_update"),
    ("evaluation", ""): lambda recipe: recipe.evaluation,
    ("report", ""): lambda recipe: recipe.report,
}
PARAMETERS: Mapping[str, Callable[[Recipe], Any]] = {
    "seed": lambda recipe: recipe.seed,
    "wanted_groups": lambda recipe: recipe.advantages.keep_groups,
    "recipe": as_json,
}
ANYWHERE = ("runtime.", "resources.")  # settings that change no result


def changed(node: Node, before: Recipe, after: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """A recorded execution's section and parameters, with what another recipe sets differently.

    Args:
        before: the recipe that it was executed with.
        after: the same with other settings.
    """
    record = node.record
    old, new = (_section(record.stage, record.purpose, recipe) for recipe in (before, after))
    section = {**record.section, **{key: value for key, value in new.items() if value != old[key]}}
    parameters = dict(record.parameters)
    for name, value_of in PARAMETERS.items():
        if name in parameters and parameters[name] == value_of(before):
            parameters[name] = value_of(after)
    return section, parameters


def check_settings(settings: Iterable[str], nodes: Iterable[Node], recipe: Recipe) -> Recipe:
    """The recipe with these settings, each of which must change what one of the executions does.

    Raises:
        UserError: one changes none of them, or the shape of the pipeline; says which stages it is for.
    """
    asked, wanted = list(settings), list(nodes)
    after = override(recipe, asked)
    if shape_of(after) != shape_of(recipe):
        raise UserError(
            f"--set {' '.join(asked)}: that changes which tasks there are, and a rerun repeats recorded ones: use "
            "'vapo run', where the cache serves what stays the same"
        )
    for text in asked:
        if text.startswith(ANYWHERE):
            continue
        try:
            alone = override(recipe, [text])
        except UserError:  # it is valid together with the others
            alone = after
        if not any(_differs(node, recipe, alone) for node in wanted):
            read_by = [stage for stage, purpose in SECTIONS if _sets(stage, purpose, recipe, alone)]
            done = ", ".join(dict.fromkeys(node.record.stage for node in wanted))
            if not read_by:
                raise UserError(f"--set {text}: the run has that already, or no stage reads it: leave it out")
            raise UserError(
                f"--set {text}: it is for {', '.join(dict.fromkeys(read_by))}, but what is done again is {done}: "
                "rerun that stage (--downstream takes along what follows), or leave the setting out"
            )
    return after


def shape_of(recipe: Recipe) -> tuple[Any, ...]:
    """What decides which tasks a recipe's pipeline has."""
    blocks = recipe.iterations, recipe.iterations_per_block, recipe.iterations_per_run, recipe.target_accuracy
    return *blocks, recipe.evaluation.every, recipe.rollout.draws, recipe.rollout.shards, recipe.has_critic


def _differs(node: Node, before: Recipe, after: Recipe) -> bool:
    section, parameters = changed(node, before, after)
    own = {name: value for name, value in parameters.items() if name != "recipe"}
    return section != node.record.section or own != {name: node.record.parameters[name] for name in own}


def _sets(stage: str, purpose: str, before: Recipe, after: Recipe) -> bool:
    return _section(stage, purpose, before) != _section(stage, purpose, after)


def _section(stage: str, purpose: str, recipe: Recipe) -> dict[str, Any]:
    section_of = SECTIONS.get((stage, purpose)) or SECTIONS.get((stage, ""))
    found: dict[str, Any] = json.loads(as_json(section_of(recipe))) if section_of else {}
    return found
