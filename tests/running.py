"""Run the real `vapo` in a process of its own, look at what it leaves, and at the processes it left."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from vapo.errors import UserError
from vapo.progress import parse
from vapo.recipe import Rollout
from vapo.rollout.installed import check_installed
from vapo.schemas import HISTORY, name_of
from vapo.tables import read_table

ROOT = Path(__file__).resolve().parent.parent
TINY = ("tiny", "--set", "runtime.threads=1")  # two threads on two busy cores are ten times slower than one
SECRET = "not-a-real-secret-5f1c"  # stands in the environment of every run; nothing may write it down
MARK = "VAPO_TEST_MARK"  # environment variable by which the processes of one run are found


def vllm_wants() -> str:
    """Why vLLM cannot run here, with the cure; empty if it can."""
    try:
        check_installed(Rollout(engine="vllm"))
    except UserError as error:
        return str(error)
    return ""


def environment(mark: str = "") -> dict[str, str]:
    """The environment of a run: this source tree, a secret that must not leak, no warm worker of another run."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("VAPO_WORKER", "VAPO_CACHE", "TERM", "COLUMNS")}
    secrets = {"AWS_SECRET_ACCESS_KEY": SECRET, "MINIO_SECRET_KEY": SECRET, "HF_TOKEN": SECRET}
    return {**inherited, **secrets, "PYTHONPATH": str(ROOT), MARK: mark or uuid.uuid4().hex}


