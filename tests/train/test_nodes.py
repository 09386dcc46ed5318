"""A training stage on two nodes: the SDK's local-process backend really starts them, under two torchruns."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.seaweed import BUCKET, SeaweedFS, serving
from tests.running import alive, assert_refused, environment, events_in, kill, marked, vapo
from vapo.errors import UserError
from vapo.recipe import Advantages, PpoUpdate, Train, load_recipe
from vapo.stage import Job
from vapo.store import sha256_of
from vapo.train import nodes
from vapo.train.advantages import advantages
from vapo.train.launch import launch
from vapo.train.mailbox import Mailbox
from vapo.train.ppo_update import ppo_update
from vapo.train.trainjob import Cluster

from .cluster import JOBS, PODS, FakeCluster, serving_cluster
from .conftest import World

pytest.importorskip("kubeflow")
pytest.importorskip("minio")
EXECUTE = """
import json, sys
from vapo.progress import leave_with_reader
from vapo.stage import execute
leave_with_reader()
execute(json.load(open(sys.argv[1])))
"""
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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def bucket(server: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


def objects_below(server: SeaweedFS, store: str) -> list[str]:
    prefix = store.removeprefix(f"s3://{BUCKET}/")
    return [found.object_name for found in server.client().list_objects(BUCKET, prefix=prefix, recursive=True)]


@pytest.fixture
def inputs(world: World) -> dict[str, Path]:
    where = {"rollouts": world.rollouts, "rewards": world.rewards, "critic": world.critic}
    advantages(Advantages(), **where, experience=world.experience, iteration=1)
    return {**where, "experience": world.experience, "policy": world.policy, "reference": world.policy}


def outputs(world: World, suffix: str) -> dict[str, Path]:
    return {name: world.root / f"{name}-{suffix}" for name in ("new_policy", "new_critic")}


def weights(world: World, manifest: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in world.model(manifest.name).named_parameters()}


def stage_file(world: World, inputs: dict[str, Path], wanted: PpoUpdate, store: str = "") -> Path:
    """A job as a component hands it to `execute`."""
    job = Job(
        "ppo_update",
        wanted.model_dump_json(),
        {"seed": 0, "iteration": 1, "store": store or world.objects},
        {name: {"path": str(path), "sha256": ""} for name, path in inputs.items()},
        {name: str(path) for name, path in {**outputs(world, "nodes"), "metrics": world.root / "metrics"}.items()},
        time.time(),
    )
    path = world.root / "stage.json"
    path.write_text(json.dumps(vars(job)))
    return path


@contextmanager
def stage(job: Path, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The stage's process and the mark of all that belongs to it; nothing outlives the block."""
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="vapo-test-") as scratch:
        command = [sys.executable, "-c", EXECUTE, str(job)]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment(mark), **variables, "TMPDIR": scratch},
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


def running(mark: str, module: str) -> list[int]:
    """Process IDs of `python -m MODULE`; torchrun has it further back in its command."""
    starts = re.compile(rf"\S*python\S* (-u )?-m {re.escape(module)} ")
    return [pid for pid, command in marked(mark).items() if starts.match(command) and alive(pid)]


@pytest.mark.slow
def test_two_nodes_do_what_two_ranks_do(world: World, inputs: dict[str, Path], server: SeaweedFS, bucket: str) -> None:
    """The stage on two nodes that meet in a bucket: outputs, metrics and progress as on one; nothing is left behind."""
    parameters = {"seed": 0, "iteration": 1, "store": world.objects}
    alone = launch("ppo_update", section(ranks=2), inputs, outputs(world, "alone"), parameters)
    job = stage_file(world, inputs, section(**TWO_NODES), bucket)
    with stage(job, **server.environment) as (process, mark):
        out, err = process.communicate(timeout=300)
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
    last = [event for event in events_in(out) if event["vapo"] == "progress"][-1]
    assert last["done"] == last["total"] == 3
    assert server.secret_key not in out + err
    left_in_store = objects_below(server, bucket)
    assert left_in_store
    assert not [key for key in left_in_store if "trainjobs" in key]


