"""What the recipe asks for stands in the pipeline as kfp's own compiler writes it, and reaches every task."""

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp import dsl, kubernetes
from kfp.kubernetes import kubernetes_executor_config_pb2

from pipelines.compiling import compile_pipeline
from pipelines.resources import CACHE, with_resources
from tests.running import ROOT, SECRET, environment
from vapo.recipe import Recipe, load_recipe, parse_recipe
from vapo.stage import PLACEHOLDER

TOLERATION = {"key": "gpu", "operator": "Equal", "value": "h100", "effect": "NoExecute", "tolerationSeconds": 60}
ASKED: dict[str, Any] = {
    "image": "registry.example/mine:1",
    "cpu": "500m",
    "memory": "64Gi",
    "accelerator": "nvidia.com/gpu",
    "accelerators": 4,
    "shared_memory": "16Gi",
    "node_selector": {"pool": "h100"},
    "tolerations": [TOLERATION],
    "time_limit": 3600,
    "retries": 2,
    "queue": "rl",
    "cache_volume": "models",
}


def recipe(**sections: Any) -> Recipe:
    runtime = {"store": "s3://bucket", "secret": "vapo-store"}
    data = {"problems": {"examples": 10}, "resources": {"rollout": ASKED}, "runtime": runtime}
    return parse_recipe(data | sections, "test")


# The same as kfp's own compiler


@dsl.component(base_image="registry.example/mine:1", install_kfp_package=False)
def rollout(seed: int) -> int:
    return seed


@dsl.pipeline(name="block")
def block(seed: int) -> None:
    rollout(seed=seed)


@dsl.pipeline(name="outer")
def plain(seed: int = 3) -> None:
    block(seed=seed)


@dsl.pipeline(name="block")
def block_by_kfp(
    seed: int,
    rollout_image: str,
    rollout_cpu: str,
    rollout_memory: str,
    rollout_accelerator: str,
    rollout_accelerators: str,
) -> None:
    task = rollout(seed=seed)
    task.set_container_image(rollout_image)
    task.set_cpu_limit(rollout_cpu).set_cpu_request(rollout_cpu)
    task.set_memory_limit(rollout_memory).set_memory_request(rollout_memory)
    task.set_accelerator_type(rollout_accelerator).set_accelerator_limit(rollout_accelerators)
    task.set_env_variable("VAPO_IMAGE", "{{$.inputs.parameters['pipelinechannel--rollout_image']}}")
    task.set_env_variable("VAPO_CACHE", "/cache/objects").set_env_variable("VAPO_PARTIAL", "/cache/partial")
    task.set_retry(2, "60s", 2.0, "3600s")
    kubernetes.add_pod_label(task, "kueue.x-k8s.io/queue-name", "rl")
    for name, value in (("managed-by", "vapo"), ("part-of", "vapo"), ("component", "rollout")):
        kubernetes.add_pod_label(task, f"app.kubernetes.io/{name}", value)
    kubernetes.add_node_selector(task, "pool", "h100")
    kubernetes.add_toleration(task, "gpu", "Equal", "h100", "NoExecute", 60)
    kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit="16Gi")
    kubernetes.mount_pvc(task, "models", "/cache")
    kubernetes.set_timeout(task, 3600)
    kubernetes.set_image_pull_policy(task, "IfNotPresent")
    kubernetes.set_security_context(task, run_as_non_root=True)
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    kubernetes.use_secret_as_env(task, "vapo-store", {key: key for key in keys})
    others = ("AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN", "AWS_REGION")
    kubernetes.use_secret_as_env(task, "vapo-store", {key: key for key in others}, optional=True)


@dsl.pipeline(name="outer")
def by_kfp(
    seed: int = 3,
    rollout_image: str = "registry.example/mine:1",
    rollout_cpu: str = "500m",
    rollout_memory: str = "64Gi",
    rollout_accelerator: str = "nvidia.com/gpu",
    rollout_accelerators: str = "4",
) -> None:
    block_by_kfp(
        seed=seed,
        rollout_image=rollout_image,
        rollout_cpu=rollout_cpu,
        rollout_memory=rollout_memory,
        rollout_accelerator=rollout_accelerator,
        rollout_accelerators=rollout_accelerators,
    )


def without_what_the_driver_does_not_read(document: dict[str, Any]) -> dict[str, Any]:
    """kfp's compiler repeats every placeholder as an input of the task, named by what it is for; nobody reads those."""
    found = copy.deepcopy(document)
    for task in found["components"]["comp-block"]["dag"]["tasks"].values():
        given = task["inputs"]["parameters"]
        repeated = {k for k, v in given.items() if "$.inputs" in str(v.get("runtimeValue", ""))}
        assert repeated == {
            "base_image",
            "cpu_limit",
            "cpu_request",
            "memory_limit",
            "memory_request",
            "accelerator_type",
            "accelerator_count",
        }
        task["inputs"]["parameters"] = {key: given[key] for key in given.keys() - repeated}
    return found


