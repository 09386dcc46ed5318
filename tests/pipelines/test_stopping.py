"""A run ends early where it should, and what it leaves is what a shorter run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp.local import io
from kfp.local.orchestrator.enhanced_dag_orchestrator import ConditionEvaluator

from pipelines.compiling import compile_pipeline, stages_of
from pipelines.segments import segments
from tests.running import TINY, counts, executed, folder_of, products, vapo
from vapo.recipe import load_recipe

RUNS_BELOW = "inputs.parameter_values['runs_below'] < inputs.parameter_values['target_accuracy']"
RUNS_FROM = "inputs.parameter_values['runs_from'] >= inputs.parameter_values['target_accuracy']"


def compiled(*settings: str, **options: Any) -> dict[str, Any]:
    recipe = load_recipe("tiny", ["iterations=4", "iterations_per_block=1", "evaluation.every=2", *settings])
    if "segment" in options:
        options["segment"] = segments(recipe)[options["segment"]]
    return next(iter(yaml.safe_load_all(compile_pipeline(recipe, "python", **options))))


def conditions(document: dict[str, Any]) -> dict[str, str]:
    """Display name -> condition of the root's tasks that have one; which accuracy it is of."""
    found = {}
    names = {name: task["taskInfo"]["name"] for name, task in document["root"]["dag"]["tasks"].items()}
    for name, task in document["root"]["dag"]["tasks"].items():
        if "triggerPolicy" in task:
            (key,) = {"runs_below", "runs_from"} & task["inputs"]["parameters"].keys()
            source = task["inputs"]["parameters"][key]["taskOutputParameter"]
            assert source["outputParameterKey"] == "accuracy"
            found[names[name]] = f"{task['triggerPolicy']['condition']} | {names[source['producerTask']]}"
    return found


def test_without_a_target_there_are_no_conditions() -> None:
    text = compile_pipeline(load_recipe("tiny", ["iterations=4", "iterations_per_block=1"]), "python", share=True)
    for word in ("triggerPolicy", "target_accuracy:", "runs_below"):
        assert word not in text


def test_a_block_runs_if_the_last_evaluation_before_it_is_below_the_target() -> None:
    """Evaluated are iterations 2 and 4: the third and the fourth wait for what the second has."""
    assert conditions(compiled("target_accuracy=0.5", share=True)) == {
        "stop-after-002": f"{RUNS_FROM} | iteration-002",
        "iteration-003": f"{RUNS_BELOW} | iteration-002",
        "iteration-004": f"{RUNS_BELOW} | iteration-002",
        "end": f"{RUNS_BELOW} | iteration-002",
    }


def test_the_last_block_of_a_segment_stops_the_chain_as_well() -> None:
    settings = ("target_accuracy=0.5", "iterations_per_run=2", "evaluation.every=1")
    first, last = (compiled(*settings, share=True, segment=number) for number in (0, 1))
    assert conditions(first) == {
        "stop-after-001": f"{RUNS_FROM} | iteration-001",
        "iteration-002": f"{RUNS_BELOW} | iteration-001",
        "stop-after-002": f"{RUNS_FROM} | iteration-002",
        "end": f"{RUNS_BELOW} | iteration-002",
    }
    assert set(conditions(last)) == {"stop-after-003", "iteration-004", "end"}
    hands = {}
    for task in first["root"]["dag"]["tasks"].values():
        dag = first["components"][task["componentRef"]["name"]].get("dag", {"tasks": {}})
        if "hand-off" in dag["tasks"]:
            stopped = dag["tasks"]["hand-off"]["inputs"]["parameters"]["stopped"]["runtimeValue"]["constant"]
            hands[task["taskInfo"]["name"]] = (stopped, "report" in dag["tasks"])
    assert hands == {"stop-after-001": (True, True), "stop-after-002": (True, True), "end": (False, False)}


def test_a_target_leaves_the_places_of_all_blocks_as_they_are() -> None:
    """So that a run that has begun without one is served from the cache."""
    plain, stopping = compiled(), compiled("target_accuracy=0.5")
    tasks = {name: c for name, c in plain["components"].items() if "executorLabel" in c and name != "comp-report"}
    assert len(tasks) > 20
    assert {name: stopping["components"].get(name) for name in tasks} == tasks


@pytest.mark.parametrize(("accuracy", "runs"), [(0.5, False), (0.49, True), (1e-07, True), (None, False)])
def test_kfp_local_reads_the_condition_as_the_backend_does(accuracy: float | None, runs: bool) -> None:
    """A task that did not run has no accuracy: then nothing that waits for it runs."""
    document = compiled("target_accuracy=0.5")
    tasks = document["root"]["dag"]["tasks"].values()
    condition = next(t["triggerPolicy"]["condition"] for t in tasks if t["taskInfo"]["name"] == "iteration-003")
    known = io.IOStore()
    known.put_parent_input("target_accuracy", 0.5)
    if accuracy is not None:
        known.put_task_output("block-2", "accuracy", accuracy)
    assert ConditionEvaluator.evaluate_condition(condition, known) is runs


@pytest.mark.slow
def test_a_run_that_reaches_its_target_leaves_what_a_shorter_one_leaves(tmp_path: Path) -> None:
    """The policy does not move, and is asked with the same random numbers, so that its accuracy stays 3.1%."""
    settings = [*TINY, "--set", "iterations_per_block=1", "--set", "evaluation.every=1"]
    settings += ["--set", "ppo_update.actor_lr=1e-9"]
    early, short = tmp_path / "early", tmp_path / "short"
    asked = ["--set", "iterations=3", "--set", "target_accuracy=0.03"]
    done = vapo("run", *settings, *asked, "--workdir", early)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "target_accuracy 3.0% reached after iteration 1 of 3" in done.stdout
    stages = stages_of(compile_pipeline(load_recipe("tiny"), "python"))
    assert executed(folder_of(done.stdout)) == stages  # those of one iteration
    again = vapo("run", *settings, *asked, "--workdir", early)
    assert counts(again.stdout) == (0, sum(stages.values()))
    done = vapo("run", *settings, "--set", "iterations=1", "--workdir", short)
    assert products(early) == products(short)
