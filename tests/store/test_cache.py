"""The cache: within its limit, the least recently used first out, one download for all processes, all verified."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.running import ROOT
from tests.store.conftest import Place
from vapo.errors import UserError
from vapo.store import StoredFile, cache, open_checkpoint
from vapo.store.cache import Cache, cache_of


class World:
    """A cache, and a place far away from which objects are fetched and counted."""

    def __init__(self, root: Path, limit: int) -> None:
        self.root, self.cache, self.far, self.fetched = root, Cache(root / "cache", limit), {}, []

    def entry(self, content: bytes) -> StoredFile:
        digest = hashlib.sha256(content).hexdigest()
        self.far[digest] = content
        return StoredFile("model", digest, len(content))

    def fetch(self, entry: StoredFile, target: Path) -> None:
        self.fetched.append(entry.sha256)
        target.write_bytes(self.far[entry.sha256])

    def get(self, content: bytes) -> Path:
        """The object as a file of its own."""
        target = self.root / f"opened-{len(list(self.root.iterdir()))}"
        self.cache.get(self.entry(content), target, self.fetch)
        assert target.read_bytes() == content
        return target

    def kept(self) -> set[bytes]:
        return {p.read_bytes() for p in (self.cache.folder / "objects").glob("*/*")}

    def used(self) -> int:
        return sum(p.stat().st_size for p in self.cache.folder.rglob("*") if p.is_file())


A, B, C, D = (letter * 100 for letter in (b"a", b"b", b"c", b"d"))


def test_a_second_read_fetches_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, 1000)
    assert world.get(A).stat().st_ino == world.get(A).stat().st_ino
    assert len(world.fetched) == 1


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    world = World(tmp_path, 300)
    for content in (A, B, C, A, D):
        world.get(content)
    assert world.kept() == {A, C, D}
    assert world.used() == 300
    world.get(B)
    assert world.kept() == {A, B, D}


def test_what_is_in_use_survives_its_eviction(tmp_path: Path) -> None:
    world = World(tmp_path, 100)
    opened = world.get(A)
    world.get(B)
    assert world.kept() == {B}
    assert opened.read_bytes() == A


@pytest.mark.parametrize("limit", [99, 1])
def test_what_is_larger_than_the_limit_is_not_kept(tmp_path: Path, limit: int) -> None:
    world = World(tmp_path, limit)
    world.get(A)
    world.get(A)
    assert (len(world.fetched), world.kept()) == (2, set())


def test_a_damaged_entry_is_fetched_again(tmp_path: Path) -> None:
    world = World(tmp_path, 1000)
    world.get(A)
    kept = next((world.cache.folder / "objects").glob("*/*"))
    kept.unlink()
    kept.write_bytes(B)
    world.get(A)
    assert (len(world.fetched), world.kept()) == (2, {A})


def test_a_failed_download_leaves_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, 1000)

    def breaks(entry: StoredFile, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError("gone")

    for limit in (1000, 10):
        world.cache.limit = limit
        with pytest.raises(OSError, match="gone"):
            world.cache.get(world.entry(A), tmp_path / "opened", breaks)
        assert world.used() == 0
        assert not list(tmp_path.glob("*opened*"))


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    world = World(tmp_path, 250)
    left = world.cache.folder / "partial" / world.entry(B).sha256
    left.write_bytes(b"b" * 200)
    world.get(A)
    assert not left.exists()
    assert world.kept() == {A}


def test_what_another_process_is_fetching_counts_and_stays(tmp_path: Path) -> None:
    world, arriving, go = World(tmp_path, 150), threading.Event(), threading.Event()

    def slowly(entry: StoredFile, target: Path) -> None:
        arriving.set()
        assert go.wait(10)
        world.fetch(entry, target)

    thread = threading.Thread(target=world.cache.get, args=(world.entry(A), tmp_path / "first", slowly))
    thread.start()
    assert arriving.wait(10)
    world.get(B)  # there is no room: it passes by
    assert world.kept() == set()
    go.set()
    thread.join()
    assert world.kept() == {A}


def test_another_file_system_means_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        if not source.exists():
            raise FileNotFoundError(source)
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(cache.os, "link", link)
    world = World(tmp_path, 100)
    first, second = world.get(A), world.get(A)
    assert len(world.fetched) == 1
    assert len({path.stat().st_ino for path in (first, second)}) == 2
    world.get(B)
    assert first.read_bytes() == second.read_bytes() == A


def test_the_environment_says_where_and_how_much(tmp_path: Path) -> None:
    assert cache_of({}) is None
    assert cache_of({"VAPO_CACHE": str(tmp_path / "c"), "VAPO_CACHE_BYTES": "0"}) is None
    found = cache_of({"VAPO_CACHE": str(tmp_path / "c"), "VAPO_CACHE_BYTES": "123"})
    assert found is not None
    assert (found.folder, found.limit) == (tmp_path / "c", 123)
    with pytest.raises(UserError, match="VAPO_CACHE_BYTES=20GB: expected a number of bytes, say 3"):
        cache_of({"VAPO_CACHE_BYTES": "20GB"})


READER = """if True:
    import sys
    from pathlib import Path
    from vapo.store import open_checkpoint, read_manifest
    manifest, into, times = read_manifest(Path(sys.argv[1]), "policy"), Path(sys.argv[2]), int(sys.argv[3])
    sys.stdin.read(1)
    for number in range(times):
        folder = open_checkpoint(manifest, into / str(number))
        for file in manifest.files:
            assert (folder / file.path).read_bytes() == file.path.encode() * 100_000, file
"""


def readers(place: Place, times: int) -> None:
    """Four processes that read a checkpoint at the same time, through the environment's cache."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", READER, str(place.root / "policy.json"), str(place.root / f"r{n}"), str(times)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
        )
        for n in range(4)
    ]
    for process in processes:
        process.stdin.write(b"\n")
        process.stdin.close()
    for process in processes:
        assert process.wait(60) == 0, process.stderr.read()


def test_concurrent_readers_download_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAPO_CACHE", str(place.root / "cache"))
    saved = place.save({name: name.encode() * 100_000 for name in ("alpha", "beta", "gamma")})
    before, total = place.sent(), sum(file.bytes for file in saved.files)
    readers(place, 1)
    assert total <= place.sent() - before < 1.1 * total


def test_concurrent_readers_through_a_cache_that_is_too_small(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """They evict from one another all the time, and each has what it opened."""
    limit = 1_200_000
    monkeypatch.setenv("VAPO_CACHE", str(place.root / "cache"))
    monkeypatch.setenv("VAPO_CACHE_BYTES", str(limit))
    place.save({name: name.encode() * 100_000 for name in ("alpha", "beta", "gamma", "delta", "epsilon")})
    readers(place, 5)
    files = [path.stat().st_size for path in (place.root / "cache").rglob("*") if path.is_file()]
    assert 0 < sum(files) <= limit


def test_opened_files_are_read_back_whole_after_the_cache_is_gone(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAPO_CACHE", str(place.root / "cache"))
    opened = open_checkpoint(place.save({"model": A}), place.root / "opened")
    subprocess.run(["rm", "-r", place.root / "cache"], check=True)
    assert (opened / "model").read_bytes() == A
