"""Small texts by name in a store, beside its objects: each whole or not there, in a folder or a bucket."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from vapo.store.connection import NAMES, connect
from vapo.tables import write_text


class Notes(Protocol):
    """Small texts by name, and whatever else lies beside them."""

    def read(self, name: str) -> str | None:
        """The text, or None."""

    def write(self, name: str, text: str) -> None:
        """Whole or not at all."""

    def names(self) -> set[str]:
        """Those that are there."""

    def folders(self) -> set[str]:
        """The names of the places one level below that hold something."""

    def clear(self) -> None:
        """Delete them, and all that lies in their folder."""


def notes_at(uri: str) -> Notes:
    """The notes at a place: a folder (a path or file://), or a prefix in a bucket (s3:// or minio://).

    Raises:
        UserError: what `connect` says of the bucket's URI.
    """
    return BucketNotes(uri) if urlsplit(uri).scheme in NAMES else FolderNotes(uri)


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

    def folders(self) -> set[str]:
        return {path.name for path in self.root.glob("*/")} if self.root.is_dir() else set()

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

    def folders(self) -> set[str]:
        return {key.rstrip("/") for key in self._keys(recursive=False, folders=True)}

    def clear(self) -> None:
        for key in self._keys(recursive=True):
            with self.bucket.told():
                self.bucket.client.remove_object(self.bucket.name, self.bucket.key(key))

    def _keys(self, *, recursive: bool, folders: bool = False) -> list[str]:
        """Of what lies here, without the prefix."""
        prefix = self.bucket.key("")
        with self.bucket.told():
            found = self.bucket.client.list_objects(self.bucket.name, prefix=prefix, recursive=recursive)
            return [entry.object_name.removeprefix(prefix) for entry in found if entry.is_dir == folders]
