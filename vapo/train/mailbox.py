"""Where a launcher and its nodes leave things for each other: notes and files of one job, in the run's store."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from vapo.errors import UserError
from vapo.store import StoredFile, object_store, sha256_of
from vapo.store.connection import connect
from vapo.store.objects import Corrupted
from vapo.tables import atomic_path, write_text

FOLDER = "trainjobs"  # in the store; a folder for each job, taken away when it is over
BUCKETS = ("s3", "minio")


class Mailbox:
    """The parcels of one job: a parcel is a note in JSON and files, and the note is written last."""

    def __init__(self, store: str, job: str) -> None:
        """`store` as in the recipe's stages, `job` a name."""
        self.store, self.job = store, job
        uri = f"{store.rstrip('/')}/{FOLDER}/{job}"
        self.objects = object_store(uri)
        self.notes: Notes = BucketNotes(uri) if urlsplit(uri).scheme in BUCKETS else FolderNotes(uri)

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


class Notes(Protocol):
    """Small texts by name, and whatever else lies beside them."""

    def read(self, name: str) -> str | None:
        """The text, or None."""

    def write(self, name: str, text: str) -> None:
        """Whole or not at all."""

    def names(self) -> set[str]:
        """Those that are there."""

    def clear(self) -> None:
        """Delete them, and all that lies in their folder."""


class FolderNotes:
    """Notes as files of a folder."""

    def __init__(self, uri: str) -> None:
        self.root = Path(unquote(urlsplit(uri).path) if urlsplit(uri).scheme else uri)

    def read(self, name: str) -> str | None:
        try:
            return (self.root / f"{name}.json").read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def write(self, name: str, text: str) -> None:
        write_text(self.root / f"{name}.json", text)

    def names(self) -> set[str]:
        return {path.stem for path in self.root.glob("[!.]*.json")}

    def clear(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


class BucketNotes:
    """Notes as objects of a bucket."""

    def __init__(self, uri: str) -> None:
        self.bucket = connect(uri)

    def read(self, name: str) -> str | None:
        from minio.error import S3Error

        with self.bucket.told():
            try:
                answer = self.bucket.client.get_object(self.bucket.name, self.bucket.key(f"{name}.json"))
            except S3Error as error:
                if error.code != "NoSuchKey":
                    raise
                return None
            try:
                return str(answer.read().decode())
            finally:
                answer.release_conn()

    def write(self, name: str, text: str) -> None:
        body = text.encode()
        with self.bucket.told():
            key = self.bucket.key(f"{name}.json")
            self.bucket.client.put_object(self.bucket.name, key, io.BytesIO(body), len(body))

    def names(self) -> set[str]:
        return {key.removesuffix(".json") for key in self._keys(recursive=False) if key.endswith(".json")}

    def clear(self) -> None:
        for key in self._keys(recursive=True):
            with self.bucket.told():
                self.bucket.client.remove_object(self.bucket.name, self.bucket.key(key))

    def _keys(self, *, recursive: bool) -> list[str]:
        """Of what lies here, without the prefix."""
        prefix = self.bucket.key("")
        with self.bucket.told():
            found = self.bucket.client.list_objects(self.bucket.name, prefix=prefix, recursive=recursive)
            return [entry.object_name.removeprefix(prefix) for entry in found if not entry.is_dir]
