"""A training stage on two nodes: the SDK's local-process backend really starts them, under two torchruns."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.running import alive, environment, events_in, kill, marked
from vapo.errors import UserError
from vapo.recipe import Advantages, PpoUpdate, Train
from vapo.stage import Job
from vapo.train import nodes
from vapo.train.advantages import advantages
from vapo.train.launch import launch
from vapo.train.mailbox import Mailbox

from .conftest import World

pytest.importorskip("kubeflow")
EXECUTE = "import json, sys; from vapo.stage import execute; execute(json.load(open(sys.argv[1])))"
TWO_NODES = {"nodes": 2, "backend": "process"}


def section(epochs: int = 1, **train: Any) -> PpoUpdate:
    return PpoUpdate(
        epochs=epochs,
        mini_batch=4,
        actor_lr=1e-2,
        critic_lr=1e-2,
        warmup_steps=0,
        token_budget=64,
        train=Train(**train),
    )


@pytest.fixture
def inputs(world: World) -> dict[str, Path]:
    where = {"rollouts": world.rollouts, "rewards": world.rewards, "critic": world.critic}
    advantages(Advantages(), **where, experience=world.experience, iteration=1)
    return {**where, "experience": world.experience, "policy": world.policy, "reference": world.policy}


def outputs(world: World, suffix: str) -> dict[str, Path]:
    return {name: world.root / f"{name}-{suffix}" for name in ("new_policy", "new_critic")}


def weights(world: World, manifest: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in world.model(manifest.name).named_parameters()}


def stage_file(world: World, inputs: dict[str, Path], wanted: PpoUpdate) -> Path:
    """A job as a component hands it to `execute`."""
    job = Job(
        "ppo_update",
        wanted.model_dump_json(),
        {"seed": 0, "iteration": 1, "store": world.objects},
        {name: {"path": str(path), "sha256": ""} for name, path in inputs.items()},
        {name: str(path) for name, path in {**outputs(world, "nodes"), "metrics": world.root / "metrics"}.items()},
        time.time(),
    )
    path = world.root / "stage.json"
    path.write_text(json.dumps(vars(job)))
    return path


@contextmanager
def stage(job: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The stage's process and the mark of all that belongs to it; nothing outlives the block."""
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="vapo-test-") as scratch:
        command = [sys.executable, "-c", EXECUTE, str(job)]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment(mark), "TMPDIR": scratch},
        )
        try:
            yield process, mark
        finally:
            for pid in marked(mark):
                kill(pid)
            process.communicate()


