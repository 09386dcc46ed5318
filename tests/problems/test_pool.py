"""The grading workers: order, limits, replacement, and that nothing outlives the one who asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vapo.problems.pool import Job, Outcome, Pool, PoolRefused

GRADER = """
import os, signal, socket, subprocess, sys, time
state = []
def grade(response, truth):
    if response == "spin":
        while True: pass
    if response == "power":
        return 9**9**9 > 0
    if response == "sleep":
        time.sleep(1000)
    if response == "die":
        os._exit(0)
    if response == "crash":
        os.abort()
    if response == "exit":
        sys.exit(3)
    if response == "memory":
        return len(b"x" * (1 << 34)) > 0
    if response == "hoard":
        state.append(b"x" * (80 << 20))
        return len(state) == 1
    if response == "deep":
        return grade(response, truth)
    if response == "socket":
        socket.socket()
    if response == "raw socket":
        import ctypes
        libc = ctypes.CDLL(None)
        return 1.0 if libc.socket(2, 1, 0) < 0 else 0.0
    if response == "subprocess":
        subprocess.run(["true"])
    if response == "fork":
        os.fork()
    if response == "system":
        os.system("true")
    if response == "kill":
        os.kill(os.getppid(), signal.SIGKILL)
    if response == "write":
        open("mark", "w").write("x")
    if response == "remove":
        os.remove(truth)
    if response == "print":
        print('{"id": 0, "value": true}')
    if response == "pid":
        return 1.0
    return response == truth
"""


@pytest.fixture
def grader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "mine.py").write_text(GRADER)
    monkeypatch.chdir(tmp_path)
    return "mine.py:grade"


def pool(grader: str, workers: int = 2, cpu: float = 0.4) -> Pool:
    return Pool(workers=workers, cpu=cpu, memory=256 << 20, setup=[Job("vapo.problems.custom:load", (grader,))])


def job(grader: str, response: str, truth: str = "7") -> Job:
    return Job("vapo.problems.custom:judge", (grader, response, truth))


def test_outcomes_are_in_order_and_survive_what_kills_a_worker(grader: str) -> None:
    """Good ones between bad ones, more than a chunk of them; every bad one is blamed, and alone."""
    bad = {
        "spin": "time_out",
        "power": "time_out",
        "sleep": "time_out",
        "die": "error",
        "crash": "error",
        "exit": "error",
        "memory": "error",
        "deep": "error",
    }
    asked: list[tuple[str, str]] = []
    for response, failure in bad.items():
        asked += [(response, failure), *([("7", ""), ("8", "")] * 12)]
    with pool(grader) as workers:
        found = list(workers.map([job(grader, response) for response, _ in asked]))
        assert [outcome.failure for outcome in found] == [failure for _, failure in asked]
        assert [o.value for o in found if not o.failure] == [1.0, 0.0] * 12 * len(bad)
        assert list(workers.map([job(grader, "7")])) == [Outcome(1.0)]  # and it goes on


def test_a_cpu_limit_is_cpu_and_a_wait_ends_by_the_clock(grader: str) -> None:
    with pool(grader, workers=1) as workers:
        spun, slept = list(workers.map([job(grader, "spin"), job(grader, "sleep")]))
    assert (spun.detail, slept.detail) == ("CPU time", "the clock")


@pytest.mark.parametrize("act", ["socket", "subprocess", "fork", "system", "kill", "write", "remove"])
def test_what_a_worker_may_not_do(grader: str, act: str, tmp_path: Path) -> None:
    with pool(grader, workers=1) as workers:
        found = next(workers.map([job(grader, act, str(tmp_path / "mine.py"))]))
    assert found.failure == "error"
    assert "a grading worker has no network, starts no process and writes no file" in found.detail
    assert (tmp_path / "mine.py").exists()
    assert not (tmp_path / "mark").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's filter")
def test_the_kernel_refuses_sockets_beneath_python(grader: str) -> None:
    with pool(grader, workers=1) as workers:
        assert list(workers.map([job(grader, "raw socket")])) == [Outcome(1.0)]


def test_printing_changes_no_outcome(grader: str) -> None:
    with pool(grader, workers=1) as workers:
        assert [o.value for o in workers.map([job(grader, "print"), job(grader, "7")])] == [0.0, 1.0]


def test_a_worker_that_has_grown_makes_room(grader: str) -> None:
    """80 MiB stay with each answer, of 256: no later answer pays for earlier ones."""
    with pool(grader, workers=1) as workers:
        found = list(workers.map([job(grader, "hoard", str(i)) for i in range(12)]))
    assert {outcome.failure for outcome in found} == {""}
    assert sum(outcome.value for outcome in found) >= 6  # a fresh worker after every second one


def test_a_grader_that_cannot_be_loaded(grader: str) -> None:
    with pytest.raises(PoolRefused, match="has no function 'nothing'"), pool("mine.py:nothing") as workers:
        list(workers.map([job(grader, "7")]))


def test_only_our_functions_run(grader: str) -> None:
    with pool(grader, workers=1) as workers:
        assert "only functions of vapo.problems" in next(workers.map([Job("os:getcwd")])).detail


def test_no_worker_is_left_when_the_pool_closes(grader: str) -> None:
    with pool(grader) as workers:
        list(workers.map([job(grader, "7")]))
        running = tree(workers.process.pid)
        assert len(running) == 3  # the server and its two workers
    assert gone(running)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_the_stage(grader: str, signal_number: int, tmp_path: Path) -> None:
    """Killed in the middle of an answer that never ends."""
    (tmp_path / "stage.py").write_text(
        "from vapo.problems.pool import Job, Pool\n"
        f"workers = Pool(workers=2, cpu=60, memory=1 << 28, setup=[Job('vapo.problems.custom:load', ({grader!r},))])\n"
        f"jobs = [Job('vapo.problems.custom:judge', ({grader!r}, r, '7')) for r in ('7', 'spin', 'spin')]\n"
        "for outcome in workers.map(jobs):\n    print(workers.process.pid, flush=True)\n"
    )
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *sys.path])
    stage = subprocess.Popen(
        [sys.executable, "stage.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
    )
    assert stage.stdout is not None
    server = int(stage.stdout.readline())
    running = tree(server)
    assert len(running) == 3
    stage.send_signal(signal_number)
    stage.wait(20)
    stage.stdout.close()
    assert gone(running)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
def test_no_worker_outlives_its_server(grader: str) -> None:
    """In the middle of an answer that never ends, so that a closed pipe tells it nothing."""
    with pool(grader, workers=1, cpu=60) as workers:
        outcomes = workers.map([job(grader, response) for response in ("7", "spin", "7", "7")])
        next(outcomes)
        running = tree(workers.process.pid)
        os.kill(workers.process.pid, signal.SIGKILL)
        with pytest.raises(PoolRefused, match="ended"):
            next(outcomes)
        assert gone(running[1:])


def tree(server: int) -> list[int]:
    """The server and its children."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    return [server, *map(int, children)]


def gone(processes: list[int], patience: float = 10.0) -> bool:
    """Whether all of them end."""
    deadline = time.monotonic() + patience
    while any(alive(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(autouse=True)
def _no_core_files() -> Iterator[None]:
    yield
    assert not list(Path.cwd().glob("core*"))
