"""The blocks of a run one after the other, and what ends it: the target, or its last iteration."""

from collections.abc import Callable, Mapping
from typing import Any

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from pipelines.block import MEASURED, TABLES, blocks_of, pipelines_of
from pipelines.continuing import then_next
from pipelines.ending import ending_pipeline, finish
from pipelines.segments import Segment
from pipelines.stopping import FOR_A_CONDITION
from vapo.recipe import Recipe


def outputs_of(recipe: Recipe, segment: Segment) -> dict[str, Any]:
    """What a run leaves; where it may end early, only what an ending makes is always there."""
    gives: dict[str, Any] = {} if recipe.target_accuracy else {"policy": dsl.Model, "history": dsl.Dataset}
    stops = recipe.target_accuracy and any(b.evaluated for b in blocks_of(recipe, segment.first, segment.last))
    if segment.ends or stops:
        gives["page"] = dsl.HTML
    if not segment.ends:
        gives["handed_over"] = dsl.Artifact
    return gives


def chain_of(recipe: Recipe, segment: Segment) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function that adds a run's blocks and endings to the pipeline that is being built, and returns its outputs.

    It takes the pipeline's parameters, and what is there before the first block, by their names. The sub-pipelines are
    made here, before: kfp reads one pipeline at a time.
    """
    blocks = blocks_of(recipe, segment.first, segment.last)
    pipelines = pipelines_of(blocks, recipe)
    models = ("policy", "critic") if recipe.has_critic else ("policy",)
    hands_over = None if segment.ends else segment
    stop = ending_pipeline(True, hands_over, True, recipe.has_critic)
    end = ending_pipeline(segment.ends, hands_over, False, recipe.has_critic)

    def build(known: Mapping[str, Any]) -> dict[str, Any]:
        known = dict(known)
        made: dict[str, Any] = {}
        condition: dict[str, Any] = {}  # on which the next block runs
        for block, pipeline in zip(blocks, pipelines, strict=True):
            done = _task(pipeline, {**known, "block_start": block.first}, condition).set_display_name(block.name)
            known |= {name: done.outputs[name] for name in (*models, "history")}
            known |= {f"last_{table}": done.outputs[f"last_{table}"] for table in TABLES}
            known = {f"first_{table}": done.outputs[f"first_{table}"] for table in TABLES} | known  # of the first block
            known |= {name: done.outputs[name] for name in MEASURED if block.evaluated}
            may_stop = recipe.target_accuracy and block.evaluated and (block is not blocks[-1] or hands_over)
            if may_stop:
                accuracy, target = done.outputs["accuracy"], known["target_accuracy"]
                stopped = _task(stop, known, {"runs_from": accuracy, "target_accuracy": target})
                made |= stopped.set_display_name(f"stop-after-{block.last:03d}").outputs
                condition = {"runs_below": accuracy, "target_accuracy": target}
        if condition:
            made |= _task(end, known, condition).set_display_name("end").outputs
        else:
            made |= finish(known, shows=segment.ends, segment=hands_over)
        if hands_over and recipe.chain.secret:
            then_next(recipe, known, made["handed_over"])
        return {name: (known | made)[name] for name in outputs_of(recipe, segment)}

    return build


def _task(pipeline: BaseComponent, known: Mapping[str, Any], condition: Mapping[str, Any]) -> dsl.PipelineTask:
    """A sub-pipeline's task, which gets of what is known all that it takes."""
    wanted = pipeline.component_spec.inputs.keys() - FOR_A_CONDITION.keys()
    return pipeline(**{name: known[name] for name in sorted(wanted)}, **condition)
