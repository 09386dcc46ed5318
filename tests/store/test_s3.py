"""Checkpoints in a real S3 server: whole or refused, written once, in bounded memory, and through its crashes."""

from __future__ import annotations

import contextlib
import io
import json
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipelines.seaweed import BUCKET
from tests.running import ROOT
from tests.store.conftest import Place
from vapo.errors import UserError
from vapo.progress import parse
from vapo.store import connection, model_only, object_store, open_checkpoint, read_manifest, s3

FILES = {
    "config.json": b"{}",
    "empty": b"",
    "model-1.safetensors": random.Random(1).randbytes(s3.PART + 12345),
    "model-2.safetensors": random.Random(2).randbytes(2 * s3.PART),
    "optimizer/adamw.safetensors": b"moments",
}


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_round_trip(place: Place) -> None:
    """Files of no byte, of some, of exactly two parts, and of a part and a bit."""
    saved = place.save(FILES)
    assert content(open_checkpoint(read_manifest(place.root / "policy.json", "policy"), place.root / "opened")) == FILES
    assert json.loads((place.root / "policy.json").read_text())["store"] == place.uri
    assert place.keys() == {f"objects/{f.sha256[:2]}/{f.sha256}": f.bytes for f in saved.files}


def test_only_what_is_wanted_is_downloaded(place: Place) -> None:
    saved = place.save({"model": b"m" * 1000, "optimizer/state": b"s" * 5000})
    before = place.sent()
    opened = open_checkpoint(saved, place.root / "opened", model_only)
    assert sorted(content(opened)) == ["model"]
    assert 1000 <= place.sent() - before < 3000


