"""Recompute every digest of a lineage, and name what is missing, was changed, or was made from what changed since."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from functools import partial
from operator import eq
from pathlib import Path

from vapo.errors import UserError
from vapo.lineage.graph import Graph, Node
from vapo.lineage.record import FILE
from vapo.store import open_checkpoint, read_manifest, sha256_of
from vapo.store.uris import UnreadableHere, local_copy


def verify(graph: Graph, on_checked: Callable[[str], None] = lambda name: None) -> list[str]:
    """What is wrong, a line each, what was made first first; an empty list: all is as it was recorded.

    Outputs are hashed again, the files of checkpoints in the store likewise, and each record against the digest that
    its successors name. A stage whose inputs are wrong is named too: its outputs are no longer what they would be.
    """
    wrong: list[str] = []
    suspect: set[str] = set()  # digests of records below which something is wrong
    for node in reversed(graph.nodes):
        found = _wrong_with(node)
        parents = {source.record for source in node.record.inputs.values()}
        if not found and parents & suspect:
            names = sorted(name for name, source in node.record.inputs.items() if source.record in suspect)
            wrong.append(f"{node.name}: made from {', '.join(names)}, which changed since or are missing")
        if found or parents & suspect:
            suspect.add(node.digest)
        wrong += found
        on_checked(node.name)
    return wrong + [f"no record of who made {what}" for what in graph.unknown]


def _wrong_with(node: Node) -> list[str]:
    return [*_record(node), *(line for name in sorted(node.record.outputs) for line in _output(node, name))]


def _record(node: Node) -> list[str]:
    """What is wrong with a record that lies beside outputs; one from a store was checked when it was read."""
    if node.folder is None:
        return []
    try:
        if hashlib.sha256((node.folder / FILE).read_bytes()).hexdigest() != node.digest:
            return [f"{node.name}: its record {node.folder / FILE} was changed"]
    except OSError:
        return [f"{node.name}: its record {node.folder / FILE} is missing"]
    return []


def _output(node: Node, name: str) -> list[str]:
    uri, expected = node.uri_of(name), node.record.outputs[name].sha256
    try:
        with local_copy(uri) as path:
            if path is None:
                return [f"{node.name}: {name} is missing: {uri}"]
            if (digest := sha256_of(path)) != expected:
                return [f"{node.name}: {name} was changed: {uri} has sha256 {digest[:12]}, not {expected[:12]}"]
            return [f"{node.name}: {name}: {line}" for line in _checkpoint(path)]
    except UnreadableHere as error:
        return [f"{node.name}: {name} was not checked: {error}"]


def _checkpoint(path: Path) -> list[str]:
    """What is wrong with the files of a checkpoint, if this artifact is a manifest."""
    with path.open("rb") as file:
        if file.read(1) != b"{":
            return []
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("kind", "")
        manifest = read_manifest(path, kind)
    except (ValueError, UserError):
        return []  # another JSON artifact: metrics
    found = []
    for entry in manifest.files:  # one at a time: all that are wrong are named, and no more than one is on the disk
        with tempfile.TemporaryDirectory() as scratch:
            try:
                open_checkpoint(manifest, Path(scratch), partial(eq, entry.path))
            except UserError as error:
                found.append(str(error))
    return found
