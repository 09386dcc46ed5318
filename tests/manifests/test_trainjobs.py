"""The TrainJobs that vapo really makes, in the runtime and with the rights that the manifests give."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from manifests.pod_security import restricted
from manifests.references import GUIDE
from manifests.render import ROOT, Object, rendered
from manifests.schemas import schema_faults
from vapo.recipe import Train
from vapo.train.trainjob import COMPLETE, NODE, Cluster, Wanted

pytest.importorskip("kubeflow")
NAME = "vapo-ppo-update-0123456789ab"
WANTED = Wanted(
    NAME,
    "ppo_update",
    4,
    ("python", "-m", "vapo.train.node", "s3://bucket/run", NAME, "8"),
    image="vapo:1",
    resources={"cpu": 16, "memory": "200Gi", "nvidia.com/gpu": 8},
    secret="vapo-store",
    queue="vapo",
    time_limit=3600,
)
VERBS = {"POST": "create", "GET": "get", "PATCH": "patch", "DELETE": "delete"}


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    return rendered(ROOT / "overlays" / "trainer")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objects: list[Object]) -> Iterator[Any]:
    """The API server of tests/train, with our runtime in the namespace; the SDK looks there first."""
    from kubernetes.config import kube_config

    from tests.train.cluster import TRAINER, FakeCluster, serving_cluster

    runtimes = {thing["metadata"]["name"]: thing for thing in objects if thing["kind"] == "TrainingRuntime"}
    answer = FakeCluster.answer

    def with_ours(self: Any, verb: str, path: str, query: Any, body: Any) -> tuple[int, Any]:
        if found := re.fullmatch(rf"{TRAINER}/namespaces/team/trainingruntimes/([\w-]+)", path):
            self.requests.append((verb, path))
            return self._one(runtimes, found[1])
        return answer(self, verb, path, query, body)

    monkeypatch.setattr(FakeCluster, "answer", with_ours)
    monkeypatch.setattr(Cluster, "pause", 0.05)
    with serving_cluster(tmp_path) as (fake, config):
        monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(config))
        monkeypatch.setenv("KFP_POD_NAME", "launcher")
        fake.pods["launcher"] = {
            "metadata": {"name": "launcher", "uid": "uid-1", "labels": {"pipeline/runid": "run-1"}},
            "spec": {"containers": [{"name": "main", "image": "vapo@sha256:1"}]},
        }
        yield fake


def job_of(cluster: Any, wanted: Wanted) -> dict[str, Any]:
    Cluster(Train().runtime).start(wanted)
    made: dict[str, Any] = cluster.jobs[wanted.name]
    return made


@pytest.mark.parametrize("wanted", [WANTED, Wanted(NAME, "ppo_update", 2, WANTED.command)], ids=["all", "least"])
def test_it_is_as_the_trainer_wants_it(cluster: Any, wanted: Wanted) -> None:
    job = job_of(cluster, wanted)
    assert schema_faults(job) == ()
    assert job["spec"]["runtimeRef"] == {"name": "torch-distributed", "kind": "TrainingRuntime"}
    assert schema_faults({**job, "spec": {**job["spec"], "podSpecOverrides": []}})  # of Trainer 2.0; runtimePatches now
    assert schema_faults({**job, "metadata": {**job["metadata"], "name": "Capital"}})


def test_its_pods_are_restricted(cluster: Any, objects: list[Object]) -> None:
    """The runtime's pod with what the TrainJob patches into it."""
    runtime = next(thing for thing in objects if thing["kind"] == "TrainingRuntime")
    jobs = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert [job["name"] for job in jobs] == [NODE]
    pod = copy.deepcopy(jobs[0]["template"]["spec"]["template"]["spec"])
    assert [container["name"] for container in pod["containers"]] == [NODE]
    patches = job_of(cluster, WANTED)["spec"]["runtimePatches"]
    for patch in patches:
        for replicated in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]:
            spec = replicated["template"]["spec"]["template"]["spec"]
            assert replicated["name"] == NODE
            assert set(spec) == {"containers", "volumes"}
            pod["volumes"] += spec["volumes"]
            pod["containers"][0]["volumeMounts"] += spec["containers"][0]["volumeMounts"]
    names = [volume["name"] for volume in pod["volumes"]]
    assert len(names) == len(set(names)) == 3
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == set(names)
    assert list(restricted(pod, {})) == []


