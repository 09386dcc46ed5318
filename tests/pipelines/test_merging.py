"""Merging loses nothing: every task of the merged pipeline resolves to what it was before."""

import copy
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp import components, dsl, kubernetes

from pipelines.compiling import compile_pipeline, stages_of
from pipelines.expansion import expanded
from pipelines.local import local_image
from pipelines.merging import merged
from pipelines.stopping import conditional
from pipelines.training import training_pipeline
from tests.compiled import execute
from tests.pipelines.conftest import Undisturbed
from tests.running import products, records
from vapo.recipe import load_recipe

ITERATIONS = 20


def parse(ir: str) -> dict[str, Any]:
    return next(iter(yaml.safe_load_all(ir)))


@pytest.fixture(
    scope="module", params=[("vapo",), ("dapo",), ("vapo", "target_accuracy=0.5")], ids=["vapo", "dapo", "early stop"]
)
def document(request: pytest.FixtureRequest) -> dict[str, Any]:
    name, *settings = request.param
    pipeline = training_pipeline(load_recipe(name, [f"iterations={ITERATIONS}", "iterations_per_block=4", *settings]))
    return conditional(json_format.MessageToDict(pipeline.pipeline_spec), local=False)


def test_expanding_what_was_merged_gives_every_task_back(document: dict[str, Any]) -> None:
    before = copy.deepcopy(document)
    shared, _ = merged(document, {})
    assert expanded(shared) == expanded(document)
    assert document == before


def test_its_size_hardly_grows_with_the_iterations(document: dict[str, Any]) -> None:
    shared, _ = merged(document, {})
    assert len(document["components"]) > 5 * ITERATIONS
    assert len(shared["components"]) < 22
    assert {"exec-rollout", "exec-ppo-update"} <= set(shared["deploymentSpec"]["executors"])
    assert len(shared["deploymentSpec"]["executors"]) < 12
    assert {task["componentRef"]["name"] for task in shared["root"]["dag"]["tasks"].values()} <= set(
        shared["components"]
    )


def test_merging_again_changes_nothing(document: dict[str, Any]) -> None:
    shared, _ = merged(document, {})
    assert merged(shared, {})[0] == shared


def test_every_task_keeps_executor_inputs_condition_and_platform(document: dict[str, Any]) -> None:
    """Whatever makes two tasks differ: here every third rollout has a secret of its own."""
    found = {}
    for number, (label, executor) in enumerate(sorted(document["deploymentSpec"]["executors"].items())):
        stage = executor["container"]["args"][-1]
        secret = "other" if stage == "rollout" and number % 3 == 0 else "store"
        if stage in ("rollout", "ppo_update"):
            found[label] = {"secretAsEnv": [{"secretName": secret}]}
    platforms = {"platforms": {"kubernetes": {"deploymentSpec": {"executors": found}}}}
    before = sorted(tasks_of(document, platforms), key=str)
    shared, configured = merged(document, platforms)
    assert sorted(tasks_of(shared, configured), key=str) == before
    assert len(before) == sum(stages_of(json.dumps(document)).values())
    assert {str(platform) for *_, platform in before if platform} == {
        str({"secretAsEnv": [{"secretName": name}]}) for name in ("other", "store")
    }
    stops = "target_accuracy" in document["root"]["inputDefinitions"]["parameters"]
    assert any(given["triggerPolicy"] for _, inputs, *_ in before for given in inputs) == stops


def numbered(document: dict[str, Any]) -> Counter[tuple[str, str, float]]:
    """(stage, purpose, iteration) of every task, the number by following parameters from the root to the leaf."""
    found: Counter[tuple[str, str, float]] = Counter()

    def walk(dag: dict[str, Any], given: dict[str, Any]) -> None:
        for task in dag["tasks"].values():
            component = document["components"][task["componentRef"]["name"]]
            values = {
                name: value["runtimeValue"]["constant"]
                if "runtimeValue" in value
                else given.get(value.get("componentInputParameter", ""))
                for name, value in task["inputs"].get("parameters", {}).items()
            }
            if "dag" in component:
                walk(component["dag"], values)
                continue
            stage = document["deploymentSpec"]["executors"][component["executorLabel"]]["container"]["args"][-1]
            number = values.get("block_start", 0) + values.get("offset", 0)
            found[stage, values.get("purpose", ""), number] += 1

    walk(document["root"]["dag"], {})
    return found


