"""What a run consists of: the records of the tasks that it executed or found in the cache, a line each as they end."""

import json
from pathlib import Path

from pipelines.workdir import Workdir
from vapo.errors import UserError
from vapo.lineage.graph import Node, node_at, read_nodes, trace
from vapo.tables import write_text

FILE = "records.txt"  # in a run's folder


class Ledger:
    """Written while a run goes, so that also an interrupted one tells what it has; what it had before stays in it."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.path, self.cache = folder / FILE, cache
        self.now: dict[str, None] = {}  # digests of records, in order
        self.path.touch()

    def executed(self, record: str) -> None:
        """A task was executed and left this record."""
        self.now[record] = None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{record}\n")

    def served(self, key: str) -> None:
        """A task's outputs were found in the cache, in the entry whose key begins like this."""
        for entry in self.cache.glob(f"{key}*.json"):
            self.executed(records_in(entry)[0])

    def ended(self) -> None:
        """The run came to its end: what earlier attempts had besides is no part of it."""
        write_text(self.path, "".join(f"{record}\n" for record in self.now))


def records_in(entry: Path) -> list[str]:
    """Digests of the records that the artifacts of a cache entry name: of its one task."""
    outputs = json.loads(entry.read_text(encoding="utf-8")).values()
    return [str(output["metadata"]["record"]) for output in outputs if isinstance(output, dict)]


def digests_of(folder: Path) -> list[str] | None:
    """The records of a run, in the order in which its tasks ended; None: vapo kept no such list when it ran."""
    try:
        return list(dict.fromkeys((folder / FILE).read_text(encoding="utf-8").split()))
    except FileNotFoundError:
        return None


def tasks_of(workdir: Workdir, folder: Path, nodes: list[Node]) -> list[Node]:
    """The tasks of a run, what was made first first.

    Args:
        nodes: all that the working directory has, as `read_nodes` finds them.

    Raises:
        UserError: a record is gone or was changed, or nothing tells which records are the run's.
    """
    digests = digests_of(folder)
    if digests is None and folder.parent != workdir.root:
        raise UserError(f"{folder} is of an older vapo, and tells not what it refers to: delete it, or evaluate again")
    if digests is None:  # a run that ended is known by what led to its page
        return list(reversed(trace(nodes, node_at(workdir.last_task(folder.name)), "page").nodes))
    by_digest = {node.digest: node for node in nodes}
    if not by_digest.keys() >= set(digests):  # a task ended since they were read
        by_digest = {node.digest: node for node in read_nodes(workdir.artifacts)}
    if lost := next((digest for digest in digests if digest not in by_digest), None):
        raise UserError(
            f"run {folder.name}: the record {lost[:12]} of one of its tasks is gone or was changed: "
            f"'vapo report {folder.name}' makes anew what is missing; delete {folder} to let go of the run"
        )
    return [by_digest[digest] for digest in digests]
