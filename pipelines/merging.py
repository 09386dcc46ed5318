"""One component for all tasks that do the same, and one executor for all components that run the same.

kfp's compiler copies a sub-pipeline's components into every place that uses it: 14 KB for each iteration, and a cluster
refuses a workflow above 1 MiB. What is equal in content (a component with its executor, that executor's platform
configuration, and all that lies below it) is merged into one here; names come from the tasks that use it.
"""

import copy
import json
import re
from typing import Any

COUNTED = re.compile(r"(-\d+)+$")  # what kfp appends to a name that is taken: rollout-2


class _Shared:
    """Things by content, each under one name: the first that was asked for, with a count if another has it."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.by_name: dict[str, Any] = {}
        self._names: dict[str, str] = {}

    def name_of(self, wanted: str, thing: Any) -> str:
        key = json.dumps(thing, sort_keys=True)
        if key not in self._names:
            name, count = f"{self.prefix}{wanted}", 1
            while name in self.by_name:
                count += 1
                name = f"{self.prefix}{wanted}-{count}"
            self._names[key], self.by_name[name] = name, thing
        return self._names[key]


def merged(document: dict[str, Any], platforms: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A pipeline's IR in which equal components and executors are one; what is given is left as it is.

    Args:
        document: the first document of a compiled pipeline.
        platforms: its second document, which configures executors by platform; {} if there is none.
    """
    components, executors = _Shared("comp-"), _Shared("exec-")
    of_executor = document["deploymentSpec"]["executors"]
    configurations = {
        platform: found["deploymentSpec"]["executors"] for platform, found in platforms.get("platforms", {}).items()
    }

    def share(component: dict[str, Any], task: str) -> dict[str, Any]:
        """A copy of a component that refers to shared ones only."""
        shared = copy.deepcopy(component)
        if label := shared.get("executorLabel"):
            configured = {name: found[label] for name, found in configurations.items() if label in found}
            shared["executorLabel"] = executors.name_of(task, {"spec": of_executor[label], "platforms": configured})
        for name, below in sorted(shared.get("dag", {}).get("tasks", {}).items()):
            wanted = COUNTED.sub("", name)
            found = share(document["components"][below["componentRef"]["name"]], wanted)
            below["componentRef"]["name"] = components.name_of(wanted, found)
        return shared

    root = share(document["root"], "root")
    deployment = {
        **document["deploymentSpec"],
        "executors": {name: found["spec"] for name, found in executors.by_name.items()},
    }
    configured = copy.deepcopy(platforms)
    for platform, found in configured.get("platforms", {}).items():
        found["deploymentSpec"]["executors"] = {
            name: executor["platforms"][platform]
            for name, executor in executors.by_name.items()
            if platform in executor["platforms"]
        }
    return {**document, "root": root, "components": components.by_name, "deploymentSpec": deployment}, configured
