"""Where a launcher and its nodes leave things for each other: documents and files of one job, in the run's store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vapo.errors import UserError
from vapo.store import _folder_of, sha256_of
from vapo.tables import atomic_path, write_text

FOLDER = "trainjobs"


class Mailbox:
    """The things of one job: a parcel is a document with files, and its document is written last."""

    def __init__(self, store: str, job: str) -> None:
        """`store` as in the recipe's stages, `job` a name."""
        self.store, self.job = store, job
        self.folder = _folder_of(store) / FOLDER / job

    def put(self, name: str, document: Mapping[str, Any], files: Mapping[str, Path] | None = None) -> None:
        """Leave a parcel; one of that name is replaced."""
        entries = {}
        for label, path in (files or {}).items():
            digest = sha256_of(path)
            entries[label] = {"sha256": digest, "bytes": path.stat().st_size}
            target = self._file(digest)
            if not target.is_file():
                with atomic_path(target) as beside:
                    shutil.copyfile(path, beside)
        text = json.dumps({"document": document, "files": entries}, indent=1, sort_keys=True) + "\n"
        write_text(self._parcel(name), text)

    def get(self, name: str) -> dict[str, Any] | None:
        """A parcel's document, or None while there is no such parcel."""
        found = self._read(name)
        return None if found is None else found["document"]

    def take(self, name: str, into: Mapping[str, Path]) -> None:
        """Write a parcel's files to the given paths, each verified.

        Raises:
            UserError: a file is missing or is not what was left.
        """
        found = self._read(name)
        if found is None:
            raise UserError(f"TrainJob {self.job}: nothing named {name!r} in store {self.store}: is it the same store?")
        for label, target in into.items():
            entry = found["files"][label]
            source = self._file(entry["sha256"])
            with atomic_path(target) as beside:
                if source.is_file():
                    shutil.copyfile(source, beside)
                if not source.is_file() or sha256_of(Path(beside)) != entry["sha256"]:
                    raise UserError(
                        f"TrainJob {self.job}: {label} was lost or changed in store {self.store}: run the stage again"
                    )

    def files(self, name: str) -> list[str]:
        """The labels of a parcel's files."""
        found = self._read(name)
        return [] if found is None else list(found["files"])

    def drop(self, names: Iterable[str]) -> None:
        """Take parcels away; their files stay until `clear`."""
        for name in names:
            self._parcel(name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Take everything of the job away."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads(self._parcel(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return found

    def _parcel(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _file(self, digest: str) -> Path:
        return self.folder / "files" / digest
