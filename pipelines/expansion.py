"""One component and one executor per task, named by the task's place: `comp-iteration-003--rollout-2`.

kfp's compiler names what is used several times by counting up, in an order that differs from process to process, and
while it renames the executors of a sub-pipeline it gives some of them another one's name (kfp 2.17,
pipeline_spec_builder._merge_deployment_spec): the same recipe would compile to another text each time, and every text
misses kfp.local's cache, whose key and output folders hold the component's name. Names by place are the same in every
process, whatever else the pipeline holds.
"""

import copy
from typing import Any

SEPARATOR = "--"  # between the tasks on the way from the root to a leaf
# kfp.local's threads write into one another's lines, and what runs here shares the cores anyway.
ONE_BY_ONE = {"parallelismLimit": 1}


def expanded(document: dict[str, Any]) -> dict[str, Any]:
    """A pipeline's IR in which no two tasks share a component or an executor, and loops take one item after the other;
    the given one is left as it is.

    Args:
        document: the first document of a compiled pipeline.
    """
    components: dict[str, Any] = {}
    executors: dict[str, Any] = {}
    of_executor = document["deploymentSpec"]["executors"]

    def place(component: dict[str, Any], path: str) -> dict[str, Any]:
        """A copy of a component for the task at `path`; everything below it is added."""
        placed = copy.deepcopy(component)
        if "executorLabel" in placed:
            executors[f"exec-{path}"] = copy.deepcopy(of_executor[placed["executorLabel"]])
            placed["executorLabel"] = f"exec-{path}"
        for name, task in sorted(placed.get("dag", {}).get("tasks", {}).items()):
            below = f"{path}{SEPARATOR}{name}" if path else name
            components[f"comp-{below}"] = place(document["components"][task["componentRef"]["name"]], below)
            task["componentRef"]["name"] = f"comp-{below}"
            if "parameterIterator" in task:
                task["iteratorPolicy"] = ONE_BY_ONE
        return placed

    root = place(document["root"], "")
    deployment = {**document["deploymentSpec"], "executors": executors}
    return {**document, "root": root, "components": components, "deploymentSpec": deployment}
