"""From a recipe to the IR YAML that kfp.local and a cluster take."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler
from kfp.dsl.base_component import BaseComponent

from pipelines.expansion import expanded
from pipelines.outside import READS, stamp
from pipelines.training import training_pipeline
from vapo.recipe import Recipe


def compile_pipeline(
    recipe: Recipe, image: str, pipeline_of: Callable[[Recipe], BaseComponent] = training_pipeline
) -> str:
    """The IR of a recipe's pipeline as YAML text, every stage in `image`."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline_of(recipe), str(path))
        documents: list[dict[str, Any]] = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    documents[0] = expanded(documents[0])
    outside = recipe.outside()
    for executor in documents[0]["deploymentSpec"]["executors"].values():
        container = executor["container"]
        container["image"] = image
        if paths := outside.get(_stage_of(container)):
            container.setdefault("env", []).append({"name": READS, "value": stamp(paths)})
    return yaml.safe_dump_all(documents, sort_keys=True, width=120)


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
