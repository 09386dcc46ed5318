"""A checkpoint's manifest: what it is, its files with size and sha256, and the store that holds them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vapo.errors import UserError
from vapo.tables import write_text

FORMAT = 1
OPTIMIZER = "optimizer/"  # files under this prefix are training state, not the model


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class StoredFile:
    """One file of a checkpoint, say ("model.safetensors", "9f86d0...", 450328)."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """A checkpoint: what it is, its files, and facts that readers check."""

    kind: str  # "policy" or "critic"
    store: str  # where the objects are: a folder, or a file://, s3:// or minio:// URI
    files: tuple[StoredFile, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Identity of the model: of its weights, configuration and tokenizer, not of the optimiser's state."""
        lines = sorted(f"{f.path} {f.sha256}" for f in self.files if not f.path.startswith(OPTIMIZER))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def __str__(self) -> str:
        """As messages name it, say "policy checkpoint 9f86d081884c"."""
        return f"{self.kind} checkpoint {self.digest[:12]}"


def write_manifest(path: Path, kind: str, store: str, files: Sequence[StoredFile], facts: dict[str, Any]) -> Manifest:
    """Write a checkpoint's manifest, last of all and atomically: with it the checkpoint begins to exist.

    Args:
        files: what `store_files` returned, of every rank. Equal files of several ranks are one.
    """
    distinct = sorted(set(files), key=lambda file: file.path)
    assert len({file.path for file in distinct}) == len(distinct), "ranks stored different files by the same name"
    saved = Manifest(kind, store, tuple(distinct), facts)
    document = {
        "format": FORMAT,
        "kind": kind,
        "digest": saved.digest,
        "store": store,
        "files": [vars(file) for file in saved.files],
        "facts": facts,
    }
    write_text(path, json.dumps(document, indent=1, sort_keys=True) + "\n")
    return saved


def read_manifest(path: Path, kind: str) -> Manifest:
    """Read a manifest and check that it is one of `kind`.

    Raises:
        UserError: no manifest, or a checkpoint of another kind or format.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise UserError(f"{path}: checkpoint format: expected {FORMAT}, found {data['format']}")
        found = Manifest(
            data["kind"], data["store"], tuple(StoredFile(**entry) for entry in data["files"]), data["facts"]
        )
    except FileNotFoundError:
        raise UserError(f"{path}: expected a {kind} checkpoint, found no file: run the stage that writes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a checkpoint manifest ({error!r}): run the stage that writes it again") from None
    if found.kind != kind:
        raise UserError(f"{path}: expected a {kind} checkpoint, found a {found.kind} checkpoint")
    return found
