"""What is asked of a cluster: the real SDK and the real Kubernetes client against a small API server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vapo.errors import UserError
from vapo.train.trainjob import COMPLETE, CREATED, FAILED, GONE, RUNNING, Cluster, Wanted

from .cluster import JOBS, PODS, TRAINER, FakeCluster, serving_cluster

pytest.importorskip("kubeflow")
NAME = "vapo-ppo-update-0123456789ab"
COMMAND = ("python", "-m", "vapo.train.node", "s3://bucket/run", NAME, "8")
WANTED = Wanted(
    NAME,
    "ppo_update",
    4,
    COMMAND,
    image="vapo:1",
    resources={"cpu": 16, "memory": "200Gi", "nvidia.com/gpu": 8},
    secret="vapo-store",
    queue="gpus",
    time_limit=3600,
)
WAITING = {"name": "node", "image": "vapo:1", "imageID": "", "ready": False, "restartCount": 0}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    from kubernetes.config import kube_config

    monkeypatch.setattr(Cluster, "pause", 0.05)
    for variable in ("KFP_POD_NAME", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(variable, raising=False)
    with serving_cluster(tmp_path) as (fake, config):
        monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(config))
        yield fake


def launcher_pod(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFP_POD_NAME", "launcher")
    cluster.pods["launcher"] = {
        "metadata": {"name": "launcher", "uid": "uid-1", "labels": {"pipeline/runid": "run-1"}},
        "spec": {"containers": [{"name": "wait", "image": "argo"}, {"name": "main", "image": "vapo@sha256:1"}]},
    }


def test_the_trainjob(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole object: nothing in it that the API does not know, and no value of a variable that is secret."""
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-real-secret")
    Cluster("torch-distributed").start(WANTED)
    job = cluster.jobs[NAME]
    resources = {"cpu": 16, "memory": "200Gi", "nvidia.com/gpu": 8}
    mounts = [
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        {"name": "secret", "mountPath": "/var/run/secrets/vapo", "readOnly": True},
    ]
    volumes = [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        {"name": "secret", "secret": {"secretName": "vapo-store"}},
    ]
    pod = {"containers": [{"name": "node", "volumeMounts": mounts}], "volumes": volumes}
    node = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    assert job["spec"] == {
        "runtimeRef": {"name": "torch-distributed", "kind": "ClusterTrainingRuntime"},
        "trainer": {
            "image": "vapo:1",
            "command": list(COMMAND),
            "numNodes": 4,
            "resourcesPerNode": {"requests": resources, "limits": resources},
            "env": [
                {"name": "PYTHONUNBUFFERED", "value": "1"},
                {"name": "AWS_ENDPOINT_URL", "value": "http://minio:9000"},
            ],
        },
        "runtimePatches": [
            {
                "manager": "trainer.kubeflow.org/kubeflow-sdk",
                "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [node]}}},
            }
        ],
        "activeDeadlineSeconds": 3600,
    }
    assert job["metadata"]["labels"] == {
        "app.kubernetes.io/managed-by": "vapo",
        "app.kubernetes.io/part-of": "vapo",
        "app.kubernetes.io/component": "ppo_update",
        "kueue.x-k8s.io/queue-name": "gpus",
    }
    sent = {key: value for key, value in job.items() if key != "metadata"}
    known = TrainerV1alpha1TrainJob.from_dict(job).to_dict()
    assert {key: known[key] for key in sent} == sent
    assert "not-a-real-secret" not in str(cluster.jobs)


