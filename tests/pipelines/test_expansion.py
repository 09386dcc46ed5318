"""Every task's component and executor by its place, whatever they were called and shared before."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from pipelines.expansion import expanded


def task(component: str) -> dict[str, Any]:
    return {"componentRef": {"name": component}, "taskInfo": {"name": component}}


def document(first: str, second: str) -> dict[str, Any]:
    """Two iterations of one sub-pipeline, which runs one component twice; its names are the caller's."""
    leaf = {"executorLabel": first, "inputDefinitions": {"parameters": {"seed": {}}}}
    return {
        "pipelineInfo": {"name": "training"},
        "root": {"dag": {"tasks": {"iteration": task("block"), "iteration-2": task("block"), "last": task(second)}}},
        "components": {
            "block": {"dag": {"tasks": {"rollout": task(first), "rollout-2": task(first)}}},
            first: leaf,
            second: {"executorLabel": second},
        },
        "deploymentSpec": {
            "executors": {
                first: {"container": {"args": ["rollout"]}},
                second: {"container": {"args": ["report"]}},
                "of-no-task": {"container": {"args": ["rollout"]}},
            }
        },
    }


PLACES = {f"{i}--{r}" for i in ("iteration", "iteration-2") for r in ("rollout", "rollout-2")}


def test_components_and_executors_are_named_by_their_place() -> None:
    found = expanded(document("comp-x", "comp-y"))
    executors = found["deploymentSpec"]["executors"]
    assert set(executors) == {f"exec-{place}" for place in (*PLACES, "last")}
    assert set(found["components"]) == {f"comp-{place}" for place in (*PLACES, "last", "iteration", "iteration-2")}
    for place in PLACES:
        assert found["components"][f"comp-{place}"]["executorLabel"] == f"exec-{place}"
        assert executors[f"exec-{place}"]["container"]["args"] == ["rollout"]
        iteration, rollout = place.split("--")
        block = found["components"][f"comp-{iteration}"]
        assert block["dag"]["tasks"][rollout]["componentRef"]["name"] == f"comp-{place}"
        assert block["dag"]["tasks"][rollout]["taskInfo"] == {"name": "comp-x"}
    assert executors["exec-last"]["container"]["args"] == ["report"]
    assert found["pipelineInfo"] == {"name": "training"}


@pytest.mark.parametrize("names", [("comp-rollout-3", "comp-rollout"), ("a", "b"), ("b", "a")])
def test_former_names_do_not_matter(names: tuple[str, str]) -> None:
    def bare(found: dict[str, Any]) -> dict[str, Any]:
        """Without taskInfo, in which the fixture writes the names."""
        for component in (found["root"], *found["components"].values()):
            for each in component.get("dag", {}).get("tasks", {}).values():
                del each["taskInfo"]
        return found

    assert bare(expanded(document(*names))) == bare(expanded(document("comp-x", "comp-y")))


def test_nothing_is_shared_and_the_given_one_stays() -> None:
    given = document("comp-x", "comp-y")
    before = copy.deepcopy(given)
    found = expanded(given)
    for executor in found["deploymentSpec"]["executors"].values():
        executor["container"]["image"] = executor["container"].get("image", "") + "i"
    assert {e["container"]["image"] for e in found["deploymentSpec"]["executors"].values()} == {"i"}
    found["components"]["comp-last"]["executorLabel"] = "changed"
    assert given == before
