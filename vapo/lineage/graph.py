"""The graph that records form: which stage made an artifact, from what, back to the prompts and the seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vapo.errors import UserError
from vapo.lineage.record import FILE, Record, read_record


@dataclass(frozen=True)
class Node:
    """A stage's execution: its record, the record's digest, and the folder where it and the outputs lie.

    Without a folder the record is known from a records store, and the outputs are where it says.
    """

    digest: str
    folder: Path | None
    record: Record

    @property
    def name(self) -> str:
        """As a person says it: "rollout (evaluation) of iteration 3, shard 2 of 4"."""
        purpose = f" ({self.record.purpose})" if self.record.purpose not in ("", "training") else ""
        when = f" of iteration {self.record.iteration}" if "iteration" in self.record.parameters else ""
        given: Mapping[str, Any] = self.record.parameters
        shard = f", shard {given['shard'] + 1} of {given['shards']}" if given.get("shards", 1) > 1 else ""
        return f"{self.record.stage}{purpose}{when}{shard}"

    def path_of(self, output: str) -> Path:
        """Where an output lies on this machine: beside its record, wherever that was moved."""
        found = Path(self.record.outputs[output].path)
        return self.folder / found.name if self.folder else found

    def uri_of(self, output: str) -> str:
        """Where an output lies: on this machine, or in a bucket."""
        return (
            str(self.path_of(output)) if self.folder else self.record.outputs[output].uri or str(self.path_of(output))
        )


@dataclass(frozen=True)
class Graph:
    """All that led to one artifact, what was made last first."""

    target: str  # the artifact: its name
    sha256: str
    nodes: tuple[Node, ...]
    unknown: tuple[str, ...]  # inputs whose maker left no record here

    def number_of(self, digest: str) -> int | None:
        """A record's place in `nodes`, from 1; None if it is not among them."""
        return next((i for i, node in enumerate(self.nodes, start=1) if node.digest == digest), None)

    def as_json(self) -> dict[str, Any]:
        """Artifact, records by digest in order, and the edges between them."""
        edges = [
            {"from": source.record, "to": node.digest, "input": name, "sha256": source.sha256}
            for node in self.nodes
            for name, source in sorted(node.record.inputs.items())
        ]
        return {
            "artifact": self.target,
            "sha256": self.sha256,
            "records": [
                {"digest": n.digest, "folder": str(n.folder or ""), **n.record.model_dump(mode="json")}
                for n in self.nodes
            ],
            "edges": edges,
            "unknown": list(self.unknown),
        }


def read_nodes(artifacts: Path) -> list[Node]:
    """Every record below a folder of artifacts: RUN/TASK/record.json, a shard's below its number."""
    return [node_at(path.parent) for path in sorted(artifacts.rglob(FILE))]


def nodes_of(records: Mapping[str, Record]) -> list[Node]:
    """Records from a store, by digest, as nodes."""
    return [Node(digest, None, record) for digest, record in records.items()]


def node_at(folder: Path) -> Node:
    """The record in a task's folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    record = read_record(folder / FILE)
    return Node(hashlib.sha256((folder / FILE).read_bytes()).hexdigest(), folder, record)


def find_artifact(nodes: Iterable[Node], named: str) -> tuple[Node, str]:
    """The stage that made an artifact, and the artifact's name there.

    Args:
        named: the path of an artifact or of its task's folder, or the beginning of a sha256 (at least 6 digits).

    Raises:
        UserError: nothing or several things are meant.
    """
    path = Path(named)
    if path.is_dir():
        node = node_at(path)
        return node, next(iter(node.record.outputs))
    if path.is_file():
        node = node_at(path.parent)
        for name in node.record.outputs:
            if node.path_of(name).name == path.name:
                return node, name
        raise UserError(f"{path}: its record names no such output: there are {sorted(node.record.outputs)}")
    found = [
        (node, name)
        for node in nodes
        for name, output in node.record.outputs.items()
        if len(named) >= 6 and output.sha256.startswith(named)
    ]
    if not found:
        raise UserError(
            f"{named!r}: no run, no artifact's path and no sha256 of an artifact (give at least 6 of its digits)"
        )
    digests = {node.record.outputs[name].sha256 for node, name in found}
    if len(digests) > 1:
        raise UserError(f"{named!r} begins the sha256 of {len(digests)} artifacts: give more digits")
    return found[0]


def trace(nodes: Iterable[Node], node: Node, output: str) -> Graph:
    """All that led to an output of `node`: every record once, none before what it led to."""
    return Graph(output, node.record.outputs[output].sha256, *_back_from(nodes, [node]))


def trace_all(nodes: Iterable[Node], ends: Iterable[Node], target: str) -> Graph:
    """All that led to several nodes, and these; `target` says what for."""
    return Graph(target, "", *_back_from(nodes, ends))


def _back_from(nodes: Iterable[Node], ends: Iterable[Node]) -> tuple[tuple[Node, ...], tuple[str, ...]]:
    """All that led to some nodes and these, what was made last first; and inputs whose maker is not known."""
    by_digest: Mapping[str, Node] = {n.digest: n for n in nodes}
    order: list[Node] = []
    unknown: dict[str, None] = {}
    seen: set[str] = set()
    stack: list[tuple[Node, Iterator[str]]] = []

    def enter(found: Node) -> None:
        seen.add(found.digest)
        stack.append((found, iter(sorted(found.record.inputs))))

    for end in ends:
        if end.digest not in seen:
            enter(end)
        while stack:  # depth first and by hand: a long run's chain is longer than Python's stack
            current, names = stack[-1]
            name = next(names, None)
            if name is None:
                order.append(current)
                stack.pop()
                continue
            source = current.record.inputs[name]
            parent = by_digest.get(source.record)
            if parent is None:
                unknown[f"{name} of {current.name}: {source.uri or source.path}"] = None
            elif parent.digest not in seen:
                enter(parent)
    return tuple(reversed(order)), tuple(unknown)


def dump(graph: Graph) -> str:
    """The graph as JSON text."""
    return json.dumps(graph.as_json(), indent=1, sort_keys=True) + "\n"