def test_in_a_pod_the_job_takes_its_image_and_goes_with_it(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher_pod(cluster, monkeypatch)
    Cluster("torch-distributed").start(Wanted(NAME, "ppo_update", 2, COMMAND))
    job = cluster.jobs[NAME]
    assert job["spec"]["trainer"]["image"] == "vapo@sha256:1"
    assert job["metadata"]["labels"]["pipeline/runid"] == "run-1"
    owner = {"apiVersion": "v1", "kind": "Pod", "name": "launcher", "uid": "uid-1"}
    assert job["metadata"]["ownerReferences"] == [owner]
    assert "resourcesPerNode" not in job["spec"]["trainer"]


def test_outside_a_pod_the_image_must_be_named(cluster: FakeCluster) -> None:
    with pytest.raises(UserError, match=r"train\.image"):
        Cluster("torch-distributed").start(Wanted(NAME, "ppo_update", 2, COMMAND))
    assert not cluster.jobs


def test_states_of_a_job(cluster: FakeCluster) -> None:
    jobs = Cluster("torch-distributed")
    assert jobs.state(NAME) == GONE
    jobs.start(WANTED)
    assert jobs.state(NAME) == CREATED
    for number in range(4):
        cluster.set_pod(NAME, number, "Running")
    assert jobs.state(NAME) == RUNNING
    cluster.condition(NAME, "Complete", "AllJobsCompleted", "jobset completed")
    assert jobs.state(NAME) == COMPLETE
    jobs.delete(NAME)
    assert jobs.state(NAME) == GONE
    jobs.delete(NAME)


def test_an_attempt_finds_the_job_of_the_one_before(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job under way is taken over by the new launcher's pod; one that has ended makes room."""
    jobs = Cluster("torch-distributed")
    assert not jobs.found(NAME)
    jobs.start(WANTED)
    launcher_pod(cluster, monkeypatch)
    assert jobs.found(NAME)
    assert cluster.jobs[NAME]["metadata"]["ownerReferences"][0]["uid"] == "uid-1"
    cluster.condition(NAME, "Failed", "FailedJobs", "jobset failed")
    assert not jobs.found(NAME)
    assert not cluster.jobs
    jobs.start(WANTED)
    jobs.start(WANTED)  # made twice at the same time: the one is the other
    assert len(cluster.jobs) == 1


@pytest.mark.parametrize("breaks", [False, True])
def test_the_log_is_followed(cluster: FakeCluster, breaks: bool) -> None:
    """From before there is a pod to its end, each line once, though the stream may break."""
    cluster.log_breaks = breaks
    jobs, lines, over = Cluster("torch-distributed"), [], threading.Event()
    jobs.start(WANTED)
    reader = threading.Thread(target=lambda: lines.extend(jobs.lines(NAME, over)), daemon=True)
    reader.start()
    cluster.set_pod(NAME, 0, "Pending")
    time.sleep(0.1)
    cluster.set_pod(NAME, 0, "Running")
    cluster.logs[f"{NAME}-node-0-0-x"] = ["one"]
    time.sleep(0.2)
    cluster.logs[f"{NAME}-node-0-0-x"].append('{"vapo": "progress"}')
    cluster.set_pod(NAME, 0, "Succeeded")
    cluster.log_ended.set()
    reader.join(5)
    over.set()
    assert lines == ["one", '{"vapo": "progress"}']


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (
            {
                "conditions": [
                    {
                        "type": "PodScheduled",
                        "status": "False",
                        "reason": "Unschedulable",
                        "message": "0/3 nodes: no GPU",
                    }
                ]
            },
            "Unschedulable: 0/3 nodes: no GPU",
        ),
        (
            {"containerStatuses": [{**WAITING, "state": {"waiting": {"reason": "ContainerCreating"}}}]},
            "ContainerCreating",
        ),
    ],
)
def test_what_a_job_waits_for(cluster: FakeCluster, status: dict[str, Any], said: str) -> None:
    jobs = Cluster("torch-distributed")
    jobs.start(WANTED)
    assert jobs.waits_for(NAME) == "no pod was made yet"
    cluster.set_pod(NAME, 0, "Pending", **status)
    assert jobs.waits_for(NAME) == f"{NAME}-node-0-0-x: {said}"
    cluster.condition(NAME, "Suspended", "Suspended", "the queue is full")
    assert jobs.waits_for(NAME).endswith("the queue is full")


@pytest.mark.parametrize(
    ("reason", "cure"), [("ImagePullBackOff", "train.image"), ("CreateContainerConfigError", "train.secret")]
)
def test_what_no_waiting_changes_is_refused(cluster: FakeCluster, reason: str, cure: str) -> None:
    jobs = Cluster("torch-distributed")
    jobs.start(WANTED)
    waiting = {"reason": reason, "message": "of the kubelet"}
    cluster.set_pod(NAME, 1, "Pending", containerStatuses=[{**WAITING, "state": {"waiting": waiting}}])
    with pytest.raises(UserError, match=rf"node-0-1-x: {reason}: of the kubelet: .*{cure}"):
        jobs.waits_for(NAME)


def test_why_a_job_failed(cluster: FakeCluster) -> None:
    jobs = Cluster("torch-distributed")
    jobs.start(WANTED)
    assert jobs.why_failed(NAME) == "the cluster gives no reason"
    killed = {"terminated": {"reason": "OOMKilled", "exitCode": 137}}
    cluster.set_pod(NAME, 1, "Failed", containerStatuses=[{**WAITING, "state": killed}])
    cluster.condition(NAME, "Failed", "FailedJobs", "jobset failed")
    assert jobs.state(NAME) == FAILED
    assert jobs.why_failed(NAME) == f"FailedJobs: jobset failed; {NAME}-node-0-1-x: OOMKilled, exit code 137"


def test_an_unknown_runtime_is_refused_with_those_there_are(cluster: FakeCluster) -> None:
    with pytest.raises(UserError, match=r"'mine'.*\['jax', 'torch-distributed'\]"):
        Cluster("mine")
    with pytest.raises(UserError, match="jax, not torch"):
        Cluster("jax")


@pytest.mark.parametrize(
    ("verb", "path", "status", "said"),
    [
        ("POST", JOBS, 403, "exceeded quota: gpus"),
        ("POST", JOBS, 422, "spec.trainer.numNodes: Invalid value"),
        ("GET", f"{TRAINER}/namespaces/team/trainingruntimes/torch-distributed", 403, "cannot get resource"),
        ("GET", f"{TRAINER}/clustertrainingruntimes/torch-distributed", 500, "etcd is down"),
    ],
)
def test_what_the_cluster_refuses_is_said(cluster: FakeCluster, verb: str, path: str, status: int, said: str) -> None:
    cluster.refusals[verb, path] = (status, said)
    with pytest.raises(UserError, match=said):
        Cluster("torch-distributed").start(WANTED)


def test_no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a configuration, nor anybody at the address in it."""
    from kubernetes.config import kube_config

    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no Kubernetes cluster here"):
        Cluster("torch-distributed")
    with serving_cluster(tmp_path) as (_, config):
        monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(config))
    with pytest.raises(UserError, match="the Kubernetes API does not answer"):
        Cluster("torch-distributed")


def test_a_lost_answer_is_an_error_of_the_sdk(cluster: FakeCluster) -> None:
    """So that whoever polls can try again, whichever call it was."""
    jobs = Cluster("torch-distributed")
    jobs.start(WANTED)
    for path in (f"{JOBS}/{NAME}", PODS):
        cluster.refusals = {("GET", path): (503, "starting")}
        with pytest.raises(RuntimeError):
            jobs.state(NAME)
        with pytest.raises(RuntimeError):
            jobs.waits_for(NAME)
