"""What a recipe's stages ask of a cluster, put into a compiled pipeline: pods, and parameters to ask for other ones.

Images, CPU, memory and accelerators become parameters of the pipeline (`rollout_memory`, `every_cpu`, ...) that every
DAG hands down to its tasks, as kfp's own compiler does it for `task.set_memory_limit(parameter)`. In KFP 2.17 a task's
parameters are part of its key in the cluster's cache (backend/src/v2/driver/cache.go), and placeholders are looked up
among them alone (resolvePodSpecInputRuntimeParameter): a stage that is given more memory at submission is executed
again, and what follows from it too. With `runtime.fixed` they are constants, of which the key holds the image alone.
All else (labels, tolerations, time limits, ...) is constant, and only a volume's name is part of the key.
"""

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

from kfp import kubernetes

from pipelines.images import kind_of
from vapo import partial
from vapo.recipe import Recipe, Resources
from vapo.stage import IMAGE
from vapo.store.cache import FOLDER
from vapo.store.connection import NAMES, NOT_NEEDED
from vapo.train.trainjob import LABELS, QUEUE_LABEL

CACHE = "/cache"  # where a stage's cache_volume is mounted
CHANNEL = "pipelinechannel--"  # kfp's prefix of what a task's inputs hold for its placeholders
STAGE_LABEL = "app.kubernetes.io/component"
RETRY = {"backoffDuration": "60s", "backoffFactor": 2.0, "backoffMaxDuration": "3600s"}  # between a task's attempts


def with_resources(
    document: dict[str, Any], platforms: dict[str, Any], recipe: Recipe, stages: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A pipeline's IR with what the recipe asks for; what is given is left as it is.

    Args:
        document: the first document of a compiled pipeline, whose containers name the images that they run in.
        platforms: its second document, which configures executors by platform; {} if there is none.
        stages: the stage of every executor that has a container, by its label.
    """
    document, platforms = copy.deepcopy(document), copy.deepcopy(platforms)
    here = platforms.setdefault("platforms", {}).setdefault("kubernetes", {}).setdefault("deploymentSpec", {})
    configured = here.setdefault("executors", {})
    defaults: dict[str, str] = {}  # of the pipeline's new parameters
    holds: dict[str, list[str]] = {}  # executor -> parameters that it has placeholders of
    for label, stage in stages.items():
        container = document["deploymentSpec"]["executors"][label]["container"]
        asked = recipe.resources.of(stage)
        values = _values(asked, container["image"])
        if not recipe.runtime.fixed:
            names = {key: _parameter(stage, key, recipe) for key in values}
            holds[label] = list(names.values())
            defaults |= {name: values[key] for key, name in names.items()}
            values = {key: f"{{{{$.inputs.parameters['{CHANNEL}{name}']}}}}" for key, name in names.items()}
        _ask(container, values, asked)
        configured[label] = {**configured.get(label, {}), **_platform(stage, asked, recipe)}
    for name in sorted(_hand_down(document, holds)):
        inputs = document["root"].setdefault("inputDefinitions", {}).setdefault("parameters", {})
        # Always text: of a number the driver makes an empty string, and an accelerator less (GetStringValue).
        inputs[name] = {"parameterType": "STRING", "defaultValue": defaults[name], "isOptional": True}
    _retry(document, {label: recipe.resources.of(stage).retries for label, stage in stages.items()})
    return document, platforms


def _values(asked: Resources, image: str) -> dict[str, str]:
    """What may be a parameter, by the recipe's key; nothing where nothing is said."""
    said = {"image": image, "cpu": asked.cpu, "memory": asked.memory}
    if asked.accelerators:
        said |= {"accelerator": asked.accelerator, "accelerators": str(asked.accelerators)}
    return {key: value for key, value in said.items() if value}


def _parameter(stage: str, key: str, recipe: Recipe) -> str:
    """The parameter's name: the recipe's table that says it, and its key; images that none says are their kind's."""
    if getattr(getattr(recipe.resources, stage), key):
        return f"{stage}_{key}"
    if key == "image" and not recipe.resources.every.image:
        return f"{kind_of(stage, recipe)}_image"
    return f"every_{key}"


def _ask(container: dict[str, Any], values: Mapping[str, str], asked: Resources) -> None:
    container["image"] = values["image"]
    environment = {variable["name"]: variable["value"] for variable in container.get("env", ())}
    environment[IMAGE] = values["image"]
    if asked.cache_volume:
        environment |= {FOLDER: f"{CACHE}/objects", partial.PLACE: f"{CACHE}/partial"}
    container["env"] = [{"name": name, "value": value} for name, value in environment.items()]
    limits: dict[str, Any] = {}
    for key, field in (("cpu", "Cpu"), ("memory", "Memory")):
        if key in values:
            limits |= {f"resource{field}{kind}": values[key] for kind in ("Limit", "Request")}
    if "accelerator" in values:
        limits["accelerator"] = {"resourceType": values["accelerator"], "resourceCount": values["accelerators"]}
    if limits:
        container["resources"] = limits


class _Task:
    """What kfp-kubernetes's functions want of a task: the place where they write."""

    def __init__(self) -> None:
        self.platform_config: dict[str, Any] = {}


def _platform(stage: str, asked: Resources, recipe: Recipe) -> dict[str, Any]:
    """The executor's configuration on Kubernetes, KubernetesExecutorConfig as JSON."""
    task: Any = _Task()
    labels = LABELS | {STAGE_LABEL: stage} | ({QUEUE_LABEL: asked.queue} if asked.queue else {})
    for name, value in labels.items():
        kubernetes.add_pod_label(task, name, value)
    kubernetes.set_security_context(task, run_as_non_root=True)
    kubernetes.set_image_pull_policy(task, "IfNotPresent")
    for name, value in asked.node_selector.items():
        kubernetes.add_node_selector(task, name, value)
    for toleration in asked.tolerations:
        kubernetes.add_toleration(
            task,
            key=toleration.key,
            operator=toleration.operator,
            value=toleration.value,
            effect=toleration.effect or None,
            toleration_seconds=toleration.tolerationSeconds,
        )
    if asked.shared_memory:
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=asked.shared_memory)
    if asked.cache_volume:
        kubernetes.mount_pvc(task, asked.cache_volume, CACHE)
    if asked.time_limit:
        kubernetes.set_timeout(task, asked.time_limit)
    scheme = recipe.runtime.store.partition("://")[0]
    if recipe.runtime.secret and scheme in NAMES:
        needed = {name: name for name in NAMES[scheme] if name not in NOT_NEEDED[scheme]}
        kubernetes.use_secret_as_env(task, recipe.runtime.secret, needed)
        other = {name: name for name in NOT_NEEDED[scheme]}
        kubernetes.use_secret_as_env(task, recipe.runtime.secret, other, optional=True)
    configuration: dict[str, Any] = task.platform_config["kubernetes"]
    return configuration