@pytest.mark.slow
def test_what_a_rank_says_is_what_the_stage_says(world: World, inputs: dict[str, Path]) -> None:
    """A user's error in a rank of another node is the stage's one error event, in the rank's words."""
    world.new_policy("other_policy", 1)
    world.new_critic("critic_of_other", "other_policy")
    inputs = {**inputs, "critic": world.critic_of_other}
    with pytest.raises(UserError) as alone:
        ppo_update(section(), **inputs, **outputs(world, "alone"), seed=0, iteration=1, store=world.objects)
    with stage(stage_file(world, inputs, section(**TWO_NODES))) as (process, mark):
        out, _ = process.communicate(timeout=300)
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
@pytest.mark.parametrize(("sent", "at"), [(signal.SIGTERM, "vapo.train.rank"), (signal.SIGKILL, "vapo.train.node")])
def test_an_end_of_the_stage_is_an_end_of_the_job(
    world: World, inputs: dict[str, Path], sent: signal.Signals, at: str
) -> None:
    """SIGTERM deletes the job and takes its things out of the store; even after kill -9 no process stays."""
    with stage(stage_file(world, inputs, section(epochs=100_000, **TWO_NODES))) as (process, mark):
        deadline = time.monotonic() + 90
        while len(running(mark, at)) < 2:
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


class Pods:
    """What the nodes of a TrainJob do, as the launcher sees it: they fetch the job and leave words in the store."""

    def __init__(self, cluster: FakeCluster, store: str) -> None:
        self.cluster, self.store = cluster, store
        self.words: dict[int, dict[str, Any]] = {}
        self.job: dict[str, Any] | None = None
        cluster.on_create = lambda name: threading.Thread(target=self.work, args=(name,), daemon=True).start()

    def work(self, name: str) -> None:
        mailbox = Mailbox(self.store, name)
        self.job = mailbox.get("job")
        for number in range(2):
            self.cluster.set_pod(name, number, "Running")
        self.cluster.logs[f"{name}-node-0-0-x"] = ['{"vapo": "progress", "done": 1}']
        self.cluster.log_ended.set()
        with tempfile.TemporaryDirectory() as scratch:
            written = {label: Path(scratch) / label for label in ("new_policy", "new_critic")}
            for label, path in written.items():
                path.write_text(label)
            for number, word in self.words.items():
                mailbox.put(f"node-{number}", word, written if number == 0 else {})


WELL = {"ended": "well", "metrics": {"policy_loss": 0.5}}
BADLY = {
    "ended": "badly",
    "time": 1.0,
    "user": True,
    "message": "advantages.alpha 9: lower it",
    "traceback": "line 3\n",
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    from kubernetes.config import kube_config

    monkeypatch.setattr(Cluster, "pause", 0.05)
    monkeypatch.setattr(nodes, "AFTERTHOUGHT", 0.2)
    monkeypatch.delenv("KFP_POD_NAME", raising=False)
    with serving_cluster(tmp_path) as (fake, config):
        monkeypatch.setenv("KUBECONFIG", str(config))
        monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(config))
        yield fake


def on_cluster(world: World, inputs: dict[str, Path], store: str, **train: Any) -> dict[str, float | None]:
    """The launcher's part on a cluster of two nodes."""
    wanted = section(nodes=2, image="vapo:1", **train)
    return nodes.launch(
        "ppo_update", wanted, inputs, outputs(world, "nodes"), {"seed": 0, "iteration": 1, "store": store}
    )


