"""Checkpoints go into a store and come out of it: several files at a time, each written once and verified at each read.

The manifest names every file with its size, its sha256 and the store, and is written last: a reader sees a whole
checkpoint or none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from vapo.errors import UserError
from vapo.progress import emit
from vapo.store.manifest import OPTIMIZER, Manifest, StoredFile, read_manifest, sha256_of, write_manifest
from vapo.store.objects import Corrupted, object_store

FILES_AT_ONCE = 3  # while one is hashed, the others are on their way

In = TypeVar("In")
Out = TypeVar("Out")


def save_checkpoint(folder: Path, manifest: Path, *, store: str, kind: str, facts: dict[str, Any]) -> Manifest:
    """Put every file under `folder` into the store and write the manifest last."""
    return write_manifest(manifest, kind, store, store_files(folder, store), facts)


def store_files(folder: Path, store: str) -> tuple[StoredFile, ...]:
    """Put every file under `folder` into the store: what one rank of several does before `write_manifest`.

    Tells how much of it was new as an event `stored`.

    Raises:
        UserError: the store takes nothing; says why, and the cure.
    """
    objects = object_store(store)
    first: dict[str, Path] = {}  # digest -> the first file of that content: it alone is written

    def stored(path: Path) -> tuple[StoredFile, bool]:
        entry = StoredFile(path.relative_to(folder).as_posix(), sha256_of(path), path.stat().st_size)
        return entry, first.setdefault(entry.sha256, path) == path and objects.put(path, entry)

    found = _in_parallel(stored, sorted(p for p in folder.rglob("*") if p.is_file()))
    new = [entry.bytes for entry, written in found if written]
    emit("stored", files=len(found), new_files=len(new), new_bytes=sum(new))
    return tuple(entry for entry, _ in found)


def open_checkpoint(manifest: Manifest, into: Path, want: Callable[[str], bool] = lambda path: True) -> Path:
    """Make the wanted files of a checkpoint appear under `into`, each verified; returns `into`.

    That all of them are in the store is known before the first one is read. Read the files, never write to them: they
    may be links to the store's objects.

    Raises:
        UserError: objects are missing, or one's content is not what the manifest says; names the file.
    """
    objects = object_store(manifest.store)
    entries = [entry for entry in manifest.files if want(entry.path)]

    def opened(entry: StoredFile) -> None:
        target = into / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            objects.get(entry, target)
        except Corrupted:
            raise _changed(manifest, entry) from None

    _check_sizes(manifest, entries)
    _in_parallel(opened, entries)
    return into


def check_complete(path: Path) -> None:
    """Whether all files of a checkpoint are in its store, by their sizes; says nothing of what is no manifest.

    Raises:
        UserError: one is missing, or has another size.
    """
    with path.open("rb") as file:
        if file.read(1) != b"{":
            return
    found = json.loads(path.read_text(encoding="utf-8"))
    if "files" in found and "store" in found:
        manifest = read_manifest(path, found["kind"])
        _check_sizes(manifest, manifest.files)


def _check_sizes(manifest: Manifest, entries: Sequence[StoredFile]) -> None:
    sizes = _in_parallel(object_store(manifest.store).size, entries)
    missing = [entry.path for entry, size in zip(entries, sizes, strict=True) if size is None]
    if missing:
        more = f" and {len(missing) - 1} more files are" if len(missing) > 1 else " is"
        raise UserError(
            f"{manifest}: {missing[0]}{more} missing from the store {manifest.store}: run again with --fresh to make "
            "it anew"
        )
    for entry, size in zip(entries, sizes, strict=True):
        if size != entry.bytes:
            raise _changed(manifest, entry)


def _changed(manifest: Manifest, entry: StoredFile) -> UserError:
    return UserError(
        f"{manifest}: {entry.path} in the store {manifest.store} was changed since it was written: delete "
        f"{object_store(manifest.store).address(entry)} and run again with --fresh"
    )


def model_only(path: str) -> bool:
    """Whether a checkpoint's file belongs to the model rather than to the training state."""
    return not path.startswith(OPTIMIZER)


def check_store(store: str) -> None:
    """Whether checkpoints can be written to a store, known before any work is done.

    Raises:
        UserError: they cannot; says why, and the cure.
    """
    object_store(store).check()


def _in_parallel(function: Callable[[In], Out], items: Iterable[In]) -> list[Out]:
    """The results in order; after the first error nothing new is begun."""
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
