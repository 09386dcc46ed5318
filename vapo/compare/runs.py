"""Runs side by side: the settings that differ, which artifacts are the same bytes, and every metric that both have."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vapo.compare.artifacts import DIFFERS, SAME, is_table, likeness, table_at
from vapo.compare.tables import Difference, difference
from vapo.lineage.graph import Node
from vapo.recipe import Recipe
from vapo.report.history import name_in_history
from vapo.schemas import HISTORY, name_of

ABSENT = "-"  # one of both does not have it
LOST = "gone"  # it is recorded, but not there any more
Key = tuple[int, str, str, int]  # iteration, stage, purpose, and a number where a stage ran several times for it


@dataclass(frozen=True)
class Run:
    """A run's name, recipe, and tasks by what they are."""

    name: str
    recipe: Recipe
    tasks: Mapping[Key, Node]


@dataclass(frozen=True)
class Artifact:
    """An output of a stage, and for each run after the first how it compares with the first one's."""

    key: Key
    output: str
    results: tuple[str, ...]
    differences: tuple[Difference | None, ...]  # of tables that differ


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; values stand in the order of the runs, None where a run has none."""

    runs: tuple[str, ...]
    settings: dict[str, tuple[Any, ...]]  # dotted key -> value in each run, where they differ
    artifacts: tuple[Artifact, ...]
    metrics: dict[tuple[int, str, str], tuple[float | None, ...]]  # (iteration, stage as in HISTORY, name)


def keyed(nodes: Sequence[Node], iterations: Mapping[str, int]) -> dict[Key, Node]:
    """A run's tasks by what they are.

    Args:
        iterations: of every record's digest.
    """
    found: dict[Key, Node] = {}
    counts: dict[tuple[int, str, str], int] = defaultdict(int)
    for node in nodes:
        what = iterations[node.digest], node.record.stage, node.record.purpose
        counts[what] += 1
        found[*what, counts[what]] = node
    return found


def compare(runs: Sequence[Run], iteration: int | None = None) -> Comparison:
    """Compare runs with the first of them; of one that did a part only, that part.

    Args:
        iteration: artifacts and metrics of this one alone.
    """
    first, *others = runs
    common = [key for key in first.tasks if any(key in run.tasks for run in others)]
    wanted = sorted(key for key in common if iteration in (None, key[0]))
    return Comparison(
        tuple(run.name for run in runs),
        _settings([run.recipe for run in runs]),
        tuple(artifact for key in wanted for artifact in _artifacts(key, runs)),
        _metrics(wanted, runs),
    )


def _settings(recipes: Sequence[Recipe]) -> dict[str, tuple[Any, ...]]:
    flat = [_flat(recipe.model_dump(mode="json")) for recipe in recipes]
    names = dict.fromkeys(name for found in flat for name in found)
    values = {name: tuple(found.get(name) for found in flat) for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _artifacts(key: Key, runs: Sequence[Run]) -> list[Artifact]:
    first, *others = [run.tasks.get(key) for run in runs]
    assert first is not None
    found = []
    for output in sorted(first.record.outputs):
        pairs = [_compared(first, other, output) for other in others]
        found.append(Artifact(key, output, *map(tuple, zip(*pairs, strict=True))))
    return found


def _compared(first: Node, other: Node | None, output: str) -> tuple[str, Difference | None]:
    if other is None or output not in other.record.outputs:
        return ABSENT, None
    if first.record.outputs[output].sha256 == other.record.outputs[output].sha256:
        return SAME, None
    old, new = first.path_of(output), other.path_of(output)
    if not (old.is_file() and new.is_file()):
        return LOST, None
    result = likeness(old, new)
    if result != DIFFERS or not (is_table(old) and is_table(new)):
        return result, None
    tables = table_at(old), table_at(new)
    return result, None if name_of(tables[0].schema) == name_of(HISTORY) else difference(*tables)  # `metrics` has that


def _metrics(keys: Sequence[Key], runs: Sequence[Run]) -> dict[tuple[int, str, str], tuple[float | None, ...]]:
    found: dict[tuple[int, str, str], list[float | None]] = {}
    for key in keys:
        iteration, stage, purpose, _ = key
        if stage == "history":  # it repeats the others'
            continue
        for index, run in enumerate(runs):
            node = run.tasks.get(key)
            for name, value in (node.record.metrics if node else {}).items():
                cell = found.setdefault((iteration, name_in_history(stage, purpose), name), [None] * len(runs))
                cell[index] = value  # of several draws the last one's, as in HISTORY
    return {what: tuple(values) for what, values in found.items()}
