"""The compiled pipeline: who waits for whom, whose weights go where, and what a changed setting changes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.compiling import compile_pipeline, stages_of
from pipelines.training import as_json, evaluated_iterations
from tests.running import ROOT, environment
from vapo.recipe import Recipe, load_recipe

IMAGE = "registry.example/vapo@sha256:0123"
Task = dict[str, Any]


def recipe(*overrides: str) -> Recipe:
    return load_recipe("tiny", ["iterations=3", "evaluation.every=2", *overrides])


def parse(ir: str) -> dict[str, Any]:
    return next(iter(yaml.safe_load_all(ir)))


@pytest.fixture(scope="module")
def ir() -> str:
    return compile_pipeline(recipe(), IMAGE)


@pytest.fixture(scope="module")
def document(ir: str) -> dict[str, Any]:
    return parse(ir)


@pytest.fixture(scope="module")
def tasks(document: dict[str, Any]) -> dict[str, Task]:
    """Root tasks by display name."""
    return {task["taskInfo"]["name"]: task for task in document["root"]["dag"]["tasks"].values()}


@pytest.fixture(scope="module")
def names(document: dict[str, Any]) -> dict[str, str]:
    """Task ID -> display name."""
    return {name: task["taskInfo"]["name"] for name, task in document["root"]["dag"]["tasks"].items()}


def source(task: Task, artifact: str, names: dict[str, str]) -> tuple[str, str]:
    """(display name of the producer, its output) of an input artifact."""
    found = task["inputs"]["artifacts"][artifact]["taskOutputArtifact"]
    return names[found["producerTask"]], found["outputArtifactKey"]


def sources(task: Task, names: dict[str, str]) -> dict[str, tuple[str, str]]:
    return {name: source(task, name, names) for name in task["inputs"]["artifacts"]}


def test_display_names_tell_the_run(tasks: dict[str, Task]) -> None:
    iterations = {"iteration-001", "iteration-002", "iteration-003"}
    evaluations = {"evaluation-000", "evaluation-002", "evaluation-003"}
    single = {"problems", "base-model", "history", "value-pretraining", "report"}
    assert set(tasks) == iterations | evaluations | single


def test_value_pretraining_comes_before_the_first_iteration(tasks: dict[str, Task], names: dict[str, str]) -> None:
    assert sources(tasks["base-model"], names) == {"examples": ("problems", "examples")}
    assert sources(tasks["value-pretraining"], names) == {
        "policy": ("base-model", "policy"),
        "prompts": ("problems", "train_prompts"),
        "history": ("evaluation-000", "history"),
    }
    assert sources(tasks["iteration-001"], names) == {
        "policy": ("base-model", "policy"),
        "critic": ("value-pretraining", "critic"),
        "prompts": ("problems", "train_prompts"),
        "history": ("value-pretraining", "history"),
    }


def test_an_iteration_starts_from_the_one_before(tasks: dict[str, Task], names: dict[str, str]) -> None:
    for number, history in ((2, "iteration-001"), (3, "evaluation-002")):
        before = f"iteration-{number - 1:03d}"
        assert sources(tasks[f"iteration-{number:03d}"], names) == {
            "policy": (before, "policy"),
            "critic": (before, "critic"),
            "prompts": ("problems", "train_prompts"),
            "history": (history, "history"),
        }


def test_evaluations_measure_the_policy_of_their_iteration(tasks: dict[str, Task], names: dict[str, str]) -> None:
    expected = {
        "evaluation-000": (("base-model", "policy"), ("history", "new_history")),
        "evaluation-002": (("iteration-002", "policy"), ("iteration-002", "history")),
        "evaluation-003": (("iteration-003", "policy"), ("iteration-003", "history")),
    }
    for name, (policy, history) in expected.items():
        prompts = ("problems", "heldout_prompts")
        assert sources(tasks[name], names) == {"policy": policy, "history": history, "prompts": prompts}


def test_tasks_wait_for_exactly_their_producers(document: dict[str, Any]) -> None:
    dags = [document["root"], *(c for c in document["components"].values() if "dag" in c)]
    assert len(dags) == 1 + 3 + 3 + 1
    for component in dags:
        for name, task in component["dag"]["tasks"].items():
            artifacts = task.get("inputs", {}).get("artifacts", {}).values()
            producers = {a["taskOutputArtifact"]["producerTask"] for a in artifacts if "taskOutputArtifact" in a}
            assert set(task.get("dependentTasks", [])) == producers, name


def test_iteration_numbers_are_passed_on(tasks: dict[str, Task]) -> None:
    for name, task in tasks.items():
        if found := re.fullmatch(r"(?:iteration|evaluation)-(\d+)", name):
            number = task["inputs"]["parameters"]["iteration"]["runtimeValue"]["constant"]
            assert number == int(found[1])


def test_inside_an_iteration(document: dict[str, Any], tasks: dict[str, Task]) -> None:
    dag = document["components"][tasks["iteration-002"]["componentRef"]["name"]]["dag"]
    inner = {}
    for name, task in dag["tasks"].items():
        inner[name] = {}
        for key, value in task["inputs"]["artifacts"].items():
            produced = value.get("taskOutputArtifact")
            where = f"{produced['producerTask']}.{produced['outputArtifactKey']}" if produced else ""
            inner[name][key] = where or value["componentInputArtifact"]
    assert inner == {
        "rollout": {"prompts": "prompts", "policy": "policy"},
        "verification": {"prompts": "prompts", "rollouts": "rollout.rollouts"},
        "advantages": {"rollouts": "rollout.rollouts", "rewards": "verification.rewards", "critic": "critic"},
        "ppo-update": {
            "rollouts": "rollout.rollouts",
            "rewards": "verification.rewards",
            "experience": "advantages.experience",
            "policy": "policy",
            "critic": "critic",
        },
        "history": {
            "previous": "history",
            "rollout": "rollout.metrics",
            "verification": "verification.metrics",
            "advantages": "advantages.metrics",
            "ppo_update": "ppo-update.metrics",
        },
    }
    for task in dag["tasks"].values():
        assert task["inputs"]["parameters"]["iteration"] == {"componentInputParameter": "iteration"}
    outputs = {
        name: (found["artifactSelectors"][0]["producerSubtask"], found["artifactSelectors"][0]["outputArtifactKey"])
        for name, found in dag["outputs"]["artifacts"].items()
    }
    assert outputs["policy"] == ("ppo-update", "new_policy")
    assert outputs["critic"] == ("ppo-update", "new_critic")
    assert outputs["history"] == ("history", "new_history")


def test_report_shows_the_first_and_the_last_iteration(tasks: dict[str, Task], names: dict[str, str]) -> None:
    shown = sources(tasks["report"], names)
    for table in ("rollouts", "rewards", "experience"):
        assert shown[f"first_{table}"] == ("iteration-001", table)
        assert shown[f"last_{table}"] == ("iteration-003", table)
    assert shown["policy"] == ("iteration-003", "policy")
    assert shown["evaluation"] == ("evaluation-003", "evaluation")
    assert shown["history"] == ("evaluation-003", "history")


def test_sections_are_parameters_of_the_root(document: dict[str, Any]) -> None:
    parameters = document["root"]["inputDefinitions"]["parameters"]
    found = {name: p["defaultValue"] for name, p in parameters.items() if name.endswith("_section")}
    made = recipe()
    expected = {
        "problems_section": made.problems,
        "base_model_section": made.base_model,
        "rollout_section": made.rollout,
        "evaluation_rollout_section": made.rollout_for_evaluation(),
        "pretraining_rollout_section": made.rollout_for_value_pretraining(),
        "verification_section": made.verification,
        "value_pretraining_section": made.value_pretraining,
        "advantages_section": made.advantages,
        "ppo_update_section": made.ppo_update,
        "evaluation_section": made.evaluation,
        "report_section": made.report,
    }
    assert found == {name: as_json(section) for name, section in expected.items()}
    assert Recipe.model_validate_json(parameters["recipe_json"]["defaultValue"]) == made
    assert parameters["seed"]["defaultValue"] == made.seed
    assert "defaultValue" not in parameters["store"]  # where checkpoints go is asked for, never guessed


def test_each_stage_gets_its_own_section_only(document: dict[str, Any], tasks: dict[str, Task]) -> None:
    for name, parameter in (
        ("problems", "problems_section"),
        ("base-model", "base_model_section"),
        ("report", "report_section"),
    ):
        assert tasks[name]["inputs"]["parameters"]["section"] == {"componentInputParameter": parameter}
    rollout_section = {
        "iteration-001": "rollout_section",
        "evaluation-000": "evaluation_rollout_section",
        "value-pretraining": "pretraining_rollout_section",
    }
    for name, parameter in rollout_section.items():
        assert tasks[name]["inputs"]["parameters"]["rollout_section"] == {"componentInputParameter": parameter}
    inputs = [c.get("inputDefinitions", {}).get("parameters", {}) for c in document["components"].values()]
    assert sum("recipe" in parameters for parameters in inputs) == 1  # the whole recipe goes to the report alone


def difference(first: Any, second: Any, path: str = "") -> set[str]:
    """Where two documents differ."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = first.keys() | second.keys()
        return set().union(*(difference(first.get(k), second.get(k), f"{path}/{k}") for k in keys))
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
        return set().union(*(difference(a, b, f"{path}/{i}") for i, (a, b) in pairs))
    return set() if first == second else {path}


