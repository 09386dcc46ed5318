"""`vapo gc`: what no kept run refers to, and its removal, in an order that leaves nothing that points to nothing.

A cache entry keeps nothing alive: it is there to save work, entries never expire, and what it serves can be computed
again; it goes with the artifacts that it serves, before them, since kfp.local trusts what it names. Only while a run is
being executed every entry keeps what it serves, for the run may ask for it at any moment.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipelines.ledger import FILE as LEDGER
from pipelines.ledger import records_in
from pipelines.reachable import ancestors, objects_of, reachable
from pipelines.stores import EMBEDDED, opened
from pipelines.workdir import Owner, Workdir, ended
from vapo.errors import UserError
from vapo.lineage.graph import Node, read_nodes
from vapo.lineage.software import library_versions, source_digest
from vapo.partial import is_held
from vapo.recipe import read_resolved
from vapo.store import object_store
from vapo.store.objects import Kept, ObjectStore
from vapo.tables import write_text

NOTHING = "none"  # --keep none
SHARED = 24.0  # hours: what is younger stays in a store that other machines write to
JUST_NOW = 3600.0  # seconds: `vapo evaluate` unpacks a model before it holds a run's folder


@dataclass
class Kind:
    """What there is of one kind: how much stays, and what goes, with the function that takes it away."""

    name: str
    stays: int = 0
    stays_bytes: int = 0
    goes: list[tuple[int, Callable[[], bool]]] = field(default_factory=list)  # bytes; whether it went

    def add(self, keep: bool, size: int, remove: Callable[[], bool]) -> None:
        """Count one thing."""
        if keep:
            self.stays, self.stays_bytes = self.stays + 1, self.stays_bytes + size
        else:
            self.goes.append((size, remove))


def collect(
    workdir: Workdir,
    console: Console,
    *,
    delete: bool = False,
    keep: Sequence[str] = (),
    stores: Sequence[str] = (),
    older_than: float | None = None,
) -> list[Kind]:
    """List what no kept run refers to, and with `delete` take it away; returns it by kind.

    Args:
        keep: names of the only runs to keep, besides those that are being executed; NOTHING: none; empty: all whose
            folders are there.
        stores: other stores than the working directory's own, in which nobody else keeps anything that is needed.
        older_than: hours: objects that were written or wanted since stay. None: 0 in the working directory, SHARED in
            `stores`.

    Raises:
        UserError: a run that should be kept is not there, or what it needs is not known.
    """
    with workdir.alone() as owners, ExitStack() as stack:
        kept, dropped = _folders(workdir, keep, owners)
        nodes = read_nodes(workdir.artifacts)
        needed = reachable(workdir, kept, nodes)
        since = min((owner.since for owner in owners), default=float("inf")) - 1
        if owners:
            by_digest = {node.digest: node for node in nodes}
            served = (by_digest.get(d) for entry in workdir.cache.glob("*.json") for d in records_in(entry))
            needed |= ancestors((node for node in served if node), by_digest)
        objects = objects_of(needed.values())
        unfinished = any(not ended(folder) for folder in kept)
        kinds = [
            _cache(workdir, needed, bool(owners)),
            _partial(workdir, needed, unfinished, bool(owners)),
            _models(workdir, kept),
            _artifacts(workdir, needed, since),
            _copies(workdir, objects, since),
        ]
        now = time.time()
        if workdir.store.is_dir():
            before = min(since, now - 3600 * (older_than or 0.0))
            kinds.append(_objects("objects", object_store(str(workdir.store)), objects, before))
        if (workdir.server / "data").is_dir():
            try:
                embedded = object_store(stack.enter_context(opened(EMBEDDED, workdir)))
            except UserError as error:
                if not owners:
                    raise
                console.print(f"objects of the embedded server are not looked at: {error}", highlight=False)
            else:  # no run has it open, so nobody writes
                kinds.append(_objects("objects, embedded", embedded, objects, now - 3600 * (older_than or 0.0)))
        for name in stores:
            store = object_store(stack.enter_context(opened(name, workdir)))
            before = min(since, now - 3600 * (SHARED if older_than is None else older_than))
            kinds.append(_objects(f"objects, {name}", store, objects, before))
            if advice := store.advice():
                console.print(advice, highlight=False)
        if delete:
            for folder in dropped:  # from now on it refers to nothing
                write_text(folder / LEDGER, "")
            freed = [sum(size for size, remove in kind.goes if remove()) for kind in kinds]
            _remove_empty(workdir.artifacts, since)
        console.print(_table(kinds))
        for owner in owners:
            console.print(f"run {owner.run} is being executed by process {owner.pid}: what it may need stays")
        if delete:
            console.print(f"{_size(sum(freed))} freed", highlight=False)
        else:
            free = sum(size for kind in kinds for size, _ in kind.goes)
            console.print(f"--delete would free {_size(free)}", highlight=False)
        return kinds


def _folders(workdir: Workdir, keep: Sequence[str], owners: list[Owner]) -> tuple[list[Path], list[Path]]:
    """(runs to keep, runs to let go of)."""
    there = {folder.name: folder for folder in [*workdir.evaluations(), *workdir.runs()]}
    live = {owner.run for owner in owners}
    if not keep:
        return list(there.values()), []
    names = set(keep) - {NOTHING}
    if unknown := sorted(names - there.keys()):
        raise UserError(
            f"--keep {unknown[0]}: no such run in {workdir.root}: there are {sorted(there)}, or {NOTHING!r}"
        )
    kept = [folder for name, folder in there.items() if name in names | live]
    return kept, [folder for name, folder in there.items() if name not in names | live]


def _cache(workdir: Workdir, needed: dict[str, Node], live: bool) -> Kind:
    kind = Kind("cache entries")
    for entry in workdir.cache.glob("*"):
        finished = entry.suffix == ".json"
        kept = live or (finished and all(record in needed for record in records_in(entry)))
        kind.add(kept, _bytes(entry), lambda entry=entry: _unlink(entry))  # type: ignore[misc]
    return kind


def _partial(workdir: Workdir, needed: dict[str, Node], unfinished: bool, live: bool) -> Kind:
    """Unfinished work can only be found again by an interrupted run, with the same code on the same inputs."""
    kind = Kind("unfinished work")
    made = {output.sha256 for node in needed.values() for output in node.record.outputs.values()}
    for folder in workdir.partial.glob("*"):
        kept = live or is_held(folder) or (unfinished and _can_be_found(folder, made))
        kind.add(kept, _bytes(folder), lambda folder=folder: _remove_tree(folder))  # type: ignore[misc]
    return kind


def _can_be_found(folder: Path, made: set[str]) -> bool:
    try:
        identity = json.loads((folder / "identity.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    same_code = (identity["vapo"], identity["libraries"]) == (source_digest(), library_versions())
    return same_code and set(identity["inputs"].values()) <= made


def _models(workdir: Workdir, kept: Iterable[Path]) -> Kind:
    """Models that evaluations unpacked: another evaluation of one would unpack it again."""
    kind = Kind("unpacked models")
    used = {read_resolved(folder / "recipe.json").base_model.path for folder in kept}
    for folder in workdir.models.glob("*"):
        young = time.time() - _used(folder) < JUST_NOW
        kind.add(str(folder) in used or young, _bytes(folder), lambda folder=folder: _remove_tree(folder))  # type: ignore[misc]
    return kind


def _artifacts(workdir: Workdir, needed: dict[str, Node], since: float) -> Kind:
    """Tasks' folders; one that a running task fills has no record yet."""
    kind = Kind("tasks' artifacts")
    kept = {node.folder for node in needed.values()}
    for folder in workdir.artifacts.glob("*/*"):
        keep = folder in kept or _used(folder) > since or _used(folder.parent) > since
        kind.add(keep, _bytes(folder), lambda folder=folder: _remove_tree(folder))  # type: ignore[misc]
    return kind


