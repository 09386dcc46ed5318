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

from pipelines.block import Block, blocks_of, evaluated_iterations
from pipelines.compiling import compile_pipeline, stages_of
from pipelines.expansion import SEPARATOR
from pipelines.training import as_json
from tests.running import ROOT, environment
from vapo.recipe import Recipe, load_recipe

IMAGE = "registry.example/vapo@sha256:0123"
WITHOUT_CRITIC = ("advantages.estimator=group_normalised", "value_pretraining.max_steps=0")
DRAWING = ("rollout.draws=3", "advantages.keep_groups=4")
Task = dict[str, Any]


def recipe(*overrides: str) -> Recipe:
    """Three iterations in two blocks, after the second and third of which there is an evaluation."""
    return load_recipe("tiny", ["iterations=3", "iterations_per_block=2", "evaluation.every=2", *overrides])


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
    return tasks_of(document)


@pytest.fixture(scope="module")
def names(document: dict[str, Any]) -> dict[str, str]:
    return names_of(document)


@pytest.fixture(scope="module")
def ir_without_critic() -> str:
    return compile_pipeline(recipe(*WITHOUT_CRITIC), IMAGE)


@pytest.fixture(scope="module")
def without_critic(ir_without_critic: str) -> dict[str, Any]:
    """The pipeline of the same recipe whose advantages come from groups."""
    return parse(ir_without_critic)


def tasks_of(document: dict[str, Any], *path: str) -> dict[str, Task]:
    """Tasks by display name: the root's, or those of the sub-pipeline to which the display names lead."""
    return {task["taskInfo"]["name"]: task for task in dag_of(document, *path)["tasks"].values()}


def names_of(document: dict[str, Any], *path: str) -> dict[str, str]:
    """Task ID -> display name, likewise."""
    return {name: task["taskInfo"]["name"] for name, task in dag_of(document, *path)["tasks"].items()}


def dag_of(document: dict[str, Any], *path: str) -> dict[str, Any]:
    """The root, or the sub-pipeline to which the display names lead."""
    dag: dict[str, Any] = document["root"]["dag"]
    for name in path:
        task = next(task for task in dag["tasks"].values() if task["taskInfo"]["name"] == name)
        dag = document["components"][task["componentRef"]["name"]]["dag"]
    return dag


