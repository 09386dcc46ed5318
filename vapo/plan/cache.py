"""What the cache will serve of a pipeline, and why the rest misses, from the records that earlier runs left.

A task is served when one record of its place in the pipeline has its section, parameters and image, and every input
of that record is what the cache serves for the input's maker. Otherwise the record that comes nearest says what
differs first.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vapo.lineage.graph import Node

LONGEST = 40  # characters of a value in a reason


@dataclass(frozen=True)
class Task:
    """A task of a compiled pipeline with all that it will be called with; those before it have lower numbers."""

    place: str  # the tasks on the way to it, say "iteration--ppo-update"
    shown: str  # as the UI names that way, say "iteration-001 / ppo-update"
    stage: str
    image: str
    parameters: Mapping[str, Any]  # without the section; what only the run can know is left out
    section: Mapping[str, Any]
    makers: Mapping[str, tuple[int, ...]]  # name of an input -> numbers of the tasks that may make it
    outside: tuple[Path, ...] = ()  # files that it reads by a path of its section


@dataclass(frozen=True)
class Prediction:
    """Whether a task is served, and what differs if it is not: `why` begins with the nearest cause."""

    task: Task
    served: Node | None
    why: str = ""


def predict(tasks: Sequence[Task], nodes: Collection[Node], kept: Collection[Path] | None = None) -> list[Prediction]:
    """One prediction for each task, in their order.

    Args:
        nodes: records of earlier runs, as `vapo.lineage.graph.read_nodes` gives them.
        kept: folders whose outputs the cache still names; None: all.
    """
    at_place: dict[str, list[Node]] = {}
    for node in nodes:
        if node.folder is None:  # its record alone is left
            continue
        at_place.setdefault(node.folder.name, []).append(node)
    found: list[Prediction] = []
    for task in tasks:
        nodes_here = at_place.get(task.place, [])
        if not nodes_here:
            found.append(Prediction(task, None, "not done yet"))
            continue
        causes = [
            (_differences(task, node, found), kept is not None and node.folder not in kept, node) for node in nodes_here
        ]
        # Of several equal ones the cache holds the latest.
        differences, forgotten, node = min(causes, key=lambda c: (len(c[0]), c[1], -c[2].record.ended))
        if differences or forgotten:
            found.append(Prediction(task, None, differences[0] if differences else "the cache no longer holds it"))
        else:
            found.append(Prediction(task, node))
    return found


def _differences(task: Task, node: Node, before: Sequence[Prediction]) -> list[str]:
    """All that keeps a record from serving a task, the nearest cause first."""
    record = node.record
    found = [f"[{task.stage}] {line}" for line in changes(record.section, task.section)]
    for name, old in record.parameters.items():
        if name in task.parameters:
            found += changes({name: old}, {name: task.parameters[name]})
    if record.image != task.image:
        found.append(f"code or image: {_short(record.image)} -> {_short(task.image)}")
    found += [f"{path} was changed since" for path in task.outside if _newer(path, record.started)]
    found += [f"input {name} is new" for name in sorted(task.makers.keys() - record.inputs.keys())]
    found += [f"input {name} is gone" for name in sorted(record.inputs.keys() - task.makers.keys())]
    for name in sorted(task.makers.keys() & record.inputs.keys()):
        makers = [before[number] for number in task.makers[name]]
        if any(made.served is not None and made.served.digest == record.inputs[name].record for made in makers):
            continue
        made = next((made for made in makers if made.served is None), makers[0])
        served = "comes from another run" if made.served is not None else "is made anew"
        found.append(f"input {name}: {made.task.shown} {served}")
    return found


def changes(old: Any, new: Any, key: str = "") -> list[str]:
    """What differs between two values that JSON holds, say ["clip_high 0.28 -> 0.24"]; text that is JSON is read."""
    old, new = _opened(old), _opened(new)
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = [name for name in (*old, *(name for name in new if name not in old)) if old.get(name) != new.get(name)]
        return [line for name in names for line in changes(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))]
    return [] if old == new else [f"{key} {_short(old)} -> {_short(new)}"]


def _opened(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _newer(path: Path, when: float) -> bool:
    return not path.exists() or path.stat().st_mtime > when


def _short(value: Any) -> str:
    text = "(absent)" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