def test_it_is_what_kfp_compiles() -> None:
    given = json_format.MessageToDict(plain.pipeline_spec)
    before = copy.deepcopy(given)
    document, platforms = with_resources(given, {}, recipe(), {"exec-rollout": "rollout"})
    assert given == before
    assert document == without_what_the_driver_does_not_read(json_format.MessageToDict(by_kfp.pipeline_spec))
    theirs = json_format.MessageToDict(by_kfp.platform_spec)
    ours = platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-rollout"]
    message = kubernetes_executor_config_pb2.KubernetesExecutorConfig
    expected = theirs["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-rollout"]
    assert json_format.ParseDict(ours, message()) == json_format.ParseDict(expected, message())
    assert platforms.keys() == theirs.keys()


def test_constants_are_what_kfp_compiles_too() -> None:
    @dsl.pipeline(name="outer")
    def constant() -> None:
        task = rollout(seed=3).set_cpu_limit("500m").set_memory_limit("64Gi").set_cpu_request("500m")
        task.set_memory_request("64Gi").set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(4)

    settings = recipe(runtime={"fixed": True})
    document, _ = with_resources(
        json_format.MessageToDict(plain.pipeline_spec), {}, settings, {"exec-rollout": "rollout"}
    )
    ours = document["deploymentSpec"]["executors"]["exec-rollout"]["container"]
    theirs = json_format.MessageToDict(constant.pipeline_spec)["deploymentSpec"]["executors"]["exec-rollout"][
        "container"
    ]
    older = {"cpuLimit", "cpuRequest", "memoryLimit", "memoryRequest"}  # numbers, for backends before 2.5
    expected = {key: value for key, value in theirs["resources"].items() if key not in older}
    expected["accelerator"] = {key: expected["accelerator"][key] for key in ("resourceType", "resourceCount")}
    assert ours["resources"] == expected
    assert ours["image"] == "registry.example/mine:1"
    assert document["root"] == json_format.MessageToDict(plain.pipeline_spec)["root"]  # no parameter more


# A whole pipeline, resolved as the driver resolves it


def resolved(ir: str, given: dict[str, str] | None = None) -> Iterator[tuple[tuple[str, ...], str, dict[str, Any]]]:
    """Path, executor's label and container of every task, with the placeholders of its inputs filled."""
    document = next(iter(yaml.safe_load_all(ir)))
    root = document["root"]["inputDefinitions"]["parameters"]
    values = {name: spec.get("defaultValue") for name, spec in root.items()} | (given or {})
    executors = document["deploymentSpec"]["executors"]

    def value_of(spec: dict[str, Any], above: dict[str, Any]) -> Any:
        if "componentInputParameter" in spec:
            return above[spec["componentInputParameter"]]  # a KeyError: the DAG has no such parameter
        return spec.get("runtimeValue", {}).get("constant")

    def filled(thing: Any, inputs: dict[str, Any]) -> Any:
        if isinstance(thing, dict):
            return {key: filled(value, inputs) for key, value in thing.items()}
        if isinstance(thing, list):
            return [filled(value, inputs) for value in thing]
        if isinstance(thing, str) and (parameter := PLACEHOLDER.fullmatch(thing)):
            assert isinstance(inputs[parameter[1]], str)  # of a number the driver makes an empty text
            return inputs[parameter[1]]
        return thing

    def walk(component: dict[str, Any], values: dict[str, Any], path: tuple[str, ...]) -> Iterator[Any]:
        for name, task in component["dag"]["tasks"].items():
            inputs = {k: value_of(v, values) for k, v in task.get("inputs", {}).get("parameters", {}).items()}
            below = document["components"][task["componentRef"]["name"]]
            if loop := task.get("parameterIterator"):
                inputs[loop["itemInput"]] = json.loads(loop["items"]["raw"])[0]
            if "dag" in below:
                assert set(inputs) <= set(below.get("inputDefinitions", {}).get("parameters", {}))
                yield from walk(below, inputs, (*path, name))
            elif "container" in (executor := executors[below["executorLabel"]]):
                yield (*path, name), below["executorLabel"], filled(executor["container"], inputs)

    yield from walk(document["root"], values, ())


def stage_of(container: dict[str, Any]) -> str:
    arguments = container["args"]
    return str(arguments[arguments.index("--function_to_execute") + 1])


