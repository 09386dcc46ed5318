"""The tasks of a compiled pipeline in the order of their inputs, with what each will be called with, and its pods."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipelines.compiling import _stage_of
from pipelines.expansion import SEPARATOR
from pipelines.outside import files_of
from vapo.plan.cache import Task

Makers = tuple[int, ...]


@dataclass
class Tasks:
    """All tasks, and the pods that they take: a driver and one of its own for each, a driver for each sub-DAG."""

    tasks: list[Task] = field(default_factory=list)
    pods: int = 0


def tasks_of(ir: str, values: Mapping[str, Any], outside: Mapping[str, list[str]] | None = None) -> Tasks:
    """Every task that a pipeline will run, each copy of a loop and each branch of a condition counted.

    Args:
        ir: the pipeline, with a component of its own for each task (`compile_pipeline` without `share`).
        values: of the pipeline's parameters that have no default.
        outside: files that stages read by a path of their section, by stage (`Recipe.outside`).
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    document = next(iter(yaml.load_all(ir, Loader=loader)))
    walk = _Walk(document, {stage: _files(paths) for stage, paths in (outside or {}).items()})
    given = document["root"].get("inputDefinitions", {}).get("parameters", {})
    defaults = {name: found["defaultValue"] for name, found in given.items() if "defaultValue" in found}
    walk.dag(document["root"], {**defaults, **values}, {}, (), ())
    return walk.found


def _files(paths: list[str]) -> tuple[Path, ...]:
    return tuple(file for path in paths for file in files_of(Path(path)) or [Path(path)])


class _Walk:
    def __init__(self, document: dict[str, Any], outside: Mapping[str, tuple[Path, ...]]) -> None:
        self.components, self.outside = document["components"], outside
        self.executors = document["deploymentSpec"]["executors"]
        self.found = Tasks()

    def dag(
        self,
        component: dict[str, Any],
        values: Mapping[str, Any],
        artifacts: Mapping[str, Makers],
        path: tuple[str, ...],
        shown: tuple[str, ...],
    ) -> dict[str, Makers]:
        """Add all tasks below a DAG; returns the makers of its outputs."""
        self.found.pods += 1
        made: dict[str, dict[str, Makers]] = {}  # task -> output -> makers
        tasks = dict(component["dag"]["tasks"])
        while tasks:
            name = min(n for n, task in tasks.items() if not tasks.keys() & set(task.get("dependentTasks", ())))
            task = tasks.pop(name)
            inputs = task.get("inputs", {})
            inside = {key: _value(source, values) for key, source in inputs.get("parameters", {}).items()}
            known = {key: value for key, value in inside.items() if value is not None}
            taken = {key: _makers(source, artifacts, made) for key, source in inputs.get("artifacts", {}).items()}
            below, label = (*path, name), (*shown, task.get("taskInfo", {}).get("name", name))
            outputs: dict[str, Makers] = {}
            for item in _items(task, values):
                for key, makers in self._add(task, {**known, **item}, taken, below, label).items():
                    outputs[key] = outputs.get(key, ()) + makers
            made[name] = outputs
        selected = component["dag"].get("outputs", {}).get("artifacts", {})
        return {
            name: tuple(
                number
                for selector in output["artifactSelectors"]
                for number in made[selector["producerSubtask"]].get(selector["outputArtifactKey"], ())
            )
            for name, output in selected.items()
        }

    def _add(
        self,
        task: dict[str, Any],
        values: dict[str, Any],
        artifacts: Mapping[str, Makers],
        path: tuple[str, ...],
        shown: tuple[str, ...],
    ) -> dict[str, Makers]:
        component = self.components[task["componentRef"]["name"]]
        if "dag" in component:
            return self.dag(component, values, artifacts, path, shown)
        executor = self.executors[component["executorLabel"]]
        if "importer" in executor:
            self.found.pods += 1
            return {}
        self.found.pods += 2
        stage = _stage_of(executor["container"])
        defaults = component.get("inputDefinitions", {}).get("parameters", {})
        values = {k: v["defaultValue"] for k, v in defaults.items() if "defaultValue" in v} | values
        # YAML's numbers are floats.
        whole = {k for k, v in defaults.items() if v.get("parameterType") == "NUMBER_INTEGER" and k in values}
        values |= {name: int(values[name]) for name in whole}
        section = values.pop("section", "")
        number = len(self.found.tasks)
        self.found.tasks.append(
            Task(
                SEPARATOR.join(path),
                " / ".join(shown),
                stage,
                executor["container"]["image"],
                values,
                json.loads(section or "{}"),
                {name: makers for name, makers in artifacts.items() if makers},
                self.outside.get(stage, ()),
            )
        )
        return dict.fromkeys(component.get("outputDefinitions", {}).get("artifacts", {}), (number,))


def _value(source: dict[str, Any], values: Mapping[str, Any]) -> Any:
    """A parameter's value; None where only the run can tell."""
    if "componentInputParameter" in source:
        return values.get(source["componentInputParameter"])
    return source.get("runtimeValue", {}).get("constant")


def _makers(
    source: dict[str, Any], artifacts: Mapping[str, Makers], made: Mapping[str, Mapping[str, Makers]]
) -> Makers:
    if "componentInputArtifact" in source:
        return artifacts.get(source["componentInputArtifact"], ())
    output = source["taskOutputArtifact"]
    return made[output["producerTask"]].get(output["outputArtifactKey"], ())


def _items(task: dict[str, Any], values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a loop adds to the parameters of each of its copies; one empty addition where there is no loop."""
    iterator = task.get("parameterIterator")
    if iterator is None:
        return [{}]
    raw = iterator["items"].get("raw") or values.get(iterator["items"].get("inputParameter", ""), "[]")
    items = json.loads(raw) if isinstance(raw, str) else raw
    return [{iterator["itemInput"]: item} for item in items] or [{}]