def inside(dag: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Task -> its input artifacts -> where they come from: "task.output", or an input of the sub-pipeline."""
    inner: dict[str, dict[str, str]] = {}
    for name, task in dag["tasks"].items():
        inner[name] = {}
        for key, value in task["inputs"]["artifacts"].items():
            produced = value.get("taskOutputArtifact")
            where = f"{produced['producerTask']}.{produced['outputArtifactKey']}" if produced else ""
            inner[name][key] = where or value["componentInputArtifact"]
    return inner


def handed_on(dag: dict[str, Any]) -> dict[str, str]:
    """Output artifact -> "task.output" that it is."""
    return {
        name: "{producerSubtask}.{outputArtifactKey}".format(**found["artifactSelectors"][0])
        for name, found in dag["outputs"]["artifacts"].items()
    }


def source(task: Task, artifact: str, names: dict[str, str]) -> tuple[str, str]:
    """(display name of the producer, its output) of an input artifact; ("", name) of what the sub-pipeline is given."""
    found = task["inputs"]["artifacts"][artifact]
    if "componentInputArtifact" in found:
        return "", found["componentInputArtifact"]
    return names[found["taskOutputArtifact"]["producerTask"]], found["taskOutputArtifact"]["outputArtifactKey"]


def sources(task: Task, names: dict[str, str]) -> dict[str, tuple[str, str]]:
    return {name: source(task, name, names) for name in task["inputs"]["artifacts"]}


BLOCKS = ("iterations-001-002", "iteration-003")
SECOND = ("iterations-001-002", "iteration-002")


def test_display_names_tell_the_run(document: dict[str, Any], tasks: dict[str, Task]) -> None:
    single = {"problems", "base-model", "history", "evaluation-000", "value-pretraining", "report"}
    assert set(tasks) == single | set(BLOCKS)
    assert set(tasks_of(document, BLOCKS[0])) == {"iteration-001", "iteration-002", "evaluation-002"}
    assert set(tasks_of(document, BLOCKS[1])) == {"iteration-003", "evaluation-003"}


def test_blocks_that_are_alike_have_names_that_fit_all() -> None:
    """They are one component in the merged pipeline; the last, which is shorter, can have its own numbers."""
    document = parse(compile_pipeline(recipe("iterations=23", "iterations_per_block=10", "evaluation.every=5"), IMAGE))
    tens = ("iterations-001-010", "iterations-011-020")
    assert {"iterations-021-023", *tens} <= set(tasks_of(document))
    for name in tens:
        iterations = {f"iteration-{number:02d}-of-10" for number in range(1, 11)}
        assert set(tasks_of(document, name)) == iterations | {"evaluation-05-of-10", "evaluation-10-of-10"}
    last = {"iteration-021", "iteration-022", "iteration-023", "evaluation-023"}
    assert set(tasks_of(document, "iterations-021-023")) == last


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["iterations=4"], [Block(1, 4, (1, 3))]),
        (["iterations=3", "iterations_per_block=1"], [Block(1, 1, ()), Block(2, 1, (0,)), Block(3, 1, (0,))]),
        (["iterations=5", "iterations_per_block=4"], [Block(1, 4, (1, 3)), Block(5, 1, (0,))]),
        (["iterations=6", "iterations_per_block=3", "evaluation.every=9"], [Block(1, 3, ()), Block(4, 3, (2,))]),
    ],
)
def test_blocks_hold_the_evaluations_that_fall_into_them(settings: list[str], expected: list[Block]) -> None:
    assert blocks_of(load_recipe("tiny", ["evaluation.every=2", *settings])) == expected


@pytest.mark.parametrize(("before", "after"), [(4, 6), (12, 16)])
def test_a_longer_run_is_served_what_a_shorter_one_has_done(before: int, after: int) -> None:
    """kfp.local's cache knows a task by the name of its component; the last evaluation alone has no equal."""

    def places(iterations: int) -> dict[str, Any]:
        made = load_recipe("tiny", [f"iterations={iterations}", "evaluation.every=4"])
        document = parse(compile_pipeline(made, IMAGE))
        return {
            name: (component, document["deploymentSpec"]["executors"][component["executorLabel"]])
            for name, component in document["components"].items()
            if "executorLabel" in component
        }

    shorter, longer = places(before), places(after)
    assert len(shorter) > 5 * before
    assert {name: longer.get(name) for name in shorter} == shorter


def test_value_pretraining_comes_before_the_first_iteration(tasks: dict[str, Task], names: dict[str, str]) -> None:
    assert sources(tasks["base-model"], names) == {"examples": ("problems", "examples")}
    assert sources(tasks["value-pretraining"], names) == {
        "policy": ("base-model", "policy"),
        "prompts": ("problems", "train_prompts"),
        "history": ("evaluation-000", "history"),
    }
    assert sources(tasks[BLOCKS[0]], names) == {
        "policy": ("base-model", "policy"),
        "reference": ("base-model", "policy"),
        "critic": ("value-pretraining", "critic"),
        "prompts": ("problems", "train_prompts"),
        "heldout_prompts": ("problems", "heldout_prompts"),
        "history": ("value-pretraining", "history"),
    }


def test_a_block_starts_from_the_one_before(tasks: dict[str, Task], names: dict[str, str]) -> None:
    """The KL term's reference stays the base model's policy."""
    assert sources(tasks[BLOCKS[1]], names) == {
        "policy": (BLOCKS[0], "policy"),
        "reference": ("base-model", "policy"),
        "critic": (BLOCKS[0], "critic"),
        "prompts": ("problems", "train_prompts"),
        "heldout_prompts": ("problems", "heldout_prompts"),
        "history": (BLOCKS[0], "history"),
    }


def test_an_iteration_starts_from_the_one_before(document: dict[str, Any]) -> None:
    given = {name: ("", name) for name in ("policy", "reference", "critic", "prompts", "history")}
    tasks, names = tasks_of(document, BLOCKS[0]), names_of(document, BLOCKS[0])
    assert sources(tasks["iteration-001"], names) == given
    state = {name: ("iteration-001", name) for name in ("policy", "critic", "history")}
    assert sources(tasks["iteration-002"], names) == given | state
    assert sources(tasks_of(document, BLOCKS[1])["iteration-003"], {}) == given


def test_a_block_hands_on_what_its_last_iteration_left(document: dict[str, Any]) -> None:
    """And its last evaluation; its first iteration's tables are for the report."""
    names = names_of(document, BLOCKS[0])
    found = {key: where.split(".") for key, where in handed_on(dag_of(document, BLOCKS[0])).items()}
    assert {key: (names[task], output) for key, (task, output) in found.items()} == {
        "policy": ("iteration-002", "policy"),
        "critic": ("iteration-002", "critic"),
        "history": ("evaluation-002", "history"),
        **{f"first_{table}": ("iteration-001", table) for table in ("rollouts", "rewards", "experience")},
        **{f"last_{table}": ("iteration-002", table) for table in ("rollouts", "rewards", "experience")},
        "evaluation": ("evaluation-002", "evaluation"),
        "evaluation_rollouts": ("evaluation-002", "rollouts"),
        "evaluation_rewards": ("evaluation-002", "rewards"),
    }


def test_an_iteration_after_an_evaluation_takes_its_history() -> None:
    document = parse(compile_pipeline(recipe("iterations_per_block=3"), IMAGE))
    block = "iterations-001-003"
    tasks, names = tasks_of(document, block), names_of(document, block)
    assert sources(tasks["iteration-003"], names)["history"] == ("evaluation-002", "history")
    assert sources(tasks["iteration-003"], names)["policy"] == ("iteration-002", "policy")


def test_evaluations_measure_the_policy_of_their_iteration(
    document: dict[str, Any], tasks: dict[str, Task], names: dict[str, str]
) -> None:
    assert sources(tasks["evaluation-000"], names) == {
        "policy": ("base-model", "policy"),
        "history": ("history", "new_history"),
        "prompts": ("problems", "heldout_prompts"),
    }
    for block, number in zip(BLOCKS, (2, 3), strict=True):
        found = sources(tasks_of(document, block)[f"evaluation-{number:03d}"], names_of(document, block))
        before = f"iteration-{number:03d}"
        assert found == {
            "policy": (before, "policy"),
            "history": (before, "history"),
            "prompts": ("", "heldout_prompts"),
        }


def test_tasks_wait_for_exactly_their_producers(document: dict[str, Any]) -> None:
    dags = [document["root"], *(c for c in document["components"].values() if "dag" in c)]
    assert len(dags) == 1 + 2 + 3 + 3 + 1
    for component in dags:
        for name, task in component["dag"]["tasks"].items():
            artifacts = task.get("inputs", {}).get("artifacts", {}).values()
            producers = {a["taskOutputArtifact"]["producerTask"] for a in artifacts if "taskOutputArtifact" in a}
            assert set(task.get("dependentTasks", [])) == producers, name


def test_iteration_numbers_are_a_sum_of_what_is_passed_on(document: dict[str, Any], tasks: dict[str, Task]) -> None:
    def constant(task: Task, name: str) -> float:
        return task["inputs"]["parameters"][name]["runtimeValue"]["constant"]

    assert (constant(tasks["evaluation-000"], "block_start"), constant(tasks["evaluation-000"], "offset")) == (0, 0)
    for block in BLOCKS:
        for name, task in tasks_of(document, block).items():
            assert task["inputs"]["parameters"]["block_start"] == {"componentInputParameter": "block_start"}
            assert constant(tasks[block], "block_start") + constant(task, "offset") == int(name[-3:])


INSIDE = {
    "rollout": {"prompts": "prompts", "policy": "policy"},
    "verification": {"prompts": "prompts", "rollouts": "rollout.rollouts"},
    "advantages": {"rollouts": "rollout.rollouts", "rewards": "verification.rewards", "critic": "critic"},
    "ppo-update": {
        "rollouts": "rollout.rollouts",
        "rewards": "verification.rewards",
        "experience": "advantages.experience",
        "policy": "policy",
        "reference": "reference",
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
HANDED_ON = {
    "policy": "ppo-update.new_policy",
    "critic": "ppo-update.new_critic",
    "history": "history.new_history",
    "rollouts": "rollout.rollouts",
    "rewards": "verification.rewards",
    "experience": "advantages.experience",
}


def test_inside_an_iteration(document: dict[str, Any]) -> None:
    dag = dag_of(document, *SECOND)
    assert inside(dag) == INSIDE
    assert handed_on(dag) == HANDED_ON


def test_inside_an_iteration_without_critic(without_critic: dict[str, Any]) -> None:
    """The same, but for the critic."""
    dag = dag_of(without_critic, *SECOND)
    assert inside(dag) == {
        name: {key: where for key, where in found.items() if key != "critic"} for name, found in INSIDE.items()
    }
    assert handed_on(dag) == {key: where for key, where in HANDED_ON.items() if key != "critic"}


@pytest.mark.parametrize("estimator", ["gae", "group_normalised"])
def test_inside_an_iteration_that_draws_again(estimator: str) -> None:
    """Each draw sees what the one before left; only the last goes on, and every draw's metrics reach the history."""
    critic = ["value_pretraining.max_steps=0"] if estimator != "gae" else []
    drawing = [*DRAWING, f"advantages.estimator={estimator}"]
    dag = dag_of(parse(compile_pipeline(recipe(*drawing, *critic), IMAGE)), *SECOND)
    found = inside(dag)
    assert set(found) == {
        *("rollout", "rollout-2", "rollout-3", "verification", "verification-2", "verification-3"),
        *("history", "history-2", "history-3", "advantages", "ppo-update"),
    }
    assert found["rollout"] == INSIDE["rollout"]
    for number, before in (("-2", ""), ("-3", "-2")):
        assert found[f"rollout{number}"] == INSIDE["rollout"] | {
            "previous_rollouts": f"rollout{before}.rollouts",
            "previous_rewards": f"verification{before}.rewards",
        }
        assert found[f"verification{number}"]["rollouts"] == f"rollout{number}.rollouts"
    for name in ("advantages", "ppo-update"):
        assert (found[name]["rollouts"], found[name]["rewards"]) == ("rollout-3.rollouts", "verification-3.rewards")
    assert [found[f"history{n}"]["rollout"] for n in ("", "-2", "-3")] == [
        "rollout.metrics",
        "rollout-2.metrics",
        "rollout-3.metrics",
    ]
    assert [found[f"history{n}"]["previous"] for n in ("", "-2", "-3")] == [
        "history",
        "history.new_history",
        "history-2.new_history",
    ]
    parameters = [dag["tasks"][f"rollout{n}"]["inputs"]["parameters"] for n in ("", "-2", "-3")]
    assert [p["draw"]["runtimeValue"]["constant"] for p in parameters] == [1, 2, 3]
    assert parameters[0]["wanted_groups"]["runtimeValue"]["constant"] == 0
    assert parameters[2]["wanted_groups"] == {"componentInputParameter": "wanted_groups"}


@pytest.mark.parametrize("made", ["document", "without_critic"])
def test_parameters_inside_an_iteration(made: str, request: pytest.FixtureRequest) -> None:
    for stage, task in dag_of(request.getfixturevalue(made), *SECOND)["tasks"].items():
        parameters = task["inputs"]["parameters"]
        for name in ("block_start", "offset"):
            assert parameters[name] == {"componentInputParameter": name}
        if stage != "history":
            section = f"{stage.replace('-', '_')}_section"
            assert parameters["section"] == {"componentInputParameter": section}
        for name in {"seed", "store"} & parameters.keys():
            assert parameters[name] == {"componentInputParameter": name}


def test_inside_an_evaluation(document: dict[str, Any]) -> None:
    dag = dag_of(document, BLOCKS[0], "evaluation-002")
    assert inside(dag) == {
        "rollout": {"prompts": "prompts", "policy": "policy"},
        "verification": {"prompts": "prompts", "rollouts": "rollout.rollouts"},
        "evaluation": {"prompts": "prompts", "rollouts": "rollout.rollouts", "rewards": "verification.rewards"},
        "history": {
            "previous": "history",
            "rollout": "rollout.metrics",
            "verification": "verification.metrics",
            "evaluation": "evaluation.metrics",
        },
    }
    assert handed_on(dag) == {
        "history": "history.new_history",
        "evaluation": "evaluation.evaluation",
        "rollouts": "rollout.rollouts",
        "rewards": "verification.rewards",
    }
    for task in ("rollout", "evaluation"):
        assert dag["tasks"][task]["inputs"]["parameters"]["seed"] == {"componentInputParameter": "seed"}


def test_inside_value_pretraining(document: dict[str, Any]) -> None:
    dag = dag_of(document, "value-pretraining")
    assert inside(dag)["value-pretraining"] == {
        "rollouts": "rollout.rollouts",
        "rewards": "verification.rewards",
        "policy": "policy",
    }
    assert handed_on(dag) == {
        "critic": "value-pretraining.critic",
        "pretraining": "value-pretraining.pretraining",
        "history": "history.new_history",
    }


def test_without_critic_nothing_makes_or_takes_one(without_critic: dict[str, Any], document: dict[str, Any]) -> None:
    def artifacts(found: dict[str, Any]) -> set[str]:
        """Names of all artifacts that a task gets or a component makes."""
        dags = [found["root"], *(c for c in found["components"].values() if "dag" in c)]
        got = {name for d in dags for t in d["dag"]["tasks"].values() for name in t["inputs"].get("artifacts", {})}
        made = (c.get("outputDefinitions", {}).get("artifacts", {}) for c in found["components"].values())
        return got.union(*made)

    assert {name for name in artifacts(document) if "critic" in name} == {"critic", "new_critic"}
    assert {name for name in artifacts(without_critic) if "critic" in name} == set()
    assert artifacts(document) - artifacts(without_critic) >= {"critic", "new_critic", "pretraining"}
    assert not [name for name in without_critic["components"] if "pretrain" in name or "critic" in name.split("-")]
    assert not [name for name in without_critic["deploymentSpec"]["executors"] if "value" in name]
    takes = {
        name: found["inputDefinitions"]["artifacts"]["critic"]
        for name, found in without_critic["components"].items()
        if "critic" in found.get("inputDefinitions", {}).get("artifacts", {})
    }
    assert {name.split(SEPARATOR)[-1] for name in takes} == {"advantages"}  # it can take one, and does without
    assert all(taken["isOptional"] for taken in takes.values())


def test_without_critic_the_iterations_follow_the_first_evaluation(without_critic: dict[str, Any]) -> None:
    tasks, names = tasks_of(without_critic), names_of(without_critic)
    assert set(tasks) == {"problems", "base-model", "history", "evaluation-000", "report", *BLOCKS}
    for block, before, history in zip(BLOCKS, ("base-model", BLOCKS[0]), ("evaluation-000", BLOCKS[0]), strict=True):
        assert sources(tasks[block], names) == {
            "policy": (before, "policy"),
            "reference": ("base-model", "policy"),
            "prompts": ("problems", "train_prompts"),
            "heldout_prompts": ("problems", "heldout_prompts"),
            "history": (history, "history"),
        }


@pytest.mark.parametrize("made", ["document", "without_critic"])
def test_a_run_hands_on_its_policy_history_and_page(made: str, request: pytest.FixtureRequest) -> None:
    document = request.getfixturevalue(made)
    found, names = handed_on(document["root"]["dag"]), names_of(document)
    shown = {key: f"{names[task]}.{output}" for key, (task, output) in ((k, v.split(".")) for k, v in found.items())}
    assert shown == {"policy": "iteration-003.policy", "history": "iteration-003.history", "page": "report.page"}


@pytest.mark.parametrize("estimator", ["group_normalised", "group_centred"])
def test_either_estimator_of_groups_does_without_a_critic(estimator: str) -> None:
    made = load_recipe("tiny", [f"advantages.estimator={estimator}", "value_pretraining.max_steps=0"])
    assert "value_pretraining" not in stages_of(compile_pipeline(made, IMAGE))


def test_a_critic_that_is_not_pretrained_is_still_made_first() -> None:
    """With max_steps 0 the stage writes what `init` makes."""
    made = load_recipe("tiny", ["value_pretraining.max_steps=0"])
    assert stages_of(compile_pipeline(made, IMAGE))["value_pretraining"] == 1


def test_report_shows_the_first_and_the_last_iteration(tasks: dict[str, Task], names: dict[str, str]) -> None:
    shown = sources(tasks["report"], names)
    for table in ("rollouts", "rewards", "experience"):
        assert shown[f"first_{table}"] == (BLOCKS[0], f"first_{table}")
        assert shown[f"last_{table}"] == (BLOCKS[1], f"last_{table}")
    assert shown["policy"] == ("iteration-003", "policy")
    for output in ("evaluation", "rollouts", "rewards"):
        name = "evaluation" if output == "evaluation" else f"evaluation_{output}"
        assert shown[name] == (BLOCKS[1], name)
    assert shown["evaluation_prompts"] == ("problems", "heldout_prompts")
    assert shown["prompts"] == ("problems", "train_prompts")
    assert shown["history"] == (BLOCKS[1], "history")
    assert shown["pretraining"] == ("value-pretraining", "pretraining")


def test_report_without_critic_shows_all_but_its_pretraining(
    tasks: dict[str, Task], names: dict[str, str], without_critic: dict[str, Any]
) -> None:
    shown = sources(tasks_of(without_critic)["report"], names_of(without_critic))
    assert shown == {key: where for key, where in sources(tasks["report"], names).items() if key != "pretraining"}


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
        BLOCKS[0]: "rollout_section",
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
        ("advantages.keep_groups=4", {"advantages_section", "wanted_groups"}),
        ("ppo_update.kl_coef=0.01", {"ppo_update_section"}),
        ("verification.reward_wrong=0.0", {"verification_section"}),
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


@pytest.mark.parametrize(
    "settings", [[], DRAWING, [*DRAWING, *WITHOUT_CRITIC]], ids=["vapo", "draws", "draws-without-critic"]
)
def test_compiling_in_other_processes_gives_the_same_bytes(settings: list[str]) -> None:
    """protobuf orders its maps by a seed per process, so one comparison may agree by chance (kfp alone: never in 3)."""
    program = (
        "import sys; from vapo.recipe import load_recipe; from pipelines.compiling import compile_pipeline;"
        "sys.stdout.write(compile_pipeline(load_recipe('tiny', sys.argv[2:]), sys.argv[1]))"
    )
    asked = ["iterations=2", "evaluation.every=2", *settings]
    command = [sys.executable, "-c", program, IMAGE, *asked]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) for _ in range(3)]
    compiled = compile_pipeline(load_recipe("tiny", asked), IMAGE)
    for process in started:
        text, _ = process.communicate()
        assert process.returncode == 0
        assert text == compiled


@pytest.mark.parametrize(
    ("store", "default"), [("s3://bucket/x", "s3://bucket/x"), ("minio://bucket", "minio://bucket"), ("", None)]
)
def test_a_cluster_finds_the_store_where_the_recipe_says(store: str, default: str | None) -> None:
    document = parse(compile_pipeline(recipe(f"runtime.store={store}"), IMAGE, share=True))
    parameter = document["root"]["inputDefinitions"]["parameters"]["store"]
    assert (parameter.get("defaultValue"), parameter.get("isOptional", False)) == (default, default is not None)


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
    # train.secret is the name of a Secret, empty here.
    ir = ir.replace('"secret":""', "")
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


def test_stages_of_counts_every_task_without_critic(ir_without_critic: str) -> None:
    assert stages_of(ir_without_critic) == {
        "problems": 1,
        "base_model": 1,
        "rollout": 3 + 3,
        "verification": 3 + 3,
        "advantages": 3,
        "ppo_update": 3,
        "evaluation": 3,
        "history": 1 + 3 + 3,
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
    found = set(tasks_of(longer, "iterations-003-004"))
    assert found == {"iteration-1-of-2", "iteration-2-of-2", "evaluation-2-of-2"}  # as the first two, and all alike
    parameters = longer["root"]["inputDefinitions"]["parameters"]
    assert json.loads(parameters["recipe_json"]["defaultValue"])["iterations"] == 4