@pytest.mark.parametrize("name", ["qwen2.5_32b_aime", "dapo", "grpo"])
@pytest.mark.parametrize("fixed", [False, True])
def test_every_task_gets_what_its_stage_asks_for(name: str, fixed: bool) -> None:
    found = load_recipe(name, ["iterations=3", f"runtime.fixed={str(fixed).lower()}", "resources.report.cpu=2"])
    seen = set()
    for path, _, container in resolved(compile_pipeline(found, share=True)):
        stage = stage_of(container)
        seen.add(stage)
        asked = found.resources.of(stage)
        have = container.get("resources", {})
        assert have.get("resourceCpuLimit", "") == have.get("resourceCpuRequest", "") == asked.cpu, path
        assert have.get("resourceMemoryLimit", "") == have.get("resourceMemoryRequest", "") == asked.memory, path
        device = {"resourceType": asked.accelerator, "resourceCount": str(asked.accelerators)}
        assert have.get("accelerator", {}) == (device if asked.accelerators else {}), path
        environment = {variable["name"]: variable["value"] for variable in container["env"]}
        assert environment["VAPO_IMAGE"] == container["image"]
        assert (environment.get("VAPO_PARTIAL") == f"{CACHE}/partial") == bool(asked.cache_volume)
    assert seen == {"problems", "base_model", "rollout", "verification", "advantages", "ppo_update", "evaluation",
                    "history", "report", *(["value_pretraining"] if found.has_critic else []),
                    *(["concatenation"] if found.rollout.shards > 1 else [])}  # fmt: skip


def test_launchers_of_training_jobs_ask_for_no_accelerator() -> None:
    found = load_recipe("qwen2.5_32b_aime", ["iterations=2"])
    devices = {
        stage_of(c): c["resources"].get("accelerator") for _, _, c in resolved(compile_pipeline(found, share=True))
    }
    assert {stage for stage, device in devices.items() if device} == {"rollout", "advantages"}
    assert found.train.resources["nvidia.com/gpu"] == found.train.ranks
    assert json.loads(found.for_stage("ppo_update").model_dump_json())["train"]["secret"] == "vapo-store"


def test_what_is_given_at_submission_reaches_its_stage_and_no_other() -> None:
    found = load_recipe("qwen2.5_32b_aime", ["iterations=2", "runtime.fixed=false", "resources.report.image=own:1"])
    ir = compile_pipeline(found, share=True)
    given = {"rollout_memory": "640Gi", "train_image": "new:2", "every_cpu": "12", "report_image": "own:2"}
    before = {path: container for path, _, container in resolved(ir)}
    changed = {}
    for path, _, container in resolved(ir, given):
        if container != before[path]:
            changed[stage_of(container)] = container
    assert set(changed) == {stage_of(container) for container in before.values()} - {"verification"}
    assert changed["rollout"]["resources"]["resourceMemoryLimit"] == "640Gi"
    assert changed["advantages"]["image"] == "new:2"
    assert changed["ppo_update"]["resources"]["resourceCpuRequest"] == "12"
    assert changed["report"]["image"] == "own:2"


def test_merging_keeps_stages_apart_whose_pods_differ_outside_their_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    found = load_recipe(
        "qwen2.5_32b_aime", ["iterations=3", "resources.rollout.queue=rl", "resources.rollout.time_limit=60"]
    )
    ir = compile_pipeline(found, share=True)
    assert SECRET not in ir
    document, platforms = yaml.safe_load_all(ir)
    configured = platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert configured.keys() == document["deploymentSpec"]["executors"].keys()
    for _, label, container in resolved(ir):
        stage = stage_of(container)
        labels = configured[label]["podMetadata"]["labels"]
        assert labels["app.kubernetes.io/component"] == stage
        assert ("kueue.x-k8s.io/queue-name" in labels) == (stage == "rollout")
        assert configured[label].get("activeDeadlineSeconds") == ("60" if stage == "rollout" else None)
        assert {secret["secretName"] for secret in configured[label]["secretAsEnv"]} == {"vapo-store"}


def test_every_task_is_tried_again_as_often_as_its_stage_says() -> None:
    found = load_recipe("vapo", ["iterations=2", "resources.rollout.retries=3"])
    document = next(iter(yaml.safe_load_all(compile_pipeline(found, share=True))))
    tasks = [task for part in document["components"].values() for task in part.get("dag", {}).get("tasks", {}).items()]
    tried = {name: task.get("retryPolicy", {}).get("maxRetryCount") for name, task in tasks}
    assert {name: count for name, count in tried.items() if count is not None} == {
        name: 3 for name in tried if name.startswith("rollout")
    }


# Run


def test_a_pipeline_for_a_cluster_runs_here_and_records_the_image_that_was_given(tmp_path: Path) -> None:
    program = """
import sys, warnings
from pathlib import Path
from kfp import components, dsl, local
from components.problems.component import problems
from pipelines.compiling import compile_pipeline
from pipelines.training import as_json
from vapo.recipe import load_recipe

recipe = load_recipe("tiny", ["resources.every.cpu=1", "resources.every.memory=2Gi", "problems.examples=64"])

@dsl.pipeline(name="only-problems")
def pipeline():
    problems(section=as_json(recipe.problems), seed=1)

ir = compile_pipeline(recipe, pipeline_of=lambda _: pipeline, share=True)
warnings.simplefilter("ignore")
local.init(local.SubprocessRunner(use_venv=False), pipeline_root=sys.argv[1], raise_on_error=True)
components.load_component_from_text(ir)(cpu_image="python-mine:7")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (record,) = tmp_path.rglob("record.json")
    assert json.loads(record.read_text())["image"] == "python-mine:7"
