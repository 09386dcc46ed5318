"""The store: content is kept once, a checkpoint is whole or refused, and its identity is the model's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vapo.errors import UserError
from vapo.store import (
    Manifest,
    StoredFile,
    model_only,
    open_checkpoint,
    read_manifest,
    save_checkpoint,
    sha256_of,
    store_files,
    write_manifest,
)

FILES = {"config.json": b"{}", "model.safetensors": b"weights", "optimizer/adamw.safetensors": b"moments"}


def save(root: Path, name: str = "policy", files: dict[str, bytes] = FILES, store: str = "") -> Manifest:
    """A checkpoint of `files`; its manifest is root/name.json and its store root/store."""
    folder = root / f"{name}-files"
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return save_checkpoint(
        folder, root / f"{name}.json", store=store or str(root / "store"), kind="policy", facts={"steps": 3}
    )


def objects(root: Path) -> dict[str, Path]:
    return {p.name: p for p in (root / "store" / "objects").rglob("*") if p.is_file()}


def test_round_trip(tmp_path: Path) -> None:
    saved = save(tmp_path)
    found = read_manifest(tmp_path / "policy.json", "policy")
    assert found == saved
    assert found.facts == {"steps": 3}
    assert {f.path: f.bytes for f in found.files} == {path: len(content) for path, content in FILES.items()}
    opened = open_checkpoint(found, tmp_path / "opened")
    assert {p.relative_to(opened).as_posix(): p.read_bytes() for p in opened.rglob("*") if p.is_file()} == FILES


def test_only_what_is_wanted_is_opened(tmp_path: Path) -> None:
    opened = open_checkpoint(save(tmp_path), tmp_path / "opened", model_only)
    assert sorted(p.name for p in opened.iterdir()) == ["config.json", "model.safetensors"]


def test_the_same_content_is_stored_once(tmp_path: Path) -> None:
    save(tmp_path, "one", {"a": b"same", "b": b"same", "c": b"other"})
    save(tmp_path, "two", {"d": b"same"})
    assert len(objects(tmp_path)) == 2


def test_an_unchanged_file_is_not_written_again(tmp_path: Path) -> None:
    save(tmp_path, "one")
    before = {name: (p.stat().st_ino, p.stat().st_mtime_ns) for name, p in objects(tmp_path).items()}
    save(tmp_path, "two", FILES | {"model.safetensors": b"new weights"})
    after = {name: (p.stat().st_ino, p.stat().st_mtime_ns) for name, p in objects(tmp_path).items()}
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 1


def test_saving_twice_gives_the_same_manifest(tmp_path: Path) -> None:
    save(tmp_path)
    first = (tmp_path / "policy.json").read_bytes()
    save(tmp_path)
    assert (tmp_path / "policy.json").read_bytes() == first


def test_an_object_lies_where_its_content_says(tmp_path: Path) -> None:
    save(tmp_path)
    for name, path in objects(tmp_path).items():
        assert sha256_of(path) == name


def test_the_digest_is_the_models(tmp_path: Path) -> None:
    """The optimiser's state, the facts and the store are not part of it; every other file, and its name, is."""
    digest = save(tmp_path).digest
    assert save(tmp_path, "a", FILES | {"optimizer/adamw.safetensors": b"later"}).digest == digest
    assert save(tmp_path, "b", FILES, store=str(tmp_path / "elsewhere")).digest == digest
    assert save(tmp_path, "c", FILES | {"model.safetensors": b"later"}).digest != digest
    assert save(tmp_path, "d", FILES | {"tokenizer.json": b"{}"}).digest != digest
    renamed = {"config.json": b"{}", "model-1.safetensors": b"weights"}
    assert save(tmp_path, "e", renamed).digest != digest
    assert json.loads((tmp_path / "policy.json").read_text())["digest"] == digest


def test_a_missing_object_is_named(tmp_path: Path) -> None:
    saved = save(tmp_path)
    objects(tmp_path)[saved.files[1].sha256].unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing from the store .*--fresh"):
        open_checkpoint(saved, tmp_path / "opened")


@pytest.mark.parametrize("content", [b"weightz", b"", b"weights and more"])
def test_a_changed_object_is_named(tmp_path: Path, content: bytes) -> None:
    saved = save(tmp_path)
    damaged = objects(tmp_path)[saved.files[1].sha256]
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors .* was changed since it was written") as error:
        open_checkpoint(saved, tmp_path / "opened")
    assert str(damaged) in str(error.value)
    open_checkpoint(saved, tmp_path / "unharmed", lambda path: path == "config.json")


def test_a_failed_save_leaves_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file stands where the store should be")
    with pytest.raises(OSError, match="store"):
        save(tmp_path)
    assert not (tmp_path / "policy.json").exists()


def test_another_kind(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(UserError, match=r"policy\.json: expected a critic checkpoint, found a policy checkpoint"):
        read_manifest(tmp_path / "policy.json", "critic")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a checkpoint manifest"),
        (b"\xff\xfe", "not a checkpoint manifest"),
        (b"[]", "not a checkpoint manifest"),
        (b"{}", "not a checkpoint manifest"),
        (b'{"format": 1, "kind": "policy", "store": "s", "files": [{"x": 1}], "facts": {}}', "not a checkpoint"),
        (b'{"format": 99}', "checkpoint format: expected 1, found 99"),
    ],
)
def test_a_damaged_manifest(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        read_manifest(path, "policy")
    assert str(path) in str(error.value)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a policy checkpoint, found no file: run the stage"):
        read_manifest(tmp_path / "m.json", "policy")


def test_a_file_uri_is_a_folder(tmp_path: Path) -> None:
    root = tmp_path / "a place"
    save(tmp_path, store=root.as_uri())
    assert (root / "objects").is_dir()
    assert open_checkpoint(read_manifest(tmp_path / "policy.json", "policy"), tmp_path / "opened").is_dir()


def test_other_stores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="store 'https://host/x': give a folder, file:///folder, s3://bucket/prefix or"):
        save(tmp_path, store="https://host/x")
    assert not (tmp_path / "policy.json").exists()


def test_ranks_store_their_own_files_and_one_writes_the_manifest(tmp_path: Path) -> None:
    """As training over several processes does: until the manifest is written there is no checkpoint."""
    whole = {"config.json": b"{}", "optimizer/rank-0.safetensors": b"zero", "optimizer/rank-1.safetensors": b"one"}
    stored = []
    for rank, names in enumerate((("config.json", "optimizer/rank-0.safetensors"), sorted(whole)[::2])):
        for name in names:
            path = tmp_path / f"rank-{rank}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(whole[name])
        stored += store_files(tmp_path / f"rank-{rank}", str(tmp_path / "store"))
    assert len(stored) == 4  # both have config.json
    with pytest.raises(UserError, match="found no file"):
        read_manifest(tmp_path / "m.json", "policy")
    write_manifest(tmp_path / "m.json", "policy", str(tmp_path / "store"), stored, {"steps": 1})
    opened = open_checkpoint(read_manifest(tmp_path / "m.json", "policy"), tmp_path / "opened")
    assert {p.relative_to(opened).as_posix(): p.read_bytes() for p in opened.rglob("*") if p.is_file()} == whole


def test_ranks_that_disagree_on_a_file_are_a_fault_of_ours(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="different files by the same name"):
        write_manifest(tmp_path / "m", "policy", "s", [StoredFile("a", "1", 1), StoredFile("a", "2", 1)], {})
    assert not (tmp_path / "m").exists()
