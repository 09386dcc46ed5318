"""Where a launcher and its nodes leave things for each other: notes and files of one job, in the run's store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vapo.errors import UserError
from vapo.store import StoredFile, object_store, sha256_of
from vapo.store.notes import notes_at
from vapo.store.objects import Corrupted
from vapo.tables import atomic_path

FOLDER = "trainjobs"  # in the store; a folder for each job, taken away when it is over
BUCKETS = ("s3", "minio")


class Mailbox:
    """The parcels of one job: a parcel is a note in JSON and files, and the note is written last."""

    def __init__(self, store: str, job: str) -> None:
        """`store` as in the recipe's stages, `job` a name."""
        self.store, self.job = store, job
        uri = f"{store.rstrip('/')}/{FOLDER}/{job}"
        self.objects = object_store(uri)
        self.notes = notes_at(uri)

    def put(self, name: str, document: Mapping[str, Any], files: Mapping[str, Path] | None = None) -> None:
        """Leave a parcel; one of that name is replaced."""
        entries = []
        for label, path in (files or {}).items():
            entry = StoredFile(label, sha256_of(path), path.stat().st_size)
            self.objects.put(path, entry)
            entries.append(vars(entry))
        self.notes.write(name, json.dumps({"document": document, "files": entries}, indent=1, sort_keys=True) + "\n")

    def get(self, name: str) -> dict[str, Any] | None:
        """A parcel's document, or None while there is no such parcel."""
        text = self.notes.read(name)
        found: dict[str, Any] | None = None if text is None else json.loads(text)["document"]
        return found

    def take(self, name: str, into: Mapping[str, Path]) -> None:
        """Write those files of a parcel that it has to the given paths, each verified.

        Raises:
            UserError: a file is missing or is not what was left.
        """
        text = self.notes.read(name)
        for entry in (StoredFile(**entry) for entry in json.loads(text or '{"files": []}')["files"]):
            if entry.path not in into:
                continue
            target = into[entry.path]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            try:
                if self.objects.size(entry) != entry.bytes:
                    raise Corrupted
                self.objects.get(entry, target)
            except Corrupted:
                raise UserError(
                    f"TrainJob {self.job}: {entry.path} was lost or changed in the store {self.store}: run the stage "
                    "again"
                ) from None
            if target.is_symlink():  # to what `clear` takes away
                with atomic_path(target) as beside:
                    shutil.copyfile(target, beside)

    def names(self) -> set[str]:
        """The parcels that are there."""
        return self.notes.names()

    def clear(self) -> None:
        """Take everything of the job away."""
        self.notes.clear()
