"""The warm worker: a child per job that speaks to whoever asked, and nobody who outlives whom it works for."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.running import alive, children, environment, events_in, kill
from vapo import worker
from vapo.recipe import BaseModelSection, Problems
from vapo.stage import Job, execute
from vapo.store import read_manifest

pytest.importorskip("torch")
SERVE = (sys.executable, "-m", "vapo.worker")
ASK = """
import json, sys
from vapo import worker
print(json.dumps(worker.submit(sys.argv[1], json.loads(sys.argv[2]))))
"""
SMALL = BaseModelSection(hidden_size=8, feed_forward=16, steps=40, batch_tokens=200, curriculum_loss=10.0)
ENDLESS = SMALL.model_copy(update={"steps": 10_000_000})


def wait_until(what: Callable[[], Any], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if what():
            return True
        time.sleep(0.01)
    return bool(what())


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[bytes]]:
    """A worker of this process; its address is its last argument but one."""
    address = tmp_path_factory.mktemp("worker") / "w"
    worker.starting(str(address)).touch()
    process = subprocess.Popen([*SERVE, str(address), str(os.getpid())], env={**environment(), "OMP_NUM_THREADS": "1"})
    assert worker.ready(str(address))
    assert not worker.starting(str(address)).exists()
    yield process
    assert process.poll() is None  # no job of these tests took it down
    for pid in (*children(process.pid), process.pid):
        kill(pid)
    process.wait()


@pytest.fixture
def address(serving: subprocess.Popen[bytes]) -> str:
    return serving.args[-2]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("problems")
    section = Problems(train=8, heldout=4, examples=40, min_steps=3, max_steps=4).model_dump_json()
    names = ("train_prompts", "heldout_prompts", "examples", "metrics")
    outputs = {name: str(folder / name) for name in names}
    execute(asdict(Job("problems", section, {"seed": 0}, {}, outputs, time.time())))
    return folder / "examples"


def job(folder: Path, examples: Path, section: BaseModelSection = SMALL) -> dict[str, Any]:
    """Train a base model."""
    folder.mkdir(exist_ok=True)
    inputs = {"examples": {"path": str(examples), "sha256": ""}}
    outputs = {name: str(folder / name) for name in ("policy", "metrics")}
    parameters = {"seed": 0, "store": str(folder / "store")}
    return asdict(Job("base_model", section.model_dump_json(), parameters, inputs, outputs, time.time()))


@contextmanager
def asking(address: str, what: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """A process that submits a job, as a stage's process does; it does not outlive the block."""
    command = [sys.executable, "-c", ASK, address, json.dumps(what)]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    try:
        yield client
    finally:
        client.kill()
        client.wait()
        for pipe in (client.stdout, client.stderr):
            assert pipe is not None
            pipe.close()  # not read to its end: a child that lives on has it too


def ask(address: str, what: dict[str, Any]) -> tuple[int, str, str]:
    """Submit a job from another process: its exit code, standard output and error."""
    with asking(address, what) as client:
        out, err = client.communicate(timeout=60)
        return client.returncode, out, err


def child_at_work(serving: subprocess.Popen[bytes], client: subprocess.Popen[str]) -> int:
    """The process ID of the child that does the client's job, once it has begun."""
    assert client.stdout is not None
    assert '"start"' in client.stdout.readline()
    (child,) = children(serving.pid)
    return child


def test_answer_is_the_metadata_and_output_goes_to_who_asked(address: str, examples: Path, tmp_path: Path) -> None:
    status, out, err = ask(address, job(tmp_path, examples))
    assert status == 0, err
    events = events_in(out)
    assert [e["vapo"] for e in events if e["vapo"] != "progress"] == ["start", "stored", "end"]
    assert {e["stage"] for e in events if "stage" in e} == {"base_model"}
    answer = json.loads(out.splitlines()[-1])
    assert set(answer) == {"policy", "metrics"}
    record = json.loads((tmp_path / "record.json").read_text())
    assert answer["policy"]["sha256"] == record["outputs"]["policy"]["sha256"]
    assert answer["metrics"]["train_loss"] == record["metrics"]["train_loss"]