def _hand_down(document: dict[str, Any], holds: Mapping[str, list[str]]) -> frozenset[str]:
    """Give every DAG the parameters that the executors below it hold placeholders of; returns the root's."""
    components = document["components"]

    @cache
    def needed(name: str) -> frozenset[str]:
        component = components[name]
        if "dag" not in component:
            return frozenset(holds.get(component.get("executorLabel", ""), ()))
        found = through(component["dag"]["tasks"])
        for parameter in sorted(found):
            inputs = component.setdefault("inputDefinitions", {}).setdefault("parameters", {})
            inputs[parameter] = {"parameterType": "STRING"}
        return found

    def through(tasks: dict[str, Any]) -> frozenset[str]:
        found: frozenset[str] = frozenset()
        for task in tasks.values():
            name = task["componentRef"]["name"]
            for parameter in sorted(needed(name)):
                inputs = task.setdefault("inputs", {}).setdefault("parameters", {})
                inputs[parameter if "dag" in components[name] else CHANNEL + parameter] = {
                    "componentInputParameter": parameter
                }
            found |= needed(name)
        return found

    return through(document["root"]["dag"]["tasks"])


def _retry(document: dict[str, Any], retries: Mapping[str, int]) -> None:
    for component in (document["root"], *document["components"].values()):
        for task in component.get("dag", {}).get("tasks", {}).values():
            label = document["components"][task["componentRef"]["name"]].get("executorLabel", "")
            if retries.get(label):
                task["retryPolicy"] = {"maxRetryCount": retries[label], **RETRY}
