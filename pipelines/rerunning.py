"""Run a stage of a run again from its recorded inputs, and all that follows if asked; the run stays as it is."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.choosing import chosen, following, shards_of
from pipelines.ledger import tasks_of
from pipelines.local import check, execute, show, summary
from pipelines.redoing import Again, Given, redoing
from pipelines.settings import changed, check_settings
from pipelines.stores import opened
from pipelines.workdir import RERUN, Workdir
from vapo.compare.artifacts import likeness
from vapo.errors import UserError
from vapo.lineage.graph import Node, read_nodes
from vapo.recipe import Recipe, read_resolved
from vapo.store import sha256_of
from vapo.store.checkpoints import check_complete
from vapo.tables import write_text

MARK = "VAPO_RERUN"  # in every task's environment, so in its cache key: done anew, but found when this rerun is resumed


def rerun(
    run: str,
    workdir: Workdir,
    console: Console,
    stage: str,
    iteration: int | None = None,
    purpose: str = "",
    downstream: bool = False,
    settings: Sequence[str] = (),
    *,
    warm: bool = True,
) -> Path:
    """Do it in a folder of its own beside the run's; returns the folder.

    Raises:
        UserError: nothing or several things are meant, an artifact is not what was recorded, or a setting is for none
            of the tasks; nothing was started.
    """
    nodes = read_nodes(workdir.artifacts)
    recipe, again = asked(run, workdir, nodes, stage, iteration, purpose, downstream, settings)
    facts = {
        "run": run,
        "stage": stage,
        "iteration": iteration,
        "purpose": purpose,
        "downstream": downstream,
        "settings": list(settings),
        "tasks": [
            {"record": task.node.digest, "section": task.section, "parameters": task.parameters} for task in again
        ],
    }
    return _execute(recipe, again, nodes, facts, lambda: workdir.rerun_folder(run), workdir, console, warm)


def resume(folder: Path, workdir: Workdir, console: Console, *, warm: bool = True) -> Path:
    """Go on with a rerun that was interrupted: what it has done is found again."""
    facts, recipe = json.loads((folder / RERUN).read_text(encoding="utf-8")), read_resolved(folder / "recipe.json")
    nodes = read_nodes(workdir.artifacts)
    by_digest = {node.digest: node for node in nodes}
    if lost := next((task["record"] for task in facts["tasks"] if task["record"] not in by_digest), None):
        raise UserError(f"{folder.name}: the record {lost[:12]} that it repeats is gone: delete {folder}")
    again = [Again(by_digest[task["record"]], task["section"], task["parameters"]) for task in facts["tasks"]]
    return _execute(recipe, again, nodes, facts, lambda: folder, workdir, console, warm)


def _execute(
    recipe: Recipe,
    again: Sequence[Again],
    nodes: Sequence[Node],
    facts: dict[str, Any],
    folder_of: Callable[[], Path],
    workdir: Workdir,
    console: Console,
    warm: bool,
) -> Path:
    """Check the inputs, execute the tasks, and say of every output whether it is the same."""
    name = f"vapo-{recipe.name}"
    built = redoing(name, again, nodes, lambda found: str(place_of(found)), linked=facts["downstream"])
    check(recipe)
    with opened(recipe.runtime.store, workdir) as store:
        check_given(built.given)
        folder = folder_of()
        with workdir.executing(folder):
            given = {str(found): {"record": found.record, "sha256": found.sha256} for found in built.given}
            _write(folder, {**facts, "given": given})
            marks = {MARK: folder.name}
            _, watch = execute(recipe, lambda _: built.pipeline, folder, workdir, store, console, warm, marks)
            tasks = tasks_of(workdir, folder, read_nodes(workdir.artifacts))
            pairs = list(_pairs(built.tasks, tasks, nodes))
            outputs = [
                {
                    "task": old.name,
                    "output": output,
                    "result": likeness(old.path_of(output), new.path_of(output)),
                }
                for old, new in pairs
                for output in sorted(old.record.outputs)
            ]
            page = next((node.path_of("page") for node in tasks if "page" in node.record.outputs), None)
            if page:
                show(page, folder)
            _write(folder, {**facts, "given": given, "outputs": outputs})
    console.print(_table(outputs))
    summary(console, watch, f"{folder.name}: done", folder / "report.html" if page else None)
    return folder


def asked(
    run: str,
    workdir: Workdir,
    nodes: list[Node],
    stage: str,
    iteration: int | None,
    purpose: str,
    downstream: bool,
    settings: Iterable[str],
) -> tuple[Recipe, list[Again]]:
    """What is to be done again, what was made first first, and the recipe with the settings.

    Raises:
        UserError: as `rerun`.
    """
    folder = workdir.find(run)
    tasks, before = tasks_of(workdir, folder, nodes), read_resolved(folder / "recipe.json")
    targets = chosen(tasks, stage, iteration, purpose)
    if downstream:
        targets = following(tasks, targets)
    after = check_settings(settings, targets, before)
    return after, [Again(node, *changed(node, before, after)) for node in targets]


def check_given(given: Iterable[Given]) -> None:
    """Whether the artifacts that a rerun starts from are what was recorded.

    Raises:
        UserError: one is missing or was changed, or a file of a checkpoint is missing from the store.
    """
    for found in given:
        path = place_of(found)
        if not path.is_file():
            raise UserError(f"{found}: {path} is missing: 'vapo report' of its run makes it anew")
        if (digest := sha256_of(path)) != found.sha256:
            raise UserError(
                f"{found}: {path} was changed: its sha256 is {digest[:12]}, recorded was {found.sha256[:12]}: restore "
                "it, or make the run anew with --fresh"
            )
        check_complete(path)


def place_of(given: Given) -> Path:
    """Where an artifact lies now: beside its maker's record, wherever that was moved."""
    return given.maker.path_of(given.output) if given.maker else Path(given.uri)


def _pairs(again: Mapping[str, Again], tasks: Sequence[Node], nodes: Sequence[Node]) -> Iterator[tuple[Node, Node]]:
    """What was repeated, and the task in its place: found by its folder, a shard by its concatenation."""
    by_digest = {node.digest: node for node in (*nodes, *tasks)}
    made = {node.folder.name: node for node in tasks if node.folder}
    for place, task in again.items():
        for old, new in zip(shards_of(task.node), shards_of(made[place]), strict=True):
            yield by_digest[old], by_digest[new]
        yield task.node, made[place]


def _write(folder: Path, facts: dict[str, Any]) -> None:
    write_text(folder / RERUN, json.dumps(facts, indent=1) + "\n")


def _table(outputs: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="bold")
    for heading in ("done again", "output", ""):
        table.add_column(heading, no_wrap=True)
    last = ""
    for row in outputs:
        table.add_row(row["task"] if row["task"] != last else "", row["output"], row["result"])
        last = row["task"]
    return table
