"""Early stop: conditions on the root's tasks, so that what follows a block that has reached the target is skipped.

A task that gets an accuracy as `runs_below` runs only if it is below the target, one that gets it as `runs_from` only
otherwise. The condition is what kfp's compiler makes of `dsl.If`, and stands on the task itself: a block, or what ends
the run. With `dsl.If` around a block nothing outside could have the block's outputs but through `dsl.OneOf`, which
does not carry artifacts: kfp.local refuses several selectors (2.17, orchestrator_utils.get_dag_output_artifacts), and
the backend takes the last of them whether or not it ran (backend/src/v2/driver/resolve.go, GetProducerTask).

Here no task chooses. A task that needs a skipped one is skipped as well: the backend makes it wait for
`TASK.Succeeded` (argocompiler/dag.go, `depends`), and kfp.local finds no accuracy of a task that did not run. So every
block that may be the last has an ending of its own, and one of them runs.
"""

import copy
from typing import Any

RUNS = {"runs_below": "<", "runs_from": ">="}  # input of a conditional task -> how it compares with the target
FOR_A_CONDITION = dict.fromkeys((*RUNS, "target_accuracy"), (float, 0.0))
ENDING = "ending"  # the name of the sub-pipelines of which one runs


def conditional(document: dict[str, Any], *, local: bool) -> dict[str, Any]:
    """A pipeline's IR with its conditions; the given one is left as it is.

    Args:
        document: the first document of a compiled pipeline.
        local: for kfp.local. In a condition it looks values up by `task--output` where the backend looks at the task's
            own inputs, and of several outputs it chooses where they are called parameters.
    """
    document = {**document, "root": copy.deepcopy(document["root"])}
    dag = document["root"]["dag"]
    for task in dag["tasks"].values():
        parameters = task["inputs"].get("parameters", {})
        for name in RUNS.keys() & parameters.keys():
            found = parameters[name]["taskOutputParameter"]
            accuracy = f"{found['producerTask']}--{found['outputParameterKey']}" if local else name
            value = "inputs.parameter_values['{}']".format
            task["triggerPolicy"] = {"condition": f"{value(accuracy)} {RUNS[name]} {value('target_accuracy')}"}
    outputs = dag.get("outputs", {}).get("artifacts", {})
    for name in list(outputs):
        if not outputs[name]["artifactSelectors"][0]["producerSubtask"].startswith(ENDING):
            continue
        endings = [task for task in sorted(dag["tasks"]) if task.startswith(ENDING) and name in _made(document, task)]
        if local:
            del outputs[name]
            chosen = [{"producerSubtask": task, "outputParameterKey": name} for task in endings]
            parameters = dag["outputs"].setdefault("parameters", {})
            parameters[name] = {"valueFromOneof": {"parameterSelectors": chosen}}
        else:
            chosen = [{"producerSubtask": task, "outputArtifactKey": name} for task in endings]
            outputs[name] = {"artifactSelectors": chosen}
    return document


def _made(document: dict[str, Any], task: str) -> dict[str, Any]:
    """The artifacts that a task of the root makes."""
    component = document["components"][document["root"]["dag"]["tasks"][task]["componentRef"]["name"]]
    made: dict[str, Any] = component["outputDefinitions"]["artifacts"]
    return made
