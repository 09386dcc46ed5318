"""Files that a recipe names: a change of one is a change of the task that reads it, and of no other."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from pipelines.compiling import compile_pipeline
from pipelines.expansion import SEPARATOR
from pipelines.outside import READS, stamp
from vapo.recipe import load_recipe, override


def of(*paths: Path) -> str:
    return stamp([str(path) for path in paths])


def test_a_stamp_tells_names_sizes_and_times(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("one")
    folder, file, pattern = tmp_path, tmp_path / "a.jsonl", tmp_path / "*.jsonl"
    before = {path: of(path) for path in (folder, file, pattern)}
    (tmp_path / "b.jsonl").write_text("two")
    assert of(folder) != before[folder]
    assert of(file) == before[file]
    assert of(pattern) != before[pattern]
    (tmp_path / "a.jsonl").write_text("more")
    assert of(file) != before[file]
    size, time = of(file), file.stat().st_mtime_ns
    os.utime(file, ns=(time + 1000, time + 1000))
    assert of(file) != size
    assert of(file, folder) != of(folder, file)


def environments(recipe: Any) -> dict[str, str]:
    """Executor -> what it is stamped with."""
    executors = next(iter(yaml.safe_load_all(compile_pipeline(recipe, "image"))))["deploymentSpec"]["executors"]
    found = {name: executor["container"].get("env", []) for name, executor in executors.items()}
    return {name: entry["value"] for name, env in found.items() for entry in env if entry["name"] == READS}


def executed(executors: Iterable[str]) -> set[str]:
    """The stages of executors, which are named by their place: {"verification"} of "exec-iteration-1--verification"."""
    return {name.removeprefix("exec-").split(SEPARATOR)[-1].rstrip("-0123456789") for name in executors}


def test_only_who_reads_a_changed_file_runs_again(tmp_path: Path) -> None:
    model, problems, grader = tmp_path / "model", tmp_path / "p.jsonl", tmp_path / "grade.py"
    model.mkdir()
    for path in (model / "config.json", problems, grader):
        path.write_text("{}")
    named = {
        "problems.source": "file",
        "problems.path": problems,
        "problems.examples": 0,
        "base_model.path": model,
        "verification.grader": "custom",
        "verification.custom": f"{grader}:grade",
    }
    recipe = override(load_recipe("tiny"), [f"{key}={value}" for key, value in named.items()])
    before = environments(recipe)
    stages = {"problems": "problems", "base_model": "base-model", "verification": "verification"}
    assert executed(before) == set(stages.values())
    for path, stage in ((problems, "problems"), (model / "config.json", "base_model"), (grader, "verification")):
        path.write_text("{ }" + stage)
        after = environments(recipe)
        assert executed([name for name in after if after[name] != before[name]]) == {stages[stage]}
        before = after


def test_a_recipe_that_names_nothing_outside_is_stamped_nowhere() -> None:
    assert environments(load_recipe("tiny")) == {}
