"""From a recipe to the IR YAML that kfp.local and a cluster take."""

from collections.abc import Callable
from typing import Any

import yaml
from google.protobuf import json_format
from kfp.dsl.base_component import BaseComponent

from pipelines.expansion import expanded
from pipelines.images import image_of
from pipelines.merging import merged
from pipelines.outside import READS, stamp
from pipelines.training import training_pipeline
from vapo.lineage.records import records_env
from vapo.recipe import Recipe
from vapo.stage import IMAGE

DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # with libyaml where there is one: 8 times faster


def compile_pipeline(
    recipe: Recipe,
    image: str = "",
    pipeline_of: Callable[[Recipe], BaseComponent] = training_pipeline,
    *,
    share: bool = False,
) -> str:
    """The IR of a recipe's pipeline as YAML text.

    Args:
        image: that every stage runs in; empty: the recipe says which (`images`).
        share: give equal tasks one component, as a cluster needs it (`merging`); otherwise each has its own, as
            kfp.local needs it (`expansion`): its output folders are named by components.
    """
    pipeline = pipeline_of(recipe)
    # What kfp's compiler would write to a file: through YAML it takes a hundred times as long.
    document = json_format.MessageToDict(pipeline.pipeline_spec)
    platforms = json_format.MessageToDict(pipeline.platform_spec)
    if "://" in recipe.runtime.store:  # on this machine `vapo run` says where the store is
        parameter = document["root"]["inputDefinitions"]["parameters"]["store"]
        parameter |= {"defaultValue": recipe.runtime.store, "isOptional": True}
    outside = recipe.outside()
    for executor in document["deploymentSpec"]["executors"].values():
        container = executor["container"]
        stage = _stage_of(container)
        container["image"] = image or image_of(stage, recipe)
        container.setdefault("env", []).append({"name": IMAGE, "value": container["image"]})
        if share:  # on this machine `vapo run` says where records are kept
            container["env"] += [{"name": name, "value": value} for name, value in records_env(recipe).items()]
        if paths := outside.get(stage):
            container["env"].append({"name": READS, "value": stamp(paths)})
    if share:
        document, platforms = merged(document, platforms)
    else:  # kfp.local knows no platform
        document, platforms = expanded(document), {}
    documents = [document, platforms] if platforms else [document]
    return yaml.dump_all(documents, Dumper=DUMPER, sort_keys=True, width=120)


def stages_of(ir: str) -> dict[str, int]:
    """How many tasks of each stage a pipeline will run, say {"rollout": 26, "history": 27}."""
    document = next(iter(yaml.safe_load_all(ir)))
    executors = document["deploymentSpec"]["executors"]
    counts: dict[str, int] = {}

    def walk(component: dict[str, Any]) -> None:
        for task in component["dag"]["tasks"].values():
            inner = document["components"][task["componentRef"]["name"]]
            if "dag" in inner:
                walk(inner)
                continue
            stage = _stage_of(executors[inner["executorLabel"]]["container"])
            counts[stage] = counts.get(stage, 0) + 1

    walk(document["root"])
    return counts


def _stage_of(container: dict[str, Any]) -> str:
    arguments: list[str] = container["args"]
    return arguments[arguments.index("--function_to_execute") + 1]
