"""From a recipe to the IR YAML that kfp.local and a cluster take."""

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import yaml
from google.protobuf import json_format
from kfp.dsl.base_component import BaseComponent

from pipelines.commands import without_shell
from pipelines.expansion import expanded
from pipelines.images import image_of
from pipelines.merging import merged
from pipelines.outside import READS, stamp
from pipelines.resources import with_resources
from pipelines.segments import Segment
from pipelines.stopping import conditional
from pipelines.training import training_pipeline
from pipelines.writing import as_yaml
from vapo.lineage.records import records_env
from vapo.recipe import Recipe
from vapo.stage import IMAGE


def compile_pipeline(
    recipe: Recipe,
    image: str = "",
    pipeline_of: Callable[..., BaseComponent] = training_pipeline,
    *,
    share: bool = False,
    segment: Segment | None = None,
    marks: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The IR of a recipe's pipeline as YAML text.

    Args:
        image: that every stage runs in; empty: the recipe says which (`images`).
        share: for a cluster: with what its pods ask for (`resources`), and equal tasks have one component
            (`merging`). Otherwise each has its own, as kfp.local needs it (`expansion`): its output folders are named
            by components.
        segment: the part of the training that this run does; None: all of it.
        marks: variables for the environment of every stage, which are part of kfp.local's cache keys.
    """
    pipeline = pipeline_of(recipe, segment) if segment else pipeline_of(recipe)
    # What kfp's compiler would write to a file: through YAML it takes a hundred times as long.
    document = json_format.MessageToDict(pipeline.pipeline_spec)
    platforms = json_format.MessageToDict(pipeline.platform_spec)
    if "://" in recipe.runtime.store:  # on this machine `vapo run` says where the store is
        parameter = document["root"]["inputDefinitions"]["parameters"]["store"]
        parameter |= {"defaultValue": recipe.runtime.store, "isOptional": True}
    outside = recipe.outside()
    stages = {}
    for label, executor in document["deploymentSpec"]["executors"].items():
        if "container" not in executor:  # an importer
            continue
        container = executor["container"]
        stages[label] = stage = _stage_of(container)
        container["image"] = image or image_of(stage, recipe)
        container["command"] = without_shell(container["command"])
        container.setdefault("env", []).append({"name": IMAGE, "value": container["image"]})
        if share:  # on this machine `vapo run` says where records are kept
            container["env"] += [{"name": name, "value": value} for name, value in records_env(recipe).items()]
        container["env"] += [{"name": name, "value": value} for name, value in marks.items()]
        if paths := outside.get(stage):
            container["env"].append({"name": READS, "value": stamp(paths)})
    document = conditional(document, local=not share)
    if share:
        document, platforms = merged(*with_resources(document, platforms, recipe, stages))
    else:  # kfp.local knows no platform
        document, platforms = expanded(document), {}
    documents = [document, platforms] if platforms else [document]
    return as_yaml(documents)


def stages_of(ir: str) -> dict[str, int]:
    """How many tasks of each stage a pipeline will run, say {"rollout": 26, "history": 27}."""
    document = next(iter(yaml.safe_load_all(ir)))
    executors = document["deploymentSpec"]["executors"]
    counts: dict[str, int] = {}

    def walk(component: dict[str, Any], times: int) -> None:
        for task in component["dag"]["tasks"].values():
            inner = document["components"][task["componentRef"]["name"]]
            if "dag" in inner:
                looped = task.get("parameterIterator", {}).get("items", {}).get("raw")
                walk(inner, times * (len(json.loads(looped)) if looped else 1))
                continue
            executor = executors[inner["executorLabel"]]
            if "container" in executor:
                stage = _stage_of(executor["container"])
                counts[stage] = counts.get(stage, 0) + times

    walk(document["root"], 1)
    return counts


def summary(ir: str) -> str:
    """A pipeline's tasks: "40 tasks (8 rollout, 8 verification, ...)"."""
    tasks = stages_of(ir)
    shown = ", ".join(f"{count} {stage}" for stage, count in tasks.items())
    return f"{sum(tasks.values())} tasks ({shown})"


def _stage_of(container: dict[str, Any]) -> str:
    arguments: list[str] = container["args"]
    return arguments[arguments.index("--function_to_execute") + 1]
