"""What the cache is predicted to serve is what it serves, task by task, whatever was changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.compiling import compile_pipeline
from pipelines.planning import served, tasks_on_cluster
from pipelines.tasks import tasks_of
from pipelines.workdir import Workdir
from tests.running import TINY, assert_refused, counts, folder_of, records, vapo
from vapo.errors import UserError
from vapo.plan.cache import changes
from vapo.plan.store import tables
from vapo.plan.throughput import Lengths
from vapo.recipe import Recipe, load_recipe

BASE = TINY[2]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with one finished run of `tiny`."""
    workdir = tmp_path_factory.mktemp("planned")
    predicted = served(load_recipe("tiny", [BASE]), Workdir(workdir))
    assert {found.why for found in predicted} == {"not done yet"}
    done = vapo("run", *TINY, "--workdir", workdir)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return workdir


def what_happens(workdir: Path, *settings: str) -> tuple[set[str], str]:
    """(places of the tasks that a run executes, its standard output)."""
    before = records(workdir).keys()
    done = vapo("run", *TINY, *(part for setting in settings for part in ("--set", setting)), "--workdir", workdir)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return {folder.name for folder in records(workdir).keys() - before}, done.stdout


@pytest.mark.slow
def test_tables_have_the_bytes_that_are_planned(planned: Path) -> None:
    (folder,) = (planned / ".vapo" / "artifacts").glob("*/block--iteration--advantages")
    record = records(planned)[folder]
    rollouts = records(planned)[folder.parent / "block--iteration--rollout"]
    rows = record["outputs"]["experience"]["rows"]
    predicted = tables(rows, Lengths(20, rollouts["metrics"]["length_mean"], 60), 4)
    written = {name: record["inputs"][name]["bytes"] for name in ("rollouts", "rewards")}
    written["experience"] = record["outputs"]["experience"]["bytes"]
    for name, size in written.items():  # an empty table is a few kB
        assert getattr(predicted, name) == pytest.approx(size - 3000, abs=4000), (name, predicted, written)


# In this order: a later one finds what the earlier ones left.
CHANGES = {
    "": {},
    "ppo_update.clip_high=0.24": {"block--iteration--ppo-update": "[ppo_update] clip_high 0.28 -> 0.24"},
    "evaluation.temperature=0.5": {
        "evaluation--rollout": "[rollout] temperature 1.0 -> 0.5",
        "evaluation--evaluation": "[evaluation] temperature 1.0 -> 0.5",
        "evaluation--verification": "input rollouts: evaluation-000 / rollout is made anew",
    },
    "report.title=Another": {"report": "[report] title VAPO -> Another"},
    "iterations=2": {
        "block--iteration-2--rollout": "not done yet",
        "report": "recipe.iterations 1 -> 2",
    },
    "seed=1": {
        "problems": "seed 0 -> 1",
        "block--iteration--verification": "input prompts: problems is made anew",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_predictions_are_what_happens(planned: Path, change: str) -> None:
    settings = [change] if change else []
    predicted = served(load_recipe("tiny", [BASE, *settings]), Workdir(planned))
    executed, told = what_happens(planned, *settings)
    assert {found.task.place for found in predicted if found.served is None} == executed
    assert counts(told) == (len(executed), len(predicted) - len(executed))
    whys = {found.task.place: found.why for found in predicted}
    for place, why in CHANGES[change].items():
        assert whys[place] == why


@pytest.mark.slow
def test_a_run_alone_can_be_asked_for(planned: Path) -> None:
    """With other runs' records beside it: what only they made is not served by this one."""
    changed = "ppo_update.clip_high=0.22"
    executed, told = what_happens(planned, changed)
    run = folder_of(told).name
    recipe = load_recipe("tiny", [BASE, changed])
    assert all(found.served for found in served(recipe, Workdir(planned), run))
    original = load_recipe("tiny", [BASE])
    missed = {found.task.place for found in served(original, Workdir(planned), run) if found.served is None}
    assert missed == executed
    assert all(found.served for found in served(original, Workdir(planned)))
    with pytest.raises(UserError, match="no run 'nothing'"):
        served(original, Workdir(planned), "nothing")
    assert_refused(vapo("plan", "tiny", "--against", "nothing", "--workdir", planned), "no run 'nothing'")


@pytest.mark.slow
def test_what_the_cache_forgot_is_not_served(planned: Path, tmp_path: Path) -> None:
    """Records stay where artifacts stay; `--fresh` forgets the cache alone."""
    workdir = Workdir(planned)
    kept = workdir.cache.rename(tmp_path / "cache")
    try:
        predicted = served(load_recipe("tiny", [BASE]), workdir)
    finally:
        kept.rename(workdir.cache)
    assert predicted[0].why == "the cache no longer holds it"
    assert not any(found.served for found in predicted)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text("{}\n")
    settings = [
        "problems.source=file",
        f"problems.path={problems}",
        "problems.examples=0",
        f"base_model.path={tmp_path}",
    ]
    recipe = load_recipe("tiny", settings)
    tasks = tasks_of(compile_pipeline(recipe, "image"), {"store": "s"}, recipe.outside()).tasks
    assert {task.stage: task.outside for task in tasks if task.outside} == {
        "problems": (problems,),
        "base_model": (problems,),
    }


@pytest.mark.parametrize("iterations", [1, 7])
def test_tasks_come_after_their_inputs_and_pods_are_counted(iterations: int) -> None:
    recipe = Recipe.model_validate({"iterations": iterations, "problems": {"examples": 10}})
    found = tasks_on_cluster(recipe)
    for number, task in enumerate(found.tasks):
        assert all(maker < number for makers in task.makers.values() for maker in makers)
    # A driver and a pod for each task, a driver for each sub-DAG and the root: one for each folder that tasks show.
    places = [task.shown.split(" / ")[:-1] for task in found.tasks]
    dags = {tuple(place[:depth]) for place in places for depth in range(len(place) + 1)}
    assert found.pods == 2 * len(found.tasks) + len(dags)
    updates = [task for task in found.tasks if task.stage == "ppo_update"]
    numbers = [task.parameters["block_start"] + task.parameters["offset"] for task in updates]
    assert numbers == list(range(1, iterations + 1))
    assert updates[0].section == recipe.for_stage("ppo_update").model_dump(mode="json")


def test_changes_name_keys_and_values() -> None:
    old, new = {"a": 1, "b": {"c": [1, 2]}, "d": '{"x": 1}'}, {"a": 1.0, "b": {"c": [1, 3]}, "d": '{"x": 2}', "e": "t"}
    assert changes(old, new) == ["b.c [1, 2] -> [1, 3]", "d.x 1 -> 2", "e (absent) -> t"]
    assert changes({"k": "v" * 99}, {"k": "w"})[0] == "k " + "v" * 37 + "... -> w"