def left(mark: str, seconds: float) -> list[str]:
    deadline = time.monotonic() + seconds
    while (found := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return list(found.values())


def ranks(mark: str) -> list[int]:
    return [pid for pid, command in marked(mark).items() if "-m vapo.train.rank" in command and alive(pid)]


@pytest.mark.slow
def test_two_nodes_do_what_two_ranks_do(world: World, inputs: dict[str, Path]) -> None:
    """The stage on two nodes: outputs, metrics and progress as on one node, and nothing is left behind."""
    parameters = {"seed": 0, "iteration": 1, "store": world.objects}
    alone = launch("ppo_update", section(ranks=2), inputs, outputs(world, "alone"), parameters)
    with stage(stage_file(world, inputs, section(**TWO_NODES))) as (process, mark):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
        assert left(mark, 2) == []
    for name in ("new_policy", "new_critic"):
        one, two = (weights(world, outputs(world, suffix)[name]) for suffix in ("alone", "nodes"))
        for key in one:
            torch.testing.assert_close(two[key], one[key], atol=1e-6, rtol=0)
    metrics = json.loads((world.root / "metrics").read_text())
    assert {**metrics, "seconds": 0} == pytest.approx({**alone, "seconds": 0}, rel=1e-4)
    told = [event["vapo"] for event in events_in(out)]
    assert told[0] == "start"
    assert told[-1] == "end"
    assert told.count("progress") >= 1
    assert events_in(out)[-2]["done"] == events_in(out)[-2]["total"] == 3
    assert not list((Path(world.objects) / "trainjobs").glob("*"))


@pytest.mark.slow
def test_what_a_rank_says_is_what_the_stage_says(world: World, inputs: dict[str, Path]) -> None:
    """A user's error in a rank of another node is the stage's one error event, in the rank's words."""
    (world.root / "other").write_bytes(world.critic.read_bytes())
    world.new_policy("other_policy", 1)
    world.new_critic("critic_of_other", "other_policy")
    with pytest.raises(UserError) as alone:
        launch("ppo_update", section(ranks=2), {**inputs, "critic": world.critic_of_other}, outputs(world, "a"), {})
    with stage(stage_file(world, {**inputs, "critic": world.critic_of_other}, section(**TWO_NODES))) as (process, mark):
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 1
        assert left(mark, 2) == []
    assert events_in(out)[-1] == {
        "vapo": "error",
        "stage": "ppo_update",
        "iteration": 1,
        "purpose": "",
        "user": True,
        "message": str(alone.value),
    }
    assert not (world.root / "new_policy-nodes").exists()
    assert not list((Path(world.objects) / "trainjobs").glob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_an_end_of_the_stage_is_an_end_of_the_job(world: World, inputs: dict[str, Path], sent: signal.Signals) -> None:
    """SIGTERM deletes the job and takes its things out of the store; even after kill -9 no process stays."""
    with stage(stage_file(world, inputs, section(epochs=100_000, **TWO_NODES))) as (process, mark):
        deadline = time.monotonic() + 90
        while len(ranks(mark)) < 2:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(sent)
        out, _ = process.communicate(timeout=30)
        assert left(mark, 15) == []
    if sent == signal.SIGTERM:
        assert process.returncode == 143
        assert events_in(out)[-1]["message"] == "SystemExit: 143"
        assert not list((Path(world.objects) / "trainjobs").glob("*"))


def test_a_user_s_error_comes_before_the_ones_it_caused() -> None:
    late = {"ended": "badly", "node": 1, "time": 2.0, "user": True, "message": "lower it"}
    early = {"ended": "badly", "node": 0, "time": 1.0, "user": False, "message": "lost a peer"}
    assert isinstance(nodes._failure([early, late]), UserError)
    assert str(nodes._failure([early, late])) == "lower it"
    assert str(nodes._failure([{**late, "user": False}, early])) == "node 0 failed: lost a peer"


def test_the_sdk_is_not_installed(world: World, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubeflow.trainer", None)
    for backend in ("process", "kubernetes"):
        train = {"nodes": 2, "backend": backend}
        store = world.objects if backend == "process" else "s3://bucket/run"
        with pytest.raises(UserError, match=re.escape("pip install 'vapo[trainer]'")):
            nodes.launch("ppo_update", section(**train), inputs, outputs(world, "nodes"), {"store": store})
    assert not list(Path(world.objects).rglob("trainjobs"))


def test_a_folder_is_no_store_for_pods(world: World, inputs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="s3://bucket/prefix"):
        nodes.launch("ppo_update", section(nodes=2), inputs, outputs(world, "nodes"), {"store": world.objects})


def test_an_unknown_runtime(world: World, inputs: dict[str, Path]) -> None:
    train = {**TWO_NODES, "runtime": "mine"}
    with pytest.raises(UserError, match=r"'mine'.*\['torch-distributed'\]"):
        nodes.launch("ppo_update", section(**train), inputs, outputs(world, "nodes"), {"store": world.objects})


def test_a_parcel_comes_out_as_it_went_in(tmp_path: Path) -> None:
    table, target = tmp_path / "table", tmp_path / "out"
    table.write_bytes(b"rows")
    mailbox = Mailbox(str(tmp_path / "store"), "job")
    assert mailbox.get("job") is None
    mailbox.put("job", {"stage": "ppo_update"}, {"rollouts": table})
    there = Mailbox(str(tmp_path / "store"), "job")
    assert there.get("job") == {"stage": "ppo_update"}
    there.take("job", {"rollouts": target})
    assert target.read_bytes() == b"rows"
    assert not target.is_symlink()
    there.clear()
    assert mailbox.get("job") is None
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]


def test_a_parcel_that_was_changed_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "table"
    table.write_bytes(b"rows")
    mailbox = Mailbox(str(tmp_path / "store"), "job")
    mailbox.put("job", {}, {"rollouts": table})
    (stored,) = (path for path in (tmp_path / "store").rglob("*") if path.is_file() and path.read_bytes() == b"rows")
    stored.write_bytes(b"ROWS")
    with pytest.raises(UserError, match="rollouts"):
        mailbox.take("job", {"rollouts": tmp_path / "out"})
    assert not (tmp_path / "out").exists()
