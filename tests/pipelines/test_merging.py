"""Merging loses nothing: every task of the merged pipeline resolves to what it was before."""

import copy
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf import json_format
from kfp import components, dsl, kubernetes

from pipelines.compiling import compile_pipeline, stages_of
from pipelines.expansion import expanded
from pipelines.merging import merged
from pipelines.training import training_pipeline
from vapo.recipe import load_recipe

ITERATIONS = 20


@pytest.fixture(scope="module", params=["vapo", "dapo"])
def document(request: pytest.FixtureRequest) -> dict[str, Any]:
    pipeline = training_pipeline(load_recipe(request.param, [f"iterations={ITERATIONS}"]))
    return json_format.MessageToDict(pipeline.pipeline_spec)


def test_expanding_what_was_merged_gives_every_task_back(document: dict[str, Any]) -> None:
    before = copy.deepcopy(document)
    shared, _ = merged(document, {})
    assert expanded(shared) == expanded(document)
    assert document == before


def test_its_size_hardly_grows_with_the_iterations(document: dict[str, Any]) -> None:
    shared, _ = merged(document, {})
    assert len(document["components"]) > 5 * ITERATIONS
    assert len(shared["components"]) < 20
    assert {"exec-rollout", "exec-ppo-update"} <= set(shared["deploymentSpec"]["executors"])
    assert len(shared["deploymentSpec"]["executors"]) < 12
    assert {task["componentRef"]["name"] for task in shared["root"]["dag"]["tasks"].values()} <= set(
        shared["components"]
    )


def test_merging_again_changes_nothing(document: dict[str, Any]) -> None:
    shared, _ = merged(document, {})
    assert merged(shared, {})[0] == shared


def numbered(document: dict[str, Any]) -> Counter[tuple[str, str, float]]:
    """(stage, purpose, iteration) of every task, the number by following parameters from the root to the leaf."""
    found: Counter[tuple[str, str, float]] = Counter()

    def walk(dag: dict[str, Any], given: dict[str, Any]) -> None:
        for task in dag["tasks"].values():
            component = document["components"][task["componentRef"]["name"]]
            values = {
                name: value["runtimeValue"]["constant"]
                if "runtimeValue" in value
                else given.get(value["componentInputParameter"])
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


def test_kfp_takes_what_is_compiled_for_a_cluster() -> None:
    ir = compile_pipeline(load_recipe("vapo", ["iterations=100"]), "registry.example/vapo@sha256:01", share=True)
    assert len(ir.encode()) < 125_000  # 2.9 MB unmerged; a cluster refuses 1 MiB, and resources come on top
    assert components.load_component_from_text(ir).pipeline_spec.components["comp-iteration"].dag.tasks


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
    """Path, inputs, executor and its platform configuration of every task at a leaf."""
    configured = platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]

    def walk(component: dict[str, Any], path: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
        for name, task in component["dag"]["tasks"].items():
            found = document["components"][task["componentRef"]["name"]]
            if "dag" in found:
                yield from walk(found, (*path, name))
            else:
                label = found["executorLabel"]
                executor = document["deploymentSpec"]["executors"][label]
                yield (*path, name), task["inputs"], executor, configured.get(label)

    yield from walk(document["root"], ())


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