@pytest.mark.parametrize(
    ("setting", "parameters"),
    [
        ("ppo_update.clip_high=0.24", {"ppo_update_section"}),
        ("advantages.alpha=0.1", {"advantages_section"}),
        ("evaluation.samples=5", {"evaluation_section", "evaluation_rollout_section"}),
        ("value_pretraining.prompts=16", {"value_pretraining_section", "pretraining_rollout_section"}),
        ("seed=7", {"seed"}),
        ("runtime.threads=2", set()),
    ],
)
def test_a_setting_changes_its_parameter_alone(document: dict[str, Any], setting: str, parameters: set[str]) -> None:
    other = parse(compile_pipeline(recipe(setting), IMAGE))
    at = "/root/inputDefinitions/parameters/{}/defaultValue"
    assert difference(document, other) == {at.format(name) for name in parameters | {"recipe_json"}}


def test_compiling_twice_gives_the_same_bytes(ir: str) -> None:
    program = (
        "import sys; from vapo.recipe import load_recipe; from pipelines.compiling import compile_pipeline;"
        "sys.stdout.write(compile_pipeline(load_recipe('tiny', ['iterations=3', 'evaluation.every=2']), sys.argv[1]))"
    )
    environ = {**environment(), "PYTHONHASHSEED": "12345"}
    done = subprocess.run([sys.executable, "-c", program, IMAGE], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ir


def test_it_compiles_without_what_only_stages_need() -> None:
    blocked = ["torch", "transformers", "tokenizers", "safetensors", "numba", "plotly", "tensorboard"]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked}));"
        "from vapo.recipe import load_recipe; from pipelines.compiling import compile_pipeline;"
        "assert len(compile_pipeline(load_recipe('tiny'), 'python')) > 10_000"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr


