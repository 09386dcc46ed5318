"""Objects that nothing refers to, taken out of a folder and out of a bucket, while others write there."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pipelines.seaweed import BUCKET
from tests.store.conftest import Place
from vapo.store import object_store, open_checkpoint, s3, save_checkpoint
from vapo.store.folder import FolderStore

FILES = {"config.json": b"{}", "model.safetensors": b"m" * 1000}


def save(root: Path, files: dict[str, bytes], name: str = "a") -> set[str]:
    """A checkpoint in the folder store at root/store; digests of its files."""
    (root / name).mkdir()
    for path, content in files.items():
        (root / name / path).write_bytes(content)
    manifest = save_checkpoint(root / name, root / f"{name}.json", store=str(root / "store"), kind="policy", facts={})
    return {file.sha256 for file in manifest.files}


def age(store: Path, seconds: float) -> None:
    """All objects as if they had been written, and read, so long ago."""
    for path in store.glob("objects/*/*"):
        os.utime(path, (time.time() - seconds,) * 2)


def test_a_folder_lists_what_it_has_and_gives_it_away(tmp_path: Path) -> None:
    names = save(tmp_path, FILES)
    store = FolderStore(tmp_path / "store")
    left = tmp_path / "store" / "objects" / "9f" / ".9f86d0.tmp"  # of a write that was killed
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"half")
    found = {each.name: each for each in store.kept()}
    assert found.keys() == names | {left.name}
    assert {found[name].bytes for name in names} == {2, 1000}
    assert {each.name for each in store.remove(found.values())} == found.keys()
    assert list(store.kept()) == []
    assert list(store.remove(found.values())) == []  # gone already


def test_an_object_that_is_wanted_again_after_it_was_listed_stays(tmp_path: Path) -> None:
    """What is there already is not written again; its time of change, which is in a cache's key, stays as it was."""
    names = save(tmp_path, FILES)
    store = FolderStore(tmp_path / "store")
    age(tmp_path / "store", 1000.0)
    listed = list(store.kept())
    assert all(time.time() - each.used > 900 for each in listed)
    again = save(tmp_path, {"config.json": b"{}"}, "b")
    removed = {each.name for each in store.remove(listed)}
    assert removed == names - again
    (kept,) = store.kept()
    path = tmp_path / "store" / "objects" / kept.name[:2] / kept.name
    assert time.time() - kept.used < 100 < 900 < time.time() - path.stat().st_mtime


def test_a_bucket_lists_what_it_has_and_gives_it_away(place: Place) -> None:
    saved = place.save(FILES)
    store = object_store(place.uri)
    found = {each.name: each for each in store.kept()}
    assert found.keys() == {file.sha256 for file in saved.files}
    assert all(abs(time.time() - each.used) < 100 for each in found.values())
    one = saved.files[0]
    assert [each.name for each in store.remove([found[one.sha256]])] == [one.sha256]
    left = place.keys()
    assert len(left) == len(saved.files) - 1
    assert f"objects/{one.sha256[:2]}/{one.sha256}" not in left
    assert store.advice() == ""


def test_an_old_object_that_is_wanted_again_becomes_young(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = place.save(FILES)
    store = object_store(place.uri)
    listed = list(store.kept())
    time.sleep(1.1)  # S3 counts seconds
    place.save(FILES, "young")
    assert list(store.kept()) == listed
    monkeypatch.setattr(s3, "REFRESH", 0.0)
    before = place.received()
    place.save(FILES, "old")
    assert place.received() - before < 1000  # the server copied it
    assert all(now.used > then.used for now, then in zip(store.kept(), listed, strict=True))
    assert list(store.remove(listed)) == []
    open_checkpoint(saved, place.root / "opened")


def test_a_bucket_with_versions_says_what_frees_the_space(mortal: Place) -> None:
    """In a server of its own: a bucket that had versions once is never again one without."""
    from minio.commonconfig import ENABLED
    from minio.versioningconfig import VersioningConfig

    mortal.server.client().set_bucket_versioning(BUCKET, VersioningConfig(ENABLED))
    assert "lifecycle rule" in object_store(mortal.uri).advice()
