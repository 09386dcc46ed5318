"""The task at the end of a segment's run that submits the next one, with a token of its own.

KFP has one service account for all tasks of a run. So the token comes from a Secret that is mounted into this task
alone, and belongs to an account that may create runs and nothing else.
"""

from collections.abc import Mapping
from typing import Any

from kfp import dsl, kubernetes

from components.next_segment.component import next_segment
from pipelines.tokens import TOKEN, TOKEN_FILE
from vapo.recipe import Recipe

PLACE = "/var/run/secrets/vapo/chain"  # where the Secret is mounted


def then_next(recipe: Recipe, given: Mapping[str, Any], handed_over: Any) -> dsl.PipelineTask:
    """The task that submits the next segment; it is executed again in every run.

    Args:
        given: the pipeline's parameters.
        handed_over: what hand-off wrote.
    """
    task = next_segment(
        section=recipe.chain.model_dump_json(),
        recipe=given["recipe_json"],
        submission=given["submission"],
        handed_over=handed_over,
    )
    task.set_caching_options(enable_caching=False)
    task.set_env_variable(TOKEN_FILE, f"{PLACE}/{TOKEN}")
    kubernetes.use_secret_as_volume(task, recipe.chain.secret, PLACE)
    return task