def vapo(*arguments: str | Path, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """`vapo ARGUMENTS`, to its end, with more environment variables."""
    command = [sys.executable, "-m", "vapo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, env=environment() | variables)


def assert_one_line(stderr: str, *parts: str) -> None:
    """Standard error is one line that holds all `parts`: no traceback, no empty line."""
    assert stderr.endswith("\n"), repr(stderr)
    assert stderr.count("\n") == 1, stderr
    for part in parts:
        assert part in stderr, stderr


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """The user's input was wrong: exit code 2 and one line that holds all `parts`."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert_one_line(done.stderr, "error: ", *parts)


@dataclass
class Running:
    """A `vapo run` under way, in a process of its own."""

    workdir: Path
    process: subprocess.Popen[str]
    mark: str

    def __post_init__(self) -> None:
        self.begun = time.time() - 0.01

    def wait_for(self, what: Callable[[], Any], seconds: float = 120.0) -> Any:
        """Poll until `what` answers something true."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := what():
                return found
            if self.process.poll() is not None:
                raise AssertionError(f"the run ended by itself: {self.process.communicate()}")
            time.sleep(0.005)
        raise AssertionError(f"waited {seconds} s in vain; the log: {self.log()[-2000:]}")

    def started(self, stage: str) -> None:
        """Wait until the stage has begun."""
        self.wait_for(lambda: re.search(rf'"vapo": "start", "stage": "{stage}"', self.log()))

    def log(self) -> str:
        """The log of this run, not of one before it."""
        logs = [path for path in self.workdir.glob("*/log.txt") if path.stat().st_mtime >= self.begun]
        return logs[0].read_text() if logs else ""

    def worker(self) -> int | None:
        """Process ID of the warm worker."""
        own = (pid for pid in children(self.process.pid) if b"vapo.worker" in _read(Path(f"/proc/{pid}/cmdline")))
        return next(own, None)

    def left(self, seconds: float) -> list[str]:
        """Command lines of this run's processes that are still there after at most so many seconds."""
        deadline = time.monotonic() + seconds
        while (found := marked(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return list(found.values())

    def end(self) -> tuple[int, str, str]:
        """Wait for the end: exit code, standard output, standard error."""
        out, err = self.process.communicate(timeout=300)
        return self.process.returncode, out, err


@contextmanager
def running(workdir: Path, *arguments: str) -> Iterator[Running]:
    """`vapo run ARGUMENTS --workdir WORKDIR`; whatever the test does, nothing of it outlives the block."""
    mark = uuid.uuid4().hex
    scratch = tempfile.mkdtemp(prefix="vapo-test-")  # who is killed leaves its temporary files
    command = [sys.executable, "-m", "vapo", "run", *arguments, "--workdir", str(workdir)]
    environ = {**environment(mark), "TMPDIR": scratch}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)
    try:
        yield Running(workdir, process, mark)
    finally:
        for pid in (process.pid, *marked(mark)) if process.poll() is None else marked(mark):
            kill(pid)
        process.communicate()
        shutil.rmtree(scratch, ignore_errors=True)


def kill(pid: int) -> None:
    """kill -9, if it is still there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def children(pid: int) -> list[int]:
    """Process IDs of the children of a process."""
    return [int(child) for child in _read(Path(f"/proc/{pid}/task/{pid}/children")).split()]


def alive(pid: int) -> bool:
    """Whether a process is there and not only waiting to be reaped."""
    return _read(Path(f"/proc/{pid}/stat")).rpartition(b") ")[2][:1] not in (b"", b"Z")


def marked(mark: str) -> dict[int, str]:
    """Process ID -> command line of all processes that carry a run's mark in their environment."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        if f"{MARK}={mark}".encode() in _read(folder / "environ").split(b"\0"):
            found[int(folder.name)] = _read(folder / "cmdline").replace(b"\0", b" ").decode(errors="replace")[:200]
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the process is gone
        return b""


def folder_of(done: str) -> Path:
    """The run folder that `vapo run` printed."""
    return Path(re.search(r"^report: (.*)$", done, re.MULTILINE)[1]).parent


def counts(done: str) -> tuple[int, int]:
    """(executed, served from the cache) as `vapo run` printed them."""
    executed, cached = re.search(r"(\d+) tasks executed, (\d+) served from the cache", done).groups()
    return int(executed), int(cached)


def events(folder: Path) -> list[dict[str, Any]]:
    """What the stages of a run told, from its log."""
    return events_in((folder / "log.txt").read_text())


def events_in(text: str) -> list[dict[str, Any]]:
    """The events among the lines of a log."""
    return [event for line in text.splitlines() if (event := parse(line))]


def executed(folder: Path) -> Counter[str]:
    """How often each stage was executed in the latest run of a folder."""
    return Counter(event["stage"] for event in events(folder) if event["vapo"] == "end")


def records(workdir: Path) -> dict[Path, dict[str, Any]]:
    """Task folder -> its lineage record."""
    found = sorted((workdir / ".vapo" / "artifacts").rglob("record.json"))
    return {path.parent: json.loads(path.read_text()) for path in found}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def untimed(path: Path) -> str:
    """The rows of a HISTORY without the measured times: only they may differ between reruns."""
    rows = [row for row in read_table(path, HISTORY).to_pylist() if row["name"] != "seconds"]
    return json.dumps(rows)


def products(workdir: Path) -> set[tuple[str, int, str, str, str]]:
    """Everything a working directory's tasks made that must be the same whoever makes it.

    (stage, iteration, purpose, output, identity): a table's identity is its bytes, a checkpoint's the digests of
    its files (the manifest also says where the store is), HISTORY's the rows without times. Metrics hold times, and
    both pages show times.
    """
    found = set()
    for folder, record in records(workdir).items():
        parameters = record["parameters"]
        for name in set(record["outputs"]) - {"metrics", "page", "lineage"}:
            path = folder / name
            if name == "new_history":
                identity = untimed(path)
            elif is_manifest(path):
                files = json.loads(path.read_text())["files"]
                identity = json.dumps(sorted((file["path"], file["sha256"]) for file in files))
            else:
                assert table_name(path), path
                identity = sha256(path)
            found.add((record["stage"], parameters.get("iteration", 0), parameters.get("purpose", ""), name, identity))
    return found


def is_manifest(path: Path) -> bool:
    return path.read_bytes()[:1] == b"{"


def table_name(path: Path) -> str:
    """The name of the table in a file."""
    with pa.memory_map(str(path)) as source:
        return name_of(pa.ipc.open_file(source).schema)


def snapshot(*folders: Path) -> dict[Path, tuple[int, str]]:
    """Every file below the folders with its time of change and digest."""
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, sha256(path)) for path in files}
