"""The rollouts of a draw as one task, or as several that share its prompts and one that puts their rows together."""

from typing import Any

from kfp import dsl

from components.concatenation.component import concatenation
from components.rollout.component import rollout


def sampled(
    shards: int,
    *,
    section: Any,
    block_start: Any,
    offset: Any,
    purpose: str,
    previous_rollouts: Any = None,
    previous_rewards: Any = None,
    **given: Any,
) -> Any:
    """The outputs `rollouts` and `metrics` of a draw: the same rows, however many shards there are.

    Args:
        shards: how many tasks share the prompts; their numbers are the items of a loop, since the backend takes no
            artifacts as items.
        given: what else the component `rollout` takes.
    """
    when = {"section": section, "block_start": block_start, "offset": offset, "purpose": purpose}
    before = {"previous_rollouts": previous_rollouts, "previous_rewards": previous_rewards}
    before = {name: table for name, table in before.items() if table is not None}
    if shards == 1:
        return rollout(**when, **before, **given).outputs
    _, whole = shared(shards, **when, **before, **given)
    return whole.outputs


def shared(shards: int, **given: Any) -> tuple[dsl.PipelineTask, dsl.PipelineTask]:
    """The task that samples a shard, in a loop over all of them, and the one that puts their rows together.

    Args:
        given: what the component `rollout` takes besides.
    """
    with dsl.ParallelFor(list(range(shards))) as shard:
        part = rollout(**given, shard=shard, shards=shards)
    whole = concatenation(
        **{name: value for name, value in given.items() if name in concatenation.component_spec.inputs},
        parts=dsl.Collected(part.outputs["rollouts"]),
        metrics_of_parts=dsl.Collected(part.outputs["metrics"]),
    )
    return part, whole
