"""What `vapo plan` looks at: a recipe's compiled pipeline, and what a working directory's cache will serve of it."""

import json
from pathlib import Path
from typing import Any

from pipelines.compiling import compile_pipeline
from pipelines.lineage import lineage_of
from pipelines.local import local_image
from pipelines.stores import uri_of
from pipelines.tasks import Tasks, tasks_of
from pipelines.workdir import Workdir
from vapo.lineage.graph import read_nodes
from vapo.plan.cache import Prediction, predict
from vapo.plan.hardware import hardware
from vapo.plan.text import Plan, plan
from vapo.recipe import Recipe


def planned(recipe: Recipe, workdir: Path, against: str = "", hardware_file: Path | None = None) -> Plan:
    """The plan of a recipe, with predictions where there is a working directory with runs; it makes none.

    Raises:
        UserError: no such run, the base model's shape is not known, or the file of hardware is wrong.
    """
    machine = hardware(hardware_file)
    predictions = served(recipe, Workdir(workdir), against) if against or (workdir / ".vapo").is_dir() else []
    found = tasks_on_cluster(recipe)
    return plan(recipe, machine, found.tasks, found.pods, predictions)


def tasks_on_cluster(recipe: Recipe) -> Tasks:
    """The tasks and pods of the pipeline that `vapo compile` writes."""
    return tasks_of(compile_pipeline(recipe), {"store": recipe.runtime.store})


def served(recipe: Recipe, workdir: Workdir, against: str = "") -> list[Prediction]:
    """What the cache will serve of `vapo run RECIPE` in a working directory, task by task.

    Args:
        against: a run's name: its records alone are looked at; empty: those of all runs.

    Raises:
        UserError: there is no such run, or it did not end.
    """
    tasks = tasks_of(
        compile_pipeline(recipe, local_image()), {"store": uri_of(recipe.runtime.store, workdir)}, recipe.outside()
    ).tasks
    nodes = lineage_of(workdir, workdir.find(against).name).nodes if against else read_nodes(workdir.artifacts)
    return predict(tasks, nodes, _kept(workdir.cache))


def _kept(cache: Path) -> set[Path]:
    """The folders that kfp.local's cache names: what it serves lies there."""
    folders: set[Path] = set()

    def look(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(uri := value.get("uri"), str) and Path(uri).exists():
                folders.add(Path(uri).parent)
            for part in value.values():
                look(part)

    for entry in cache.glob("*.json"):
        look(json.loads(entry.read_text(encoding="utf-8")))
    return folders