def test_a_stage_on_a_cluster(
    world: World,
    inputs: dict[str, Path],
    cluster: FakeCluster,
    server: SeaweedFS,
    bucket: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pods = Pods(cluster, bucket)
    pods.words = {0: WELL, 1: {**WELL, "metrics": {}}}
    assert on_cluster(world, inputs, bucket) == {"policy_loss": 0.5}
    assert {label: path.read_text() for label, path in outputs(world, "nodes").items()} == {
        "new_policy": "new_policy",
        "new_critic": "new_critic",
    }
    assert pods.job is not None
    assert pods.job["inputs"] == {label: sha256_of(path) for label, path in inputs.items()}
    assert '{"vapo": "progress", "done": 1}\n' in capsys.readouterr().out
    assert not cluster.jobs
    assert not objects_below(server, bucket)


def test_the_words_of_a_node_that_failed(
    world: World,
    inputs: dict[str, Path],
    cluster: FakeCluster,
    server: SeaweedFS,
    bucket: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What the user can cure goes before what it caused, and ends a job whose other nodes would wait for ever."""
    Pods(cluster, bucket).words = {0: {**BADLY, "user": False, "message": "lost a peer"}, 1: {**BADLY, "time": 2.0}}
    with pytest.raises(UserError, match=r"^advantages\.alpha 9: lower it$"):
        on_cluster(world, inputs, bucket)
    assert capsys.readouterr().err == ""
    Pods(cluster, bucket).words = {1: {**BADLY, "user": False, "message": "ZeroDivisionError"}}
    with pytest.raises(RuntimeError, match="node 1 failed: ZeroDivisionError"):
        on_cluster(world, inputs, bucket)
    assert capsys.readouterr().err == "line 3\n"
    assert not cluster.jobs
    assert not objects_below(server, bucket)


def test_a_job_that_ends_without_a_word(
    world: World, inputs: dict[str, Path], cluster: FakeCluster, bucket: str
) -> None:
    killed = {"name": "node", "image": "vapo:1", "imageID": "", "ready": False, "restartCount": 0}
    killed["state"] = {"terminated": {"reason": "OOMKilled", "exitCode": 137}}

    def fail(name: str) -> None:
        cluster.set_pod(name, 1, "Failed", containerStatuses=[killed])
        cluster.condition(name, "Failed", "FailedJobs", "jobset failed")

    cluster.on_create = fail
    with pytest.raises(RuntimeError, match=r"FailedJobs: jobset failed; .*node-0-1-x: OOMKilled.*token_budget"):
        on_cluster(world, inputs, bucket)
    assert not cluster.jobs
    cluster.on_create = lambda name: cluster.jobs.pop(name)
    cluster.pods = {}
    with pytest.raises(RuntimeError, match="was deleted while it ran"):
        on_cluster(world, inputs, bucket)


def test_a_job_that_does_not_start(
    world: World,
    inputs: dict[str, Path],
    cluster: FakeCluster,
    bucket: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cluster.on_create = lambda name: cluster.condition(name, "Suspended", "Suspended", "waiting for 16 GPUs")
    with pytest.raises(UserError, match=r"train\.start_limit 1 s: .*waiting for 16 GPUs"):
        on_cluster(world, inputs, bucket, start_limit=1)
    assert capsys.readouterr().out.count("waiting for 16 GPUs") == 1
    assert not cluster.jobs


def test_a_cluster_that_stops_to_answer(
    world: World,
    inputs: dict[str, Path],
    cluster: FakeCluster,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For a while that is waited out, and what the nodes say is heard meanwhile; then the stage fails."""
    pods = Pods(cluster, bucket)
    refuse = {("GET", f"{JOBS}/{{name}}"): (503, "starting")}

    def unanswered(name: str, *, words: bool) -> None:
        cluster.refusals = {(verb, path.format(name=name)): said for (verb, path), said in refuse.items()}
        if words:
            pods.work(name)

    pods.words = {0: WELL}
    cluster.on_create = lambda name: unanswered(name, words=True)
    assert on_cluster(world, inputs, bucket) == {"policy_loss": 0.5}
    cluster.refusals = {}
    monkeypatch.setattr(nodes, "UNANSWERED", 0.3)
    cluster.on_create = lambda name: unanswered(name, words=False)
    with pytest.raises(RuntimeError, match="Failed to get TrainJob"):
        on_cluster(world, inputs, bucket)
    assert not cluster.jobs


@pytest.mark.parametrize("end", ["SIGTERM", "nobody reads", "SIGKILL"])
def test_an_end_of_the_launcher_on_a_cluster(
    world: World,
    inputs: dict[str, Path],
    cluster: FakeCluster,
    server: SeaweedFS,
    bucket: str,
    end: str,
) -> None:
    """Its end deletes the TrainJob; after kill -9 that goes on, and the next attempt finds it and takes its result."""
    wanted = section(nodes=2, image="vapo:1")
    kubeconfig = os.environ["KUBECONFIG"]
    with stage(stage_file(world, inputs, wanted, bucket), **server.environment, KUBECONFIG=kubeconfig) as (process, _):
        deadline = time.monotonic() + 60
        while not cluster.jobs:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if end == "nobody reads":  # Ctrl-C in `vapo run`: the process that reads what the stage prints is gone
            assert process.stdout
            process.stdout.close()
            process.wait(30)
        else:
            process.send_signal(getattr(signal, end))
            process.communicate(timeout=30)
    if end != "SIGKILL":
        assert process.returncode != 0
        assert not cluster.jobs
        assert not objects_below(server, bucket)
        return
    (name,) = cluster.jobs
    pods = Pods(cluster, bucket)
    pods.words = {0: WELL}
    threading.Timer(0.5, pods.work, [name]).start()  # when the next attempt follows the job
    assert on_cluster(world, inputs, bucket) == {"policy_loss": 0.5}
    assert cluster.requests.count(("POST", JOBS)) == 1
    assert not cluster.jobs
    assert not objects_below(server, bucket)


def test_a_result_that_nobody_took_is_taken(
    world: World, inputs: dict[str, Path], cluster: FakeCluster, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher was killed, its job ended well, and the cluster has tidied it up: the result is not lost."""
    pods, made = Pods(cluster, bucket), []
    pods.words = {0: WELL}
    cluster.on_create = made.append
    monkeypatch.setattr(nodes, "UNANSWERED", 0.1)
    cluster.refusals[("GET", PODS)] = (503, "starting")
    with monkeypatch.context() as killed:
        killed.setattr(Mailbox, "clear", lambda mailbox: None)
        with pytest.raises(RuntimeError):
            on_cluster(world, inputs, bucket)
    cluster.refusals = {}
    pods.work(made[0])
    assert on_cluster(world, inputs, bucket) == {"policy_loss": 0.5}
    assert len(made) == 1


def test_a_user_s_error_comes_before_the_ones_it_caused() -> None:
    late = {**BADLY, "node": 1, "time": 2.0, "message": "lower it"}
    early = {**BADLY, "node": 0, "user": False, "message": "lost a peer"}
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


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("train.backend=process", "train.runtime=mine"), "train.runtime 'mine'"),
        (("runtime.store=s3://bucket/run",), "no Kubernetes cluster here"),
    ],
)
def test_a_run_that_cannot_have_its_nodes_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...], said: str
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    chosen = [part for setting in ("train.nodes=2", *settings) for part in ("--set", setting)]
    assert_refused(vapo("run", "tiny", *chosen, "--workdir", tmp_path / "runs"), said)
    assert not list((tmp_path / "runs").glob("*/log.txt"))


@pytest.mark.parametrize("store", ["", "s3", "/data/run"])
def test_a_recipe_whose_nodes_cannot_see_the_store_is_refused(store: str) -> None:
    with pytest.raises(
        UserError, match=r"train\.nodes 2 with runtime\.store.*set runtime\.store to s3://bucket/prefix"
    ):
        load_recipe("tiny", ["train.nodes=2", f"runtime.store={store!r}"])
    assert load_recipe("tiny", ["train.nodes=2", "runtime.store=s3://bucket/run"]).train.nodes == 2


def test_a_folder_is_no_store_for_pods(world: World, inputs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="s3://bucket/prefix"):
        nodes.launch("ppo_update", section(nodes=2), inputs, outputs(world, "nodes"), {"store": world.objects})


def test_an_unknown_runtime(world: World, inputs: dict[str, Path]) -> None:
    train = {**TWO_NODES, "runtime": "mine"}
    with pytest.raises(UserError, match=r"'mine'.*\['torch-distributed'\]"):
        nodes.launch("ppo_update", section(**train), inputs, outputs(world, "nodes"), {"store": world.objects})


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "folder" else str(request.getfixturevalue("bucket"))


def test_a_parcel_comes_out_as_it_went_in(store: str, tmp_path: Path) -> None:
    table, target = tmp_path / "table", tmp_path / "new" / "out"
    table.write_bytes(b"rows")
    mailbox = Mailbox(store, "job")
    assert mailbox.get("job") is None
    assert mailbox.names() == set()
    mailbox.put("job", {"stage": "ppo_update"}, {"rollouts": table})
    mailbox.put("node-1", {"ended": "well"})
    there = Mailbox(store, "job")
    assert there.names() == {"job", "node-1"}
    assert there.get("job") == {"stage": "ppo_update"}
    there.take("job", {"rollouts": target, "critic": tmp_path / "none"})
    there.clear()
    assert target.read_bytes() == b"rows"
    assert not target.is_symlink()
    assert mailbox.get("job") is None
    assert mailbox.names() == set()


def test_a_parcel_that_was_changed_or_lost_is_refused(store: str, tmp_path: Path) -> None:
    table, target = tmp_path / "table", tmp_path / "out"
    table.write_bytes(b"rows")
    mailbox = Mailbox(store, "job")
    mailbox.put("job", {}, {"rollouts": table})
    text = mailbox.notes.read("job") or ""
    mailbox.notes.write("job", text.replace(sha256_of(table), "0" * 64))
    with pytest.raises(UserError, match="rollouts was lost or changed"):
        mailbox.take("job", {"rollouts": target})
    mailbox.notes.write("job", text.replace('"bytes": 4', '"bytes": 5'))
    with pytest.raises(UserError, match="rollouts was lost or changed"):
        mailbox.take("job", {"rollouts": target})
    assert not target.exists()
