"""The whole pipeline with vLLM: it is refused where it is not installed, and nothing of it outlives a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.running import ROOT, TINY, alive, assert_refused, children, environment, kill, records, running, vllm_wants

# vLLM's attention on a CPU wants heads of 32.
VLLM = (*TINY, "--set", "rollout.engine=vllm", "--set", "base_model.hidden_size=64")
START = 400.0  # seconds within which vLLM starts on a machine that has much else to do
needs_vllm = pytest.mark.skipif(bool(vllm_wants()), reason=vllm_wants())
HIDE = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = classmethod(lambda cls, name, *more: None if name == "vllm" else find(name, *more))
"""


def test_an_engine_that_is_not_installed(tmp_path: Path) -> None:
    """Refused before anything starts, whether or not this Python has it."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    environ = {**environment(), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    asked = ["run", "tiny", "--fresh", "--set", "rollout.engine=vllm", "--workdir", str(tmp_path / "w")]
    done = subprocess.run(
        [sys.executable, "-m", "vapo", *asked], capture_output=True, text=True, env=environ, timeout=60, check=False
    )
    assert_refused(done, "rollout.engine is 'vllm'", "vapo[vllm]", "make setup-dev", "set rollout.engine to 'cpu'")
    assert not list((tmp_path / "w").glob(".vapo/artifacts/*"))


def descendants(pid: int) -> list[int]:
    return [found for child in children(pid) for found in (child, *descendants(child))]


def workers(pid: int) -> list[int]:
    """vLLM's processes among the descendants; they hide the environment by which others are found."""
    found = []
    for process in descendants(pid):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            if b"VLLM::Worker" in Path(f"/proc/{process}/cmdline").read_bytes():
                found.append(process)
    return found


@pytest.mark.vllm
@pytest.mark.slow
@needs_vllm
def test_killed_and_resumed(tmp_path: Path) -> None:
    """kill -9 while vLLM's workers share a model; then, with one, to the end: ratio and gap are those of one model."""
    with running(tmp_path, *VLLM, "--set", "rollout.tensor_parallel=2") as run:
        run.wait_for(lambda: len(workers(run.process.pid)) == 2, START)
        theirs = descendants(run.process.pid)
        kill(run.process.pid)
        deadline = time.monotonic() + START  # a worker looks for its parent when it has started
        while (left := [pid for pid in theirs if alive(pid)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in left:
            kill(pid)
        assert not left
    with running(tmp_path, *VLLM) as run:
        run.started("rollout")
        run.wait_for(lambda: '"vapo": "progress"' in run.log().rpartition('"stage": "rollout"')[2], START)
        run.process.send_signal(signal.SIGINT)
        run.end()
        assert not run.left(5.0)
    with running(tmp_path, "--resume") as run:
        out, err = run.process.communicate(timeout=3 * START)
    assert run.process.returncode == 0, (out, err)
    (update,) = (r["metrics"] for r in records(tmp_path).values() if r["stage"] == "ppo_update")
    assert 0 < update["logprob_gap_max"] < 1e-4
    assert len(list((tmp_path / ".vapo" / "partial").iterdir())) == 1  # of the first run, which nobody resumed