def test_minio_uris_read_their_own_variables(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place.save(FILES)
    for ours, theirs in zip(connection.NAMES["minio"], connection.NAMES["s3"], strict=True):
        monkeypatch.setenv(ours, place.server.environment[theirs])
        monkeypatch.delenv(theirs)
    capsys.readouterr()
    place.uri = place.uri.replace("s3://", "minio://")
    assert content(open_checkpoint(place.save(FILES), place.root / "opened")) == FILES
    assert parse(capsys.readouterr().out) == {"vapo": "stored", "files": 5, "new_files": 0, "new_bytes": 0}


# Written once


def test_an_unchanged_policy_is_not_uploaded_again(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """As after value-pretraining, which leaves the policy as it was: the server receives no byte and no write."""
    saved = place.save(FILES)
    received, writes = place.received(), place.writes()
    assert received >= sum(len(data) for data in FILES.values())
    capsys.readouterr()
    assert place.save(FILES, "again") == saved
    assert (place.received(), place.writes()) == (received, writes)
    assert parse(capsys.readouterr().out) == {"vapo": "stored", "files": 5, "new_files": 0, "new_bytes": 0}


def test_only_the_changed_shard_is_uploaded(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.save(FILES)
    received = place.received()
    capsys.readouterr()
    place.save(FILES | {"model-1.safetensors": b"trained"}, "trained")
    assert place.received() - received == len(b"trained")
    assert parse(capsys.readouterr().out) == {"vapo": "stored", "files": 5, "new_files": 1, "new_bytes": 7}


def test_equal_files_of_a_checkpoint_are_uploaded_once(place: Place) -> None:
    received = place.received()
    saved = place.save(dict.fromkeys("abcdef", b"x" * 100_000))
    assert place.received() - received == 100_000
    assert len(content(open_checkpoint(saved, place.root / "opened"))) == 6


# Missing and corrupted


def test_a_missing_shard_is_named_before_anything_is_downloaded(place: Place) -> None:
    saved = place.save(FILES)
    lost = next(f for f in saved.files if f.path == "model-2.safetensors")
    place.server.client().remove_object(BUCKET, f"{place.root.name}/objects/{lost.sha256[:2]}/{lost.sha256}")
    sent = place.sent()
    with pytest.raises(UserError, match=r"policy checkpoint \w+: model-2\.safetensors is missing from the store s3://"):
        open_checkpoint(saved, place.root / "opened")
    assert place.sent() == sent
    assert not (place.root / "opened").exists()


@pytest.mark.parametrize("damage", ["a bit", "the end"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_corrupted_object_is_refused_and_named(
    place: Place, damage: str, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cached:
        monkeypatch.setenv("VAPO_CACHE", str(place.root / "cache"))
    saved = place.save(FILES)
    shard = next(f for f in saved.files if f.path == "model-1.safetensors")
    data = bytearray(FILES[shard.path])
    if damage == "a bit":
        data[s3.PART + 7] ^= 1
    else:
        del data[-1:]
    key = f"{place.root.name}/objects/{shard.sha256[:2]}/{shard.sha256}"
    place.server.client().put_object(BUCKET, key, io.BytesIO(data), len(data))
    with pytest.raises(UserError, match=r"model-1\.safetensors in the store .* was changed") as refused:
        open_checkpoint(saved, place.root / "opened")
    assert f"delete s3://{BUCKET}/{key} and run again with --fresh" in str(refused.value)
    assert not (place.root / "opened" / "model-1.safetensors").exists()
    assert not list((place.root / "cache").glob(f"*/{shard.sha256[:2]}/{shard.sha256}"))


# What the user can cure, in one line


def test_wrong_credentials(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, code in (("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch"), ("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId")):
        monkeypatch.setenv(name, "wrong-but-secret")
        for attempt in (lambda: place.save(FILES), object_store(place.uri).check):
            with pytest.raises(UserError, match=rf"{place.uri}: http://127.0.0.1:\d+ refused the credentials") as error:
                attempt()
            assert code in str(error.value) or "AccessDenied" in str(error.value)
            assert "correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in str(error.value)
            assert "wrong-but-secret" not in str(error.value)
    assert not (place.root / "policy.json").exists()


def test_missing_bucket(place: Place) -> None:
    saved = place.save(FILES)
    place.uri = "s3://no-such-bucket/x"
    for attempt in (
        lambda: place.save(FILES, "other"),
        object_store(place.uri).check,
        lambda: open_checkpoint(type(saved)("policy", place.uri, saved.files), place.root / "opened"),
    ):
        with pytest.raises(UserError, match=r"there is no bucket 'no-such-bucket' at http://127.0.0.1:.*: create it"):
            attempt()
    assert not (place.root / "other.json").exists()


def test_no_server(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(UserError, match=r"no answer from http://127.0.0.1:9, .* \(NewConnectionError\): start the"):
        object_store(place.uri).check()
    assert time.monotonic() - started < 10


def test_checking_leaves_nothing(place: Place) -> None:
    object_store(place.uri).check()
    assert place.keys() == {}
    assert list(place.server.client()._list_multipart_uploads(BUCKET, prefix=place.root.name).uploads) == []


# A server that is killed


def upload(place: Place, size: int) -> tuple[threading.Thread, dict[str, object]]:
    """A checkpoint on its way, of which the server has received a part."""
    found: dict[str, object] = {}
    data = {f"model-{i}": random.Random(i).randbytes(size) for i in range(2)}

    def work() -> None:
        try:
            found["saved"] = place.save(data)
        except UserError as error:
            found["error"] = error

    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + 60
    while not 0 < place.received() < 2 * size:
        assert thread.is_alive(), found
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return thread, found


def test_a_server_that_is_killed_in_mid_upload_and_comes_back(mortal: Place) -> None:
    thread, found = upload(mortal, 24 << 20)
    mortal.server.kill()
    assert thread.is_alive()
    assert not (mortal.root / "policy.json").exists()
    time.sleep(1.0)
    mortal.server.start()
    thread.join(120)
    assert found.keys() == {"saved"}
    opened = open_checkpoint(read_manifest(mortal.root / "policy.json", "policy"), mortal.root / "opened")
    assert content(opened) == content(mortal.root / "policy-files")


def test_a_server_that_stays_away_is_one_line_and_nothing_half_written(
    mortal: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SLOWEST", 0.2)
    thread, found = upload(mortal, 24 << 20)
    mortal.server.kill()
    killed = time.monotonic()
    thread.join(60)
    assert time.monotonic() - killed < 30
    assert found.keys() == {"error"}
    assert f"no answer from {mortal.server.environment['AWS_ENDPOINT_URL']}" in str(found["error"])
    assert "\n" not in str(found["error"])
    assert not (mortal.root / "policy.json").exists()
    mortal.server.start()
    whole = mortal.keys()  # the first file may have been all there
    assert len(whole) < 2
    assert set(whole.values()) <= {24 << 20}
    saved = mortal.save({p.name: p.read_bytes() for p in (mortal.root / "policy-files").iterdir()})
    assert set(mortal.keys().values()) == {f.bytes for f in saved.files}


# Memory


def test_memory_is_bounded_whatever_the_size(place: Place) -> None:
    """224 MiB in two shards, up and down, in a process of its own: all of it stays below 256 MB."""
    block = random.Random(3).randbytes(1 << 20)
    (place.root / "big").mkdir()
    for shard in "ab":
        with (place.root / "big" / shard).open("wb") as file:
            for number in range(112):
                file.write(f"{shard}{number}".encode() + block)
    script = """if True:
        import re, sys
        from pathlib import Path
        from vapo.store import open_checkpoint, save_checkpoint
        root = Path(sys.argv[1])
        def peak(): # ru_maxrss would begin with the parent's
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
        before = peak()
        saved = save_checkpoint(root / "big", root / "m.json", store=sys.argv[2], kind="policy", facts={})
        up = peak()
        open_checkpoint(saved, root / "opened")
        print(before, up, peak())
    """
    command = [sys.executable, "-c", script, str(place.root), place.uri]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    before, up, both = map(int, done.stdout.splitlines()[-1].split())
    assert 30e6 < before < up <= both < 256e6, (before, up, both)
    for shard in "ab":
        assert (place.root / "opened" / shard).read_bytes() == (place.root / "big" / shard).read_bytes()


# A connection that breaks


class CuttingProxy:
    """Between a client and the real server: the first `cuts` answers with a body end after 1 MiB of it."""

    def __init__(self, port: int, cuts: int) -> None:
        self.upstream, self.cuts, self.listener = ("127.0.0.1", port), cuts, socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:  # closed: the test is over
                return
            server = socket.create_connection(self.upstream)
            threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        passed = 0
        with source, target, contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
                passed += len(data)
                if answers and passed > 1 << 20 and self.cuts > 0:
                    self.cuts -= 1
                    for end in (source, target):
                        end.shutdown(socket.SHUT_RDWR)


def test_a_download_that_breaks_off_goes_on_from_there(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = place.save(FILES)
    proxy = CuttingProxy(place.server.ports["s3.port"], cuts=5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    with proxy.listener:
        assert content(open_checkpoint(saved, place.root / "opened")) == FILES
    assert proxy.cuts == 0


def test_a_download_that_always_breaks_off_is_one_line(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = place.save(FILES)
    proxy = CuttingProxy(place.server.ports["s3.port"], cuts=10**6)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    with proxy.listener, pytest.raises(UserError, match=f"no answer from {proxy.url}, tried again and again"):
        open_checkpoint(saved, place.root / "opened")
    assert not list((place.root / "opened").glob("*model*"))