def test_every_iteration_is_there_once(document: dict[str, Any]) -> None:
    shared, _ = merged(document, {})
    found = numbered(shared)
    numbers = range(1, ITERATIONS + 1)
    assert [found["ppo_update", "", n] for n in range(ITERATIONS + 2)] == [0, *(1 for _ in numbers), 0]
    assert [found["advantages", "", n] for n in numbers] == [1] * ITERATIONS
    assert {n for stage, purpose, n in found if (stage, purpose) == ("rollout", "training")} == set(numbers)
    assert {n for stage, _, n in found if stage == "evaluation"} == {0, 4, 8, 12, 16, 20}
    assert found == numbered(expanded(document))
    assert found.total() == sum(stages_of(json.dumps(document)).values())


def test_kfp_takes_what_is_compiled_for_a_cluster_and_it_is_small() -> None:
    """A hundred iterations in one run; unmerged they are 3 MB, and a cluster refuses 1 MiB."""
    ir = compile_pipeline(load_recipe("vapo", ["iterations=100"]), "registry.example/vapo@sha256:01", share=True)
    assert len(ir.encode()) < 125_000
    assert components.load_component_from_text(ir).pipeline_spec.components["comp-iteration"].dag.tasks


@pytest.mark.slow
def test_what_a_cluster_gets_makes_what_a_run_here_makes(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """One iteration: the merged document itself, in which both evaluations are one component, and that of `vapo run`.

    kfp.local names the folders of outputs by component, so one rollout would write over what another has left, which
    the report refuses. Here every execution gets a folder of its own, as on a cluster.
    """
    recipe = load_recipe("tiny", ["runtime.threads=1"])
    ir = compile_pipeline(recipe, local_image(), share=True)
    assert len(parse(ir)["components"]) < 0.6 * len(parse(compile_pipeline(recipe, local_image()))["components"])
    outputs = execute(ir, tmp_path, apart=True, cache=False)
    assert Path(outputs["page"].path).stat().st_size > 100_000
    assert products(tmp_path) == products(undisturbed.pristine)
    assert len(records(tmp_path)) == len(records(undisturbed.pristine)) == sum(stages_of(ir).values())


@dsl.component(base_image="python", install_kfp_package=False)
def work(step: int) -> int:
    return step


@dsl.pipeline(name="block")
def block(step: int) -> None:
    work(step=step).set_memory_limit("1G")
    kubernetes.use_secret_as_env(work(step=step), "store", {"key": "KEY"})


@dsl.pipeline(name="outer")
def outer() -> None:
    block(step=1)
    block(step=2)
    kubernetes.use_secret_as_env(work(step=3), "other", {"key": "KEY"})
    work(step=4)


def tasks_of(document: dict[str, Any], platforms: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Path, conditions on the way, inputs, executor and its platform configuration of every task at a leaf."""
    configured = platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]

    def walk(component: dict[str, Any], path: tuple[str, ...], given: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        for name, task in component["dag"]["tasks"].items():
            found = document["components"][task["componentRef"]["name"]]
            inputs = (*given, {key: task.get(key) for key in ("inputs", "triggerPolicy", "dependentTasks")})
            if "dag" in found:
                yield from walk(found, (*path, name), inputs)
            else:
                label = found["executorLabel"]
                executor = document["deploymentSpec"]["executors"][label]
                yield (*path, name), inputs, executor, configured.get(label)

    yield from walk(document["root"], (), ())


def test_executors_that_differ_in_resources_or_platform_stay_apart() -> None:
    document = json_format.MessageToDict(outer.pipeline_spec)
    platforms = json_format.MessageToDict(outer.platform_spec)
    before = sorted(tasks_of(document, platforms), key=str)
    shared, configured = merged(document, platforms)
    assert sorted(tasks_of(shared, configured), key=str) == before
    assert len(before) == 6
    executors = shared["deploymentSpec"]["executors"]
    assert len(executors) == 4  # in the block: one with a limit, one with a secret; outside: another secret, neither
    assert set(shared["components"]) == {"comp-block", "comp-work", "comp-work-2", "comp-work-3", "comp-work-4"}
    secrets = [
        c["secretAsEnv"][0]["secretName"]
        for c in configured["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()
    ]
    assert sorted(secrets) == ["other", "store"]
