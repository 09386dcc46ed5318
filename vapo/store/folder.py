"""Objects as the files of a folder: what is opened are links to them."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vapo.store.manifest import StoredFile, sha256_of
from vapo.store.objects import Corrupted, Kept, name_of
from vapo.tables import atomic_path


class FolderStore:
    """ROOT/objects/9f/9f86d0...; see `ObjectStore`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def check(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)

    def size(self, entry: StoredFile) -> int | None:
        path = self._path(entry)
        return path.stat().st_size if path.is_file() else None

    def put(self, path: Path, entry: StoredFile) -> bool:
        with self._held(fcntl.LOCK_SH):  # what is found here must not be removed before it is marked as wanted
            if self.size(entry) == entry.bytes:
                found = self._path(entry)
                # Its time of change stays, to the nanosecond: it may be in a cache's key.
                os.utime(found, ns=(time.time_ns(), found.stat().st_mtime_ns))
                return False
        with atomic_path(self._path(entry)) as beside:
            shutil.copyfile(path, beside)
        return True

    def get(self, entry: StoredFile, target: Path) -> None:
        source = self._path(entry).resolve()
        if sha256_of(source) != entry.sha256:
            raise Corrupted
        target.symlink_to(source)

    def address(self, entry: StoredFile) -> str:
        return str(self._path(entry))

    def kept(self) -> Iterator[Kept]:
        for path in (self.root / "objects").glob("*/*"):
            with suppress(FileNotFoundError):  # an unfinished one that is finished now
                stat = path.stat()
                yield Kept(path.name, stat.st_size, max(stat.st_mtime, stat.st_atime))

    def remove(self, found: Iterable[Kept]) -> Iterator[Kept]:
        for each in found:
            parent = each.name.lstrip(".")[:2]  # an unfinished one is ".9f86d0....RANDOM"
            path = self.root / "objects" / parent / each.name
            with self._held(fcntl.LOCK_EX), suppress(FileNotFoundError):
                stat = path.stat()
                if max(stat.st_mtime, stat.st_atime) <= each.used:
                    path.unlink()
                    yield each

    def advice(self) -> str:
        return ""

    @contextmanager
    def _held(self, how: int) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "lock").open("a") as lock:
            fcntl.flock(lock, how)
            yield

    def _path(self, entry: StoredFile) -> Path:
        return self.root / name_of(entry)