def test_the_runners_rights_are_those_that_it_needs(cluster: Any, objects: list[Object]) -> None:
    """Every request of a TrainJob's life is allowed to vapo-runner, and what is allowed beyond is known."""
    jobs = Cluster(Train().runtime)
    assert not jobs.found(NAME)
    jobs.start(WANTED)
    assert jobs.found(NAME)
    cluster.set_pod(NAME, 0, "Running")
    cluster.logs[f"{NAME}-node-0-0-x"] = ["step 1"]
    cluster.log_ended.set()
    cluster.condition(NAME, COMPLETE, "JobsCompleted", "done")
    assert jobs.state(NAME) == COMPLETE
    jobs.waits_for(NAME)
    jobs.why_failed(NAME)
    jobs.delete(NAME)
    allowed = rights(objects, "vapo-runner")
    asked = {asked_of(verb, path) for verb, path in cluster.requests} - {None}
    # A ConfigMap of the Trainer's own namespace: the SDK only warns where it may not be read.
    asked -= {("", "configmaps", "get")}
    assert asked <= allowed, asked - allowed
    beyond = {right for right in allowed - asked if right[0] == "trainer.kubeflow.org"}
    assert beyond == {  # for the message that names the runtimes that there are
        ("trainer.kubeflow.org", "trainingruntimes", "list"),
        ("trainer.kubeflow.org", "clustertrainingruntimes", "get"),
        ("trainer.kubeflow.org", "clustertrainingruntimes", "list"),
        ("trainer.kubeflow.org", "trainjobs", "list"),
    }
    assert ("", "pods/log", "get") in allowed


def asked_of(verb: str, path: str) -> tuple[str, str, str] | None:
    """(group, resource, verb) of a request, as the API server authorises it."""
    found = re.fullmatch(r"/apis?/(?:([\w.]+)/)?v\w+/(?:namespaces/[\w-]+/)?(\w+)(?:/([\w.-]+))?(?:/(\w+))?", path)
    assert found, path
    group, resource, name, below = found.groups()
    return group or "", f"{resource}/{below}" if below else resource, VERBS[verb] if verb != "GET" or name else "list"


def rights(objects: list[Object], account: str) -> set[tuple[str, str, str]]:
    """(group, resource, verb) of everything that an account may do."""
    roles = {
        binding["roleRef"]["name"]
        for binding in objects
        if binding["kind"].endswith("RoleBinding")
        if account in [subject["name"] for subject in binding["subjects"]]
    }
    return {
        (group, resource, verb)
        for role in objects
        if role["kind"] in ("Role", "ClusterRole") and role["metadata"]["name"] in roles
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_who_may_do_what(objects: list[Object]) -> None:
    """The accounts of the guide's table; nobody else has rights, and nobody may touch pods or read any Secret."""
    accounts = {thing["metadata"]["name"] for thing in objects if thing["kind"] == "ServiceAccount"}
    assert accounts == {"vapo-runner", "vapo-submitter", "vapo-segments", "vapo-node"}
    rows = re.findall(r"^\| `(vapo-\w+)`", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(rows) == accounts
    assert rights(objects, "vapo-node") == set()
    for account in ("vapo-submitter", "vapo-segments"):
        assert {group for group, _, _ in rights(objects, account)} == {"pipelines.kubeflow.org"}
    assert {(resource, verb) for group, resource, verb in rights(objects, "vapo-runner") if group == ""} == {
        ("pods", "get"),
        ("pods", "list"),
        ("pods/log", "get"),
        ("configmaps", "get"),
        ("secrets", "get"),
    }