def _copies(workdir: Workdir, objects: set[str], since: float) -> Kind:
    kind = Kind("copies of objects")
    for path in (workdir.objects / "objects").glob("*/*"):
        kept = path.name in objects or _used(path) > since
        kind.add(kept, _bytes(path), lambda path=path: _unlink(path))  # type: ignore[misc]
    return kind


def _objects(name: str, store: ObjectStore, objects: set[str], before: float) -> Kind:
    kind = Kind(name)
    for found in store.kept():
        keep = found.name in objects or found.used >= before
        kind.add(keep, found.bytes, lambda found=found: _remove_object(store, found))  # type: ignore[misc]
    return kind


def _remove_object(store: ObjectStore, found: Kept) -> bool:
    return any(True for _ in store.remove([found]))


def _unlink(path: Path) -> bool:
    path.unlink(missing_ok=True)
    return True


def _remove_tree(folder: Path) -> bool:
    shutil.rmtree(folder) if folder.is_dir() and not folder.is_symlink() else folder.unlink()
    return True


def _remove_empty(artifacts: Path, since: float) -> None:
    for folder in artifacts.glob("*"):
        if folder.stat().st_mtime <= since and not any(folder.iterdir()):
            folder.rmdir()


def _used(path: Path) -> float:
    """When a file or folder was changed last; infinite if it vanished meanwhile."""
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _bytes(path: Path) -> int:
    """Of a file or of all below a folder, links as links; what vanishes meanwhile counts for nothing."""
    files = [path]
    if path.is_dir() and not path.is_symlink():
        files = [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
    total = 0
    for file in files:
        with suppress(FileNotFoundError):
            total += file.lstat().st_size
    return total


def _table(kinds: Iterable[Kind]) -> Table:
    table = Table(box=None, header_style="bold")
    for heading in ("", "kept", "bytes", "not referred to", "bytes"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for kind in kinds:
        goes = sum(size for size, _ in kind.goes)
        table.add_row(kind.name, str(kind.stays), _size(kind.stays_bytes), str(len(kind.goes)), _size(goes))
    return table


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
