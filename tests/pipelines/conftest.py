"""Two working directories, of a run that nothing disturbed and one killed at every turn; and a cluster's API."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines import cluster
from tests.pipelines.kfp_server import KfpServer, serving
from tests.running import TINY, children, folder_of, kill, running, vapo


@dataclass
class Undisturbed:
    """The tiny recipe, run once to its end; some tests run on in `workdir`, and nobody touches `pristine`, a copy."""

    workdir: Path
    done: subprocess.CompletedProcess[str]
    pristine: Path = Path()

    @property
    def folder(self) -> Path:
        return folder_of(self.done.stdout)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return _undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The same, with every rollout in two shards."""
    return _undisturbed(tmp_path_factory.mktemp("sharded"), "--set", "rollout.shards=2")


def _undisturbed(folder: Path, *settings: str) -> Undisturbed:
    workdir, pristine = folder / "runs", folder / "pristine"
    done = vapo("run", *TINY, *settings, "--workdir", workdir)
    assert done.returncode == 0, (done.stdout, done.stderr)
    shutil.copytree(workdir, pristine)
    return Undisturbed(workdir, done, pristine)


@dataclass
class Interruption:
    """How a run ended that somebody interrupted, and which of its processes were there five seconds later."""

    status: int
    stdout: str
    stderr: str
    left: list[str]


@dataclass
class Disturbed:
    """The tiny recipe in another place, interrupted three times and resumed each time, with and without the worker."""

    workdir: Path
    runner_killed: Interruption
    interrupted: Interruption
    stage_killed: Interruption
    done: subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> Disturbed:
    workdir = tmp_path_factory.mktemp("disturbed")
    with running(workdir, *TINY) as run:
        run.started("base_model")
        kill(run.process.pid)
        left = run.left(5.0)
        runner_killed = Interruption(*run.end(), left)
    with running(workdir, "--resume", "--cold") as run:
        run.started("value_pretraining")
        run.process.send_signal(signal.SIGINT)
        status, out, err = run.end()
        interrupted = Interruption(status, out, err, run.left(5.0))
    with running(workdir, "--resume") as run:
        worker = run.wait_for(run.worker)
        run.started("ppo_update")
        kill(run.wait_for(lambda: children(worker), 5.0)[0])
        status, out, err = run.end()
        stage_killed = Interruption(status, out, err, run.left(5.0))
    done = vapo("run", "--resume", "--cold", "--workdir", workdir)
    return Disturbed(workdir, runner_killed, interrupted, stage_killed, done)


@pytest.fixture
def kfp(monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    """A Kubeflow Pipelines server, an environment that names none, and attempts that follow one another at once."""
    for name in ("VAPO_KFP_HOST", "VAPO_KFP_NAMESPACE", "VAPO_KFP_TOKEN", "VAPO_KFP_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    at_once = {"backoff_factor": 0.0, "backoff_jitter": 0.0}
    monkeypatch.setattr(cluster, "RETRIES", cluster.RETRIES.new(**at_once))
    monkeypatch.setattr(cluster, "FIRST", cluster.FIRST.new(**at_once))
    with serving(KfpServer()) as found:
        yield found