def test_every_executor_has_the_image_and_installs_nothing(document: dict[str, Any]) -> None:
    executors = document["deploymentSpec"]["executors"]
    assert executors
    for executor in executors.values():
        assert executor["container"]["image"] == IMAGE
        assert "pip install" not in " ".join(executor["container"]["command"])


def test_every_task_may_be_cached(document: dict[str, Any]) -> None:
    dags = [document["root"], *(c for c in document["components"].values() if "dag" in c)]
    for component in dags:
        for task in component["dag"]["tasks"].values():
            assert task["cachingOptions"] == {"enableCache": True}


def test_yaml_holds_no_secret_and_no_path_of_this_machine(ir: str, tmp_path: Path) -> None:
    for path in (ROOT, Path.home(), Path(sys.prefix), tmp_path.parent):
        assert str(path) not in ir, path
    assert not re.search(r"(?i)secret|password|passwd|api_key|apikey|access_key|credential|bearer ", ir)
    assert not re.search(r"/(home|Users|root|work|private)/", ir)


def test_stages_of_counts_every_task(ir: str) -> None:
    assert stages_of(ir) == {
        "problems": 1,
        "base_model": 1,
        "rollout": 3 + 3 + 1,
        "verification": 3 + 3 + 1,
        "value_pretraining": 1,
        "advantages": 3,
        "ppo_update": 3,
        "evaluation": 3,
        "history": 1 + 3 + 3 + 1,
        "report": 1,
    }


@pytest.mark.parametrize(
    ("iterations", "every", "expected"),
    [(3, 2, [0, 2, 3]), (4, 2, [0, 2, 4]), (1, 5, [0, 1]), (2, 1, [0, 1, 2]), (5, 5, [0, 5])],
)
def test_first_and_last_policy_are_always_evaluated(iterations: int, every: int, expected: list[int]) -> None:
    made = load_recipe("tiny", [f"iterations={iterations}", f"evaluation.every={every}"])
    assert evaluated_iterations(made) == expected


def test_only_the_shape_settings_shape_the_graph(document: dict[str, Any]) -> None:
    longer = parse(compile_pipeline(recipe("iterations=4"), IMAGE))
    found = {task["taskInfo"]["name"] for task in longer["root"]["dag"]["tasks"].values()}
    assert {"iteration-004", "evaluation-004"} <= found
    assert "evaluation-003" not in found
    parameters = longer["root"]["inputDefinitions"]["parameters"]
    assert json.loads(parameters["recipe_json"]["defaultValue"])["iterations"] == 4