def test_what_one_job_did_does_not_reach_the_next(address: str, examples: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        worker.submit(address, job(tmp_path / name, examples))
    first, second = (read_manifest(tmp_path / name / "policy", "policy").digest for name in ("first", "second"))
    assert first == second


def test_every_job_has_a_child_of_its_own_that_leaves(
    serving: subprocess.Popen[bytes], address: str, examples: Path, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        worker.submit(address, job(tmp_path / name, examples))
    assert wait_until(lambda: not children(serving.pid), 5.0)


def test_failing_job_raises_and_the_worker_goes_on(address: str, examples: Path, tmp_path: Path) -> None:
    status, out, err = ask(address, job(tmp_path, tmp_path / "nothing"))
    assert status == 1
    assert "RuntimeError: stage base_model failed" in err
    assert "UserError: input examples" in err  # the child's own traceback, on the standard error of who asked
    errors = [event for event in events_in(out) if event["vapo"] == "error"]
    assert [event["user"] for event in errors] == [True]
    assert set(worker.submit(address, job(tmp_path, examples))) == {"policy", "metrics"}


def test_a_job_longer_than_a_packet_arrives_whole(address: str, examples: Path, tmp_path: Path) -> None:
    long = job(tmp_path, examples)
    long["parameters"]["unknown"] = "x" * 300_000
    with pytest.raises(RuntimeError, match="stage base_model failed"):
        worker.submit(address, long)
    assert set(worker.submit(address, job(tmp_path, examples))) == {"policy", "metrics"}


def test_a_client_that_dies_takes_its_child_with_it(
    serving: subprocess.Popen[bytes], address: str, examples: Path, tmp_path: Path
) -> None:
    assert wait_until(lambda: not children(serving.pid), 5.0)
    with asking(address, job(tmp_path, examples, ENDLESS)) as client:
        child = child_at_work(serving, client)
        kill(client.pid)
        client.wait()
        assert wait_until(lambda: not alive(child), 5.0)
    assert set(worker.submit(address, job(tmp_path, examples))) == {"policy", "metrics"}


def test_a_job_that_breaks_off_leaves_no_child(serving: subprocess.Popen[bytes], address: str) -> None:
    assert wait_until(lambda: not children(serving.pid), 5.0)
    for sent in (b"", b'{"stage": "base_mo'):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(address)
            if sent:
                socket.send_fds(connection, [sent], [1, 2])
        assert wait_until(lambda: not children(serving.pid), 5.0)


def test_a_child_that_is_killed_fails_its_job_alone(
    serving: subprocess.Popen[bytes], address: str, examples: Path, tmp_path: Path
) -> None:
    assert wait_until(lambda: not children(serving.pid), 5.0)
    with asking(address, job(tmp_path, examples, ENDLESS)) as client:
        kill(child_at_work(serving, client))
        _, err = client.communicate(timeout=10)
    assert client.returncode == 1
    assert "RuntimeError: stage base_model failed" in err
    assert set(worker.submit(address, job(tmp_path, examples))) == {"policy", "metrics"}


def test_a_worker_that_goes_away_with_the_job_unread_fails_it(tmp_path: Path, examples: Path) -> None:
    address = str(tmp_path / "w")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(address)
        server.listen()
        with asking(address, job(tmp_path, examples)) as client:
            connection, _ = server.accept()
            select.select([connection], [], [], 30.0)  # the job is there, and is not read
            connection.close()
            _, err = client.communicate(timeout=10)
    assert client.returncode == 1
    assert "RuntimeError: stage base_model failed" in err


@pytest.mark.slow
def test_a_worker_whose_parent_is_gone_leaves(tmp_path: Path) -> None:
    program = (
        "import os, subprocess, sys, time\n"
        f"p = subprocess.Popen([*{SERVE!r}, sys.argv[1], str(os.getpid())])\n"
        "print(p.pid, flush=True)\ntime.sleep(600)"
    )
    address = tmp_path / "w"
    worker.starting(str(address)).touch()
    command = [sys.executable, "-c", program, str(address)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    assert parent.stdout is not None
    orphan = int(parent.stdout.readline())
    try:
        assert worker.ready(str(address))
        time.sleep(1.5)  # it looks once a second: alive while its parent is
        assert alive(orphan)
        parent.kill()
        parent.wait()
        assert wait_until(lambda: not alive(orphan), 5.0)
    finally:
        kill(orphan)


# Whether it takes jobs


def test_a_worker_that_fails_at_the_start_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "tokenizers.py").write_text("raise ImportError('broken installation')\n")
    address = tmp_path / "w"
    worker.starting(str(address)).touch()
    environ = environment()
    environ["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{environ['PYTHONPATH']}"
    process = subprocess.Popen([*SERVE, str(address), str(os.getpid())], stderr=subprocess.PIPE, text=True, env=environ)
    begun = time.monotonic()
    assert worker.ready(str(address)) is False
    assert time.monotonic() - begun < 20.0
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "broken installation" in err


def test_ready_waits_while_it_starts_and_no_longer(tmp_path: Path) -> None:
    address = tmp_path / "w"
    assert worker.ready(str(address)) is False  # nobody starts one
    worker.starting(str(address)).touch()
    begun = time.monotonic()
    assert worker.ready(str(address), patience=0.3) is False
    assert 0.3 <= time.monotonic() - begun < 5.0
    address.touch()
    assert worker.ready(str(address)) is True
