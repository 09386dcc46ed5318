"""What runs refer to: the tasks that led to them, and the objects of those tasks' checkpoints."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipelines.ledger import tasks_of
from pipelines.workdir import Workdir
from vapo.errors import UserError
from vapo.lineage.graph import Node
from vapo.store import read_manifest


def reachable(workdir: Workdir, folders: Iterable[Path], nodes: list[Node]) -> dict[str, Node]:
    """The tasks of these runs, and all that led to them: a rerun needs what its inputs come from.

    Raises:
        UserError: as `tasks_of`: what a run needs is not known, so nothing may be taken away.
    """
    tasks = [node for folder in folders for node in tasks_of(workdir, folder, nodes)]
    return ancestors(tasks, {node.digest: node for node in nodes})


def ancestors(tasks: Iterable[Node], by_digest: Mapping[str, Node]) -> dict[str, Node]:
    """By digest: these tasks and all that led to them."""
    found: dict[str, Node] = {}
    left = list(tasks)
    while left:
        node = left.pop()
        if node.digest not in found:
            found[node.digest] = node
            makers = (by_digest.get(source.record) for source in node.record.inputs.values())
            left += [maker for maker in makers if maker]
    return found


def objects_of(nodes: Iterable[Node]) -> set[str]:
    """Digests of all files of the checkpoints that these tasks made."""
    found: set[str] = set()
    for node in nodes:
        for name in node.record.outputs:
            path = node.path_of(name)
            if path.is_file():
                found |= _files_of(path)
    return found


def _files_of(path: Path) -> set[str]:
    """Digests of a checkpoint's files; none for what is no manifest."""
    with path.open("rb") as file:
        if file.read(1) != b"{":
            return set()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {entry.sha256 for entry in read_manifest(path, data["kind"]).files} if "files" in data else set()
    except (ValueError, KeyError, UserError) as error:
        raise UserError(f"{path}: what it refers to cannot be read ({error}): restore it, or delete its run") from None
