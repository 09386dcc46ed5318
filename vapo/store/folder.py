"""Objects as the files of a folder: what is opened are links to them."""

from __future__ import annotations

import shutil
from pathlib import Path

from vapo.store.manifest import StoredFile, sha256_of
from vapo.store.objects import Corrupted, name_of
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
        if self.size(entry) == entry.bytes:
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

    def _path(self, entry: StoredFile) -> Path:
        return self.root / name_of(entry)
