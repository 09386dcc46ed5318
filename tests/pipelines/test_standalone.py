"""The pipeline of `vapo evaluate`: one evaluation and its page, and cache keys that know the files outside."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from pipelines.compiling import compile_pipeline, stages_of
from pipelines.standalone import evaluation_pipeline
from pipelines.training import as_json
from vapo.recipe import Recipe, parse_recipe


def recipe(place: Path) -> Recipe:
    (place / "model").mkdir(exist_ok=True)
    (place / "model" / "config.json").write_text("{}")
    (place / "p.jsonl").write_text("x")
    problems = {"source": "file", "path": str(place / "p.jsonl"), "heldout_share": 1.0}
    data: dict[str, Any] = {"name": "a-on-b", "problems": problems, "base_model": {"path": str(place / "model")}}
    return parse_recipe(data, "test")


def compiled(found: Recipe) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The IR, parsed, and its root tasks."""
    ir = compile_pipeline(found, "python", evaluation_pipeline)
    document = next(iter(yaml.safe_load_all(ir)))
    return ir, document, document["root"]["dag"]["tasks"]


def test_one_evaluation_and_nothing_of_training(tmp_path: Path) -> None:
    ir, document, tasks = compiled(recipe(tmp_path))
    assert document["pipelineInfo"]["name"] == "vapo-evaluate-a-on-b"
    once = dict.fromkeys(("problems", "base_model", "rollout", "verification", "evaluation", "report"), 1)
    assert stages_of(ir) == {**once, "history": 2}
    sources = {
        name: (found["taskOutputArtifact"]["producerTask"], found["taskOutputArtifact"]["outputArtifactKey"])
        for name, found in tasks["report"]["inputs"]["artifacts"].items()
    }
    assert sources == {
        "history": ("evaluation", "history"),
        "policy": ("base-model", "policy"),
        "evaluation": ("evaluation", "evaluation"),
        "evaluation_prompts": ("problems", "heldout_prompts"),
        "evaluation_rollouts": ("evaluation", "rollouts"),
        "evaluation_rewards": ("evaluation", "rewards"),
    }


def test_sampling_is_that_of_evaluation(tmp_path: Path) -> None:
    found = recipe(tmp_path)
    _, document, tasks = compiled(found)
    defaults = document["root"]["inputDefinitions"]["parameters"]
    assert defaults["rollout_section"]["defaultValue"] == as_json(found.rollout_for_evaluation())
    assert tasks["evaluation"]["inputs"]["parameters"]["rollout_section"] == {
        "componentInputParameter": "rollout_section"
    }


def keys(found: Recipe) -> dict[str, Any]:
    """Task -> its environment, which is part of its cache key."""
    _, document, tasks = compiled(found)
    executors, made = document["deploymentSpec"]["executors"], {}
    for name, task in tasks.items():
        assert task["cachingOptions"] == {"enableCache": True}  # a key of our own would replace settings and inputs
        label = document["components"][task["componentRef"]["name"]].get("executorLabel")
        made[name] = executors[label]["container"].get("env") if label else None
    return made


def test_a_changed_file_is_another_cache_key(tmp_path: Path) -> None:
    found = recipe(tmp_path)
    before = keys(found)
    assert before == keys(found)
    os.utime(tmp_path / "p.jsonl", ns=(1, 1))
    touched = keys(found)
    assert {name for name in before if touched[name] != before[name]} == {"problems"}
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    assert {name for name in before if keys(found)[name] != touched[name]} == {"base-model"}
