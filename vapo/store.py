"""Where bytes live: checkpoints are small manifests, their files content-addressed objects in a folder.

A manifest names every file with its size, sha256 and the store that holds it, and is written last: a reader sees a
whole checkpoint or none. Files that did not change are never stored twice.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from vapo.errors import UserError
from vapo.tables import atomic_path, write_text

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
    store: str  # where the objects are: a folder or a file:// URI
    files: tuple[StoredFile, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Identity of the model: of its weights, configuration and tokenizer, not of the optimiser's state."""
        lines = sorted(f"{f.path} {f.sha256}" for f in self.files if not f.path.startswith(OPTIMIZER))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def save_checkpoint(folder: Path, manifest: Path, *, store: str, kind: str, facts: dict[str, Any]) -> Manifest:
    """Put every file under `folder` into the store and write the manifest last."""
    root = _folder_of(store)
    files = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest = sha256_of(path)
        target = _object(root, digest)
        if not target.is_file():
            with atomic_path(target) as beside:
                shutil.copyfile(path, beside)
        files.append(StoredFile(path.relative_to(folder).as_posix(), digest, path.stat().st_size))
    saved = Manifest(kind, store, tuple(files), facts)
    document = {
        "format": FORMAT,
        "kind": kind,
        "digest": saved.digest,
        "store": store,
        "files": [vars(f) for f in files],
        "facts": facts,
    }
    write_text(manifest, json.dumps(document, indent=1, sort_keys=True) + "\n")
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


def open_checkpoint(manifest: Manifest, into: Path, want: Callable[[str], bool] = lambda path: True) -> Path:
    """Make the wanted files of a checkpoint appear under `into`, each verified; returns `into`.

    The files are links to the store's objects: read them, never write to them.

    Raises:
        UserError: an object is missing or its content is not what the manifest says; names the file.
    """
    root = _folder_of(manifest.store)
    for entry in manifest.files:
        if not want(entry.path):
            continue
        source = _object(root, entry.sha256)
        if not source.is_file():
            raise UserError(
                f"{manifest.kind} checkpoint {manifest.digest[:12]}: {entry.path} is missing from the store "
                f"{manifest.store}: run again with --fresh to make it anew"
            )
        if sha256_of(source) != entry.sha256:
            raise UserError(
                f"{manifest.kind} checkpoint {manifest.digest[:12]}: {entry.path} in the store {manifest.store} was "
                f"changed since it was written: delete {source} and run again with --fresh"
            )
        target = into / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source.resolve())
    return into


def model_only(path: str) -> bool:
    """Whether a checkpoint's file belongs to the model rather than to the training state."""
    return not path.startswith(OPTIMIZER)


def _object(root: Path, digest: str) -> Path:
    return root / "objects" / digest[:2] / digest


def _folder_of(store: str) -> Path:
    parsed = urlparse(store)
    if parsed.scheme == "file":
        return Path(unquote(parsed.path))
    if parsed.scheme:
        raise UserError(f"store {store!r}: only folders and file:// are supported; give a folder")
    return Path(store)
