"""A read-through cache of objects in a folder that processes share; beyond its limit the least recently used goes.

VAPO_CACHE names the folder (unset: no cache; `vapo run` takes its working directory's), VAPO_CACHE_BYTES the limit.
What a stage opened are hard links to what lies here, so it keeps its files whatever is evicted meanwhile; put the
folder on the file system of TMPDIR, or every read is a copy.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from vapo.errors import UserError
from vapo.store.manifest import StoredFile, sha256_of
from vapo.store.objects import name_of

FOLDER, LIMIT = "VAPO_CACHE", "VAPO_CACHE_BYTES"
BYTES = 32 << 30


def cache_of(environ: Mapping[str, str]) -> Cache | None:
    """The cache that the environment asks for.

    Raises:
        UserError: the limit is not a number of bytes.
    """
    folder, limit = environ.get(FOLDER), environ.get(LIMIT) or str(BYTES)
    if not limit.isdecimal():
        raise UserError(f"{LIMIT}={limit}: expected a number of bytes, say {BYTES}")
    return Cache(Path(folder), int(limit)) if folder and int(limit) else None


class Cache:
    """FOLDER/objects/9f/9f86d0... and, while they arrive, FOLDER/partial/9f86d0...: together never above the limit."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        for name in ("objects", "partial", "locks"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def get(self, entry: StoredFile, target: Path, download: Callable[[StoredFile, Path], None]) -> None:
        """Make the object appear at `target`, verified; `download` fetches what is not here, in one process."""
        if self._found(entry, target):
            return
        with self._locked(self._lock_of(entry.sha256)):
            if self._found(entry, target):  # somebody else fetched it meanwhile
                return
            partial = self._room_for(entry)
            if partial is None:
                fetch(entry, target, download)
                return
            try:
                download(entry, partial)
                _link(partial, target)
                kept = self.folder / name_of(entry)
                kept.parent.mkdir(exist_ok=True)
                partial.replace(kept)
            finally:
                partial.unlink(missing_ok=True)

    def _found(self, entry: StoredFile, target: Path) -> bool:
        """Whether the object was here, and whole; now it is at `target`, which no eviction takes away."""
        kept = self.folder / name_of(entry)
        try:
            _link(kept, target)
            os.utime(kept)
        except FileNotFoundError:  # never there, or evicted in this moment
            return target.exists() and self._verified(entry, target)
        return self._verified(entry, target)

    def _verified(self, entry: StoredFile, target: Path) -> bool:
        if sha256_of(target) == entry.sha256:
            return True
        target.unlink()
        (self.folder / name_of(entry)).unlink(missing_ok=True)
        return False

    def _room_for(self, entry: StoredFile) -> Path | None:
        """An empty file of the object's size that counts already; None if there is no room for it at all."""
        with self._locked(self.folder / "locks" / "room"):
            for partial in (self.folder / "partial").iterdir():
                self._remove_if_left(partial)
            # In this order: what moves from the one to the other meanwhile is counted twice rather than not at all.
            arriving = sum(size for _, size, _ in _files(self.folder / "partial"))
            kept = _files(self.folder / "objects")
            used = arriving + sum(size for _, size, _ in kept)
            if arriving + entry.bytes > self.limit:
                return None
            for _, size, path in sorted(kept):
                if used + entry.bytes <= self.limit:
                    break
                path.unlink(missing_ok=True)
                used -= size
            partial = self.folder / "partial" / entry.sha256
            partial.touch()
            os.truncate(partial, entry.bytes)
            return partial

    def _remove_if_left(self, partial: Path) -> None:
        """Take away what a process that was killed left: nobody holds its lock."""
        with self._lock_of(partial.name).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            partial.unlink(missing_ok=True)

    def _lock_of(self, digest: str) -> Path:
        return self.folder / "locks" / digest[:2]

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        with path.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def fetch(entry: StoredFile, target: Path, download: Callable[[StoredFile, Path], None]) -> None:
    """Download past the cache; the file appears whole. It can be fetched again, so nobody waits for the disk."""
    beside = target.with_name(f".{target.name}.partial")
    try:
        download(entry, beside)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def _files(folder: Path) -> list[tuple[int, int, Path]]:
    """(time of the last use, bytes, path) of every file below a folder that others may be changing."""
    found = []
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            if path.is_file():
                found.append(((stat := path.stat()).st_mtime_ns, stat.st_size, path))
    return found


def _link(source: Path, target: Path) -> None:
    """A hard link; on another file system a copy."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
            raise
        shutil.copyfile(source, target)
