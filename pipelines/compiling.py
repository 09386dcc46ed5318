"""From a recipe to the IR YAML that kfp.local and a cluster take."""

import tempfile
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler

from pipelines.training import training_pipeline
from vapo.recipe import Recipe


def compile_pipeline(recipe: Recipe, image: str) -> str:
    """The pipeline's IR as YAML text, every stage in `image`."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "pipeline.yaml"
        compiler.Compiler().compile(training_pipeline(recipe), str(path))
        documents: list[dict[str, Any]] = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    for executor in documents[0]["deploymentSpec"]["executors"].values():
        executor["container"]["image"] = image
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
            arguments = executors[inner["executorLabel"]]["container"]["args"]
            stage = arguments[arguments.index("--function_to_execute") + 1]
            counts[stage] = counts.get(stage, 0) + 1

    walk(document["root"])
    return counts
