"""A store of objects named by their content: what a folder and an S3 bucket have in common, and which of them it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from vapo.errors import UserError
from vapo.store.manifest import StoredFile


class Corrupted(Exception):
    """An object's content is not what its name says."""


@dataclass(frozen=True)
class Kept:
    """An object that a store has, or the rest of one that was never finished; `used` is when it was last written or
    wanted to be (Unix seconds)."""

    name: str  # its sha256; of an unfinished one, another
    bytes: int
    used: float


class ObjectStore(Protocol):
    """Objects by sha256. A write is complete or invisible; what is there already is not written again."""

    def check(self) -> None:
        """Whether objects can be written here.

        Raises:
            UserError: they cannot; says why, and the cure.
        """

    def size(self, entry: StoredFile) -> int | None:
        """Bytes of the object; None: it is not there."""

    def put(self, path: Path, entry: StoredFile) -> bool:
        """Make sure that the object, whose content is in the file at `path`, is there; whether it had to be written."""

    def get(self, entry: StoredFile, target: Path) -> None:
        """Make the object appear at `target`, to be read and never written to, after its content was verified.

        Raises:
            Corrupted: it is not what its name says.
        """

    def address(self, entry: StoredFile) -> str:
        """Where the object lies, for messages."""

    def kept(self) -> Iterator[Kept]:
        """All objects."""

    def remove(self, found: Iterable[Kept]) -> Iterator[Kept]:
        """Take objects away that nothing refers to; yields those that went.

        One that somebody wanted to write since it was listed stays: `put` left it alone because it was there.
        """

    def advice(self) -> str:
        """What a person should know of space that removing does not free; empty: nothing."""


def object_store(uri: str) -> ObjectStore:
    """The store that a URI means: a folder (a path or file://), or a bucket (s3:// or minio://).

    Raises:
        UserError: another scheme, or what its kind of store refuses.
    """
    from vapo.store.folder import FolderStore

    parsed = urlsplit(uri)
    if parsed.scheme in ("s3", "minio"):
        from vapo.store.s3 import S3Store

        return S3Store(uri)
    if parsed.scheme == "file":
        return FolderStore(Path(unquote(parsed.path)))
    if parsed.scheme:
        raise UserError(
            f"store {uri!r}: give a folder, file:///folder, s3://bucket/prefix or minio://bucket/prefix, not "
            f"{parsed.scheme}://"
        )
    return FolderStore(Path(uri))


def name_of(entry: StoredFile) -> str:
    """The object's path in its store, say "objects/9f/9f86d0..."."""
    return f"objects/{entry.sha256[:2]}/{entry.sha256}"
